"""Names and values under which results appear in MLflow."""

from dataclasses import replace

from qexp.report.results import Evidence
from qexp.tracking import metrics


def test_test_accuracy_has_the_short_name_and_the_curves_keep_theirs(evidence: Evidence) -> None:
    values = metrics.of_model(evidence.int8.accuracy, 450_000, 427_178)
    assert values["test/top1"] == 93.5 and values["train/final_top1"] == 96.5 and values["model/size_mb"] == 0.45
    assert not set(values) & set(metrics.of_epoch(evidence.fp32.train.epochs[0]))


def test_an_epoch_has_every_figure(evidence: Evidence) -> None:
    values = metrics.of_epoch(evidence.fp32.train.epochs[1])
    assert values["train/loss"] == 2.0 and values["val/top1"] == 55.0 and values["train/images_per_s"] == 900.0
    assert len(values) == 8


def test_latency_table_has_a_row_a_model_and_batch_size(evidence: Evidence) -> None:
    table = metrics.latency_table(evidence.latency)
    assert table["batch_size"] == [1] * 5 + [8] * 5 + [128] * 5 and {len(column) for column in table.values()} == {15}
    assert table["model"][:5] == ["fp32", "fp32_traced", "bf16", "fp32_onnx", "int8_fx"]
    assert table["p50_ms"][:5] == [1.0, 0.8, 0.7, 0.5, 0.25] and table["repeats"][0] == 60
    found = evidence.latency.rows[0].speedups["int8_fx"]
    ends = [table[f"speedup_{end}"][4] for end in ("median", "low", "high")]
    assert ends == [found.median, found.low, found.high] and table["speedup_median"][0] == 1


def test_latency_of_each_model_and_of_the_chosen_one(evidence: Evidence) -> None:
    """On the run under the models' names; on each model without one."""
    found = list(metrics.of_latency(evidence.latency, "int8_fx", evidence.floats))
    run = {(name, step): value for whose, step, values in found if whose is None for name, value in values.items()}
    assert run["latency/fp32_p50_ms", 8] == run["latency/fp32_p50_ms_batch8", None] == 4.0
    assert run["latency/bf16_p99_ms", 128] == 45.0 and run["latency/int8_fx_images_per_s", 1] == 4000
    speedup = evidence.latency.rows[1].speedups["int8_fx"].median
    names = ("latency/speedup", "latency/int8_speedup", "latency/int8_fx_speedup")
    assert {run[name, 8] for name in names} == {run[f"{name}_batch8", None] for name in names} == {speedup}
    row = evidence.latency.rows[1]
    over_floats = row.ratio("fp32_onnx", "int8_fx").median  # bf16 is faster, but does not count
    assert run["latency/speedup_over_floats", 8] == run["latency/speedup_over_floats_batch8", None] == over_floats
    own = {(name, step): value for whose, step, values in found if whose == "int8_fx" for name, value in values.items()}
    assert own["latency/p50_ms", 8] == own["latency/p50_ms_batch8", None] == 0.8
    assert own["latency/speedup", 8] == speedup and len(own) == 3 * 7
    assert {whose for whose, _, _ in found} == {None, *evidence.latency.rows[0].stats}


def test_accuracy_table_has_a_row_a_model_and_split(evidence: Evidence) -> None:
    table = metrics.accuracy_table({"fp32": evidence.fp32.accuracy, "int8": evidence.int8.accuracy})
    assert list(zip(table["model"], table["split"], strict=True))[3] == ("int8", "train")
    assert table["top1_percent"] == [97.0, 95.0, 94.0, 96.5, 94.5, 93.5]


def test_a_percentile_that_is_not_known_is_no_metric(evidence: Evidence) -> None:
    row = evidence.latency.rows[0]
    stats = row.stats | {"int8_fx": replace(row.stats["int8_fx"], p99_ms=None)}
    latency = replace(evidence.latency, rows=(replace(row, stats=stats),))
    names = {name for _, _, values in metrics.of_latency(latency, "int8_fx", evidence.floats) for name in values}
    assert "latency/int8_fx_p99_ms" not in names and {"latency/int8_fx_p90_ms", "latency/fp32_p99_ms"} <= names
