"""Names and values under which results appear in MLflow."""

from qexp import metrics
from qexp.evidence import Evidence


def test_test_accuracy_has_the_short_name_and_the_curves_keep_theirs(evidence: Evidence) -> None:
    values = metrics.of_model(evidence.int8.accuracy, 450_000, 427_178)
    assert values["test/top1"] == 93.5 and values["train/final_top1"] == 96.5 and values["model/size_mb"] == 0.45
    assert not set(values) & set(metrics.of_epoch(evidence.fp32.train.epochs[0]))


def test_an_epoch_has_every_figure(evidence: Evidence) -> None:
    values = metrics.of_epoch(evidence.fp32.train.epochs[1])
    assert values["train/loss"] == 2.0 and values["val/top1"] == 55.0 and values["train/images_per_s"] == 900.0
    assert len(values) == 8


def test_latency_table_has_a_row_a_batch_size(evidence: Evidence) -> None:
    table = metrics.latency_table(evidence.latency.rows)
    assert table["batch_size"] == [1, 8, 128] and table["fp32_p50_ms"] == [1.0, 4.0, 100.0]
    assert table["speedup"] == [4.0, 5.0, 10.0] and {len(column) for column in table.values()} == {3}


def test_accuracy_table_has_a_row_a_model_and_split(evidence: Evidence) -> None:
    table = metrics.accuracy_table({"fp32": evidence.fp32.accuracy, "int8": evidence.int8.accuracy})
    assert list(zip(table["model"], table["split"], strict=True))[3] == ("int8", "train")
    assert table["top1_percent"] == [97.0, 95.0, 94.0, 96.5, 94.5, 93.5]
