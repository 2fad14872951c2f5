"""Names and values under which results appear in MLflow."""

from dataclasses import replace

from qexp.report.results import Evidence
from qexp.tracking import metrics


def test_curves_come_before_the_figures_of_a_model(evidence: Evidence) -> None:
    """The UI draws names without a slash last."""
    values = metrics.of_model(evidence.int8.accuracy, 450_000, 427_178)
    values |= metrics.of_comparison(evidence.int8.comparison["test"]) | {"int8_macs_percent": 100.0}
    assert values["test_top1_percent"] == 93.5 and values["train_top1_percent"] == 96.5 and values["size_mb"] == 0.45
    assert not [name for name in values if "/" in name]
    assert all("/" in name for name in metrics.of_epoch(evidence.fp32.train.epochs[0]))


def test_figures_on_images_know_their_split(evidence: Evidence) -> None:
    values = metrics.of_model(evidence.int8.accuracy, 450_000, 427_178)
    values |= metrics.of_comparison(evidence.int8.comparison["test"]) | {"int8_macs_percent": 100.0}
    splits = {name: metrics.split_of(name) for name in values}
    assert {name for name, split in splits.items() if split is None} == {"size_mb", "parameters", "int8_macs_percent"}
    assert splits["validation_top3_percent"] == "validation" and splits["train_top1_percent"] == "train"
    assert splits["test_top1_percent"] == splits["top1_drop_low_points"] == splits["agreement_percent"] == "test"
    assert not any(map(metrics.split_of, metrics.of_epoch(evidence.fp32.train.epochs[0])))


def test_figures_of_a_runtime_are_of_the_test_images(evidence: Evidence) -> None:
    values = metrics.of_runtime("openvino", evidence.int8.accuracy["test"], evidence.int8.comparison["test"])
    assert values["openvino_top1_drop_high_points"] == evidence.int8.comparison["test"].top1_drop_high_points
    assert {metrics.split_of(name) for name in values} == {"test"}
    assert metrics.split_of("fp32_openvino_top1_percent") is None  # of a baseline, logged to no model


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


def test_latency_is_one_curve_a_model_and_quantity(evidence: Evidence) -> None:
    """On the run under the models' names; on each model without one."""
    found = list(metrics.of_latency(evidence.latency, "int8_fx", evidence.floats))
    run = {(name, step): value for whose, step, values in found if whose is None for name, value in values.items()}
    assert run["latency/p50_ms/fp32", 8] == 4.0 and run["latency/p99_ms/bf16", 128] == 45.0
    row = evidence.latency.rows[1]
    assert run["latency/speedup_over_fp32/int8_fx", 8] == row.speedups["int8_fx"].median
    over_floats = row.ratio("fp32_onnx", "int8_fx").median  # bf16 is faster, but does not count
    assert run["latency/speedup_over_floats", 8] == over_floats
    assert {name for name, step in run if step is None} == {"mean_speedup", "smallest_speedup"}
    curves = {name for name, step in run if step is not None}
    assert len(curves) == 5 + 5 + 4 + 1 and len(run) == 3 * len(curves) + 2
    assert run["smallest_speedup", None] == min(run["latency/speedup_over_floats", size] for size in (1, 8, 128))
    own = {(name, step): value for whose, step, values in found if whose == "int8_fx" for name, value in values.items()}
    assert own["p50_ms", 8] == 0.8 and own["speedup_over_fp32", 8] == row.speedups["int8_fx"].median and len(own) == 6
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
    assert "latency/p99_ms/int8_fx" not in names and {"latency/p50_ms/int8_fx", "latency/p99_ms/fp32"} <= names
