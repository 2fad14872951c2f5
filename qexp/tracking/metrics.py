"""The names under which results appear in MLflow. Pure functions, no MLflow.

What stages have found comes in, names and values go out to `runs.py`, which logs them. The UI draws a section of charts
for what stands before the last slash of a name, the sections in alphabetical order, and last those without a slash:
curves have a slash, and come first; the figures of a model have none. docs/reference/mlflow.md lists all names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.latency import LatencyResult
from qexp.measurement.threads import ThreadsRow
from qexp.measurement.throughput import KINDS
from qexp.models.names import RUNTIMES
from qexp.report.results import ThroughputEvidence
from qexp.training.train import EpochResult

FIRST_OF_EPOCH = "train/loss"
LAST_OF_TRAINING = "parameters"  # of what a training logs: with it, only the run's end can be missing
OF_COMPARISON = ("top1_drop", "top3_drop", "agreement", "only_")  # begin the names of what compares on test images
HEADLINE = (  # of an evidence's headline, what the table of runs shows of a job
    "mean_speedup", "top1_drop_points", "int8_top1_percent", "size_ratio", "smallest_speedup", "fp32_top1_percent",
)  # fmt: skip


def of_epoch(result: EpochResult) -> dict[str, float]:
    """One point of every training curve."""
    return {
        FIRST_OF_EPOCH: result.train_loss,
        "train/top1": result.train_top1_percent,
        "train/top3": result.train_top3_percent,
        "val/loss": result.validation_loss,
        "val/top1": result.validation_top1_percent,
        "val/top3": result.validation_top3_percent,
        "train/learning_rate": result.learning_rate,
        "train/images_per_s": result.images_per_second,
    }


def of_model(accuracy: dict[str, Accuracy], size_bytes: int, parameters: int) -> dict[str, float]:
    """Size, parameters and final accuracy by split of one model, named as the tags of its version are."""
    values = {"size_mb": size_bytes / 1e6, LAST_OF_TRAINING: float(parameters)}
    for split, result in accuracy.items():
        values |= {f"{split}_top1_percent": result.top1_percent, f"{split}_top3_percent": result.top3_percent}
    return values


def split_of(name: str) -> str | None:
    """The split (train, validation, test) on whose images a metric of a model was measured; None for none."""
    of_runtime = name.startswith(tuple(f"{runtime}_" for runtime in RUNTIMES))
    split = "test" if of_runtime or name.startswith(OF_COMPARISON) else name.partition("_")[0]
    return split if split in ("train", "validation", "test") and "/" not in name else None


def of_comparison(comparison: Comparison) -> dict[str, float]:
    """int8 against fp32 on the test images."""
    return {
        "top1_drop_points": comparison.top1_drop_points,
        "top1_drop_low_points": comparison.top1_drop_low_points,
        "top1_drop_high_points": comparison.top1_drop_high_points,
        "top3_drop_points": comparison.top3_drop_points,
        "agreement_percent": comparison.agreement_percent,
        "only_fp32_correct_images": float(comparison.only_fp32_correct_images),
        "only_int8_correct_images": float(comparison.only_int8_correct_images),
    }


def tags_of_accuracy(test: Accuracy) -> dict[str, Any]:
    """Accuracy on the test images, as tags of a version."""
    return {
        "test_top1_correct": test.top1_correct,
        "test_top3_correct": test.top3_correct,
        "test_top1_tied": test.top1_tied_images,
        "test_top3_tied": test.top3_tied_images,
        "test_top1_percent": f"{test.top1_percent:.3f}",
        "test_top3_percent": f"{test.top3_percent:.3f}",
    }


def tags_of_drop(test: Comparison) -> dict[str, str]:
    """The drop on the test images, as tags of an int8 version."""
    names = ("top1_drop_points", "top1_drop_low_points", "top1_drop_high_points")
    return {name: f"{getattr(test, name):.3f}" for name in names}


def of_runtime(name: str, accuracy: Accuracy, comparison: Comparison) -> dict[str, float]:
    """An int8 file in another runtime than its first, on the test images."""
    values = {"top1_percent": accuracy.top1_percent, "top1_drop_points": comparison.top1_drop_points}
    values["top1_drop_high_points"] = comparison.top1_drop_high_points
    values["agreement_percent"] = comparison.agreement_percent
    return {f"{name}_{key}": value for key, value in values.items()}


def of_bf16(name: str, accuracy: Accuracy, drop_points: float) -> dict[str, float]:
    """A baseline in bf16 on the test images."""
    return {f"{name}_top1_percent": accuracy.top1_percent, f"{name}_top1_drop_points": drop_points}


def of_latency(
    result: LatencyResult, chosen: str, floats: Sequence[str]
) -> Iterator[tuple[str | None, int | None, dict[str, float]]]:
    """Values with whose they are (the model's name, None for the run) and their step: curves over the batch size.

    Speed-ups of a model are over the registered fp32 model. `latency/speedup_over_floats` is that of `chosen`, the
    fastest int8 model, over the fastest of `floats`: its mean and its smallest value are there too, named as the tags
    of a version are.
    """
    for row in result.rows:
        curves = {"latency/speedup_over_floats": row.ratio(row.fastest(floats), chosen).median}
        for name, stats in row.stats.items():
            own = {"p50_ms": stats.p50_ms}
            if name != result.baseline:
                own["speedup_over_fp32"] = row.speedups[name].median
            yield name, row.batch_size, own
            curves[f"latency/p50_ms/{name}"] = stats.p50_ms
            if stats.p99_ms is not None:
                curves[f"latency/p99_ms/{name}"] = stats.p99_ms
            if name != result.baseline:
                curves[f"latency/speedup_over_fp32/{name}"] = row.speedups[name].median
        yield None, row.batch_size, curves
    summary = {"mean_speedup": result.mean_ratio(floats, chosen).median}
    yield None, None, summary | {"smallest_speedup": result.smallest_speedup(chosen, floats)}


def latency_table(result: LatencyResult) -> dict[str, list[Any]]:
    """Columns by name, one row a model and batch size."""
    return columns(
        [
            {"batch_size": row.batch_size, "model": name, **asdict(stats)}
            | {f"speedup_{key}": value for key, value in asdict(row.speedups[name]).items()}
            for row in result.rows
            for name, stats in row.stats.items()
        ]
    )


def of_threads(rows: Sequence[ThreadsRow]) -> Iterator[tuple[int, dict[str, float]]]:
    """The best number of threads of the fastest float and of int8, with the batch size as step."""
    for row in rows:
        best = {"float": row.float.threads, "int8": row.int8.threads}
        yield row.batch_size, {f"latency/best_threads/{kind}": float(count) for kind, count in best.items()}


def threads_table(rows: Sequence[ThreadsRow]) -> dict[str, list[Any]]:
    """Columns by name, one row a batch size, model and number of threads."""
    return columns(
        [
            {"batch_size": row.batch_size, "model": found.models[count], "threads": count, "p50_ms": p50_ms}
            | {"best": count == found.threads}
            for row in rows
            for found in (row.float, row.int8)
            for count, p50_ms in found.p50_ms.items()
        ]
    )


def of_throughput(found: ThroughputEvidence) -> Iterator[tuple[int | None, dict[str, float]]]:
    """Of each setting, with the batch size as step; and of the one that serves most within the limit, without."""
    for row in found.result.rows:
        at = f"{row.setting.workers}x{row.setting.threads}"
        values = {}
        for kind in KINDS:
            one = row.of(kind)
            values[f"throughput/images_per_second/{kind}_{at}"] = one.rate.median
            if one.p99_ms is not None:
                values[f"throughput/p99_ms/{kind}_{at}"] = one.p99_ms
        yield row.setting.batch_size, values
    for kind in KINDS:
        if best := found.best(kind):
            yield None, {f"{kind}_images_per_second": best.served.rate.median}


def throughput_table(found: ThroughputEvidence) -> dict[str, list[Any]]:
    """Columns by name, one row a setting and model."""
    rows = []
    for row in found.result.rows:
        for one in (row.float, row.int8):
            rate = one.rate
            values = {"images_per_second": rate.median, "low": rate.low, "high": rate.high}
            times = {"p50_ms": one.p50_ms, "p99_ms": one.p99_ms, "requests": one.requests}
            rows.append({**asdict(row.setting), "model": one.model, **values, **times})
    return columns(rows)


def accuracy_table(accuracy: dict[str, dict[str, Accuracy]]) -> dict[str, list[Any]]:
    """Columns by name, one row a model and split."""
    return columns(
        [
            {"model": model, "split": split, **asdict(result)}
            for model, by_split in accuracy.items()
            for split, result in by_split.items()
        ]
    )


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows with the same keys as columns by key."""
    return {key: [row[key] for row in rows] for key in rows[0]}
