"""The names under which results appear in MLflow: a slash makes a section of the UI. Pure functions, no MLflow."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.latency import LatencyResult
from qexp.training.train import EpochResult

FINAL = {"train": "train/final_", "validation": "val/final_", "test": "test/"}  # train/top1 is the curve

FIRST_OF_EPOCH = "train/loss"


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
    """Size, parameters and final accuracy by split of one model."""
    values = {"model/size_mb": size_bytes / 1e6, "model/params": float(parameters)}
    for split, result in accuracy.items():
        values |= {f"{FINAL[split]}top1": result.top1_percent, f"{FINAL[split]}top3": result.top3_percent}
    return values


def of_comparison(comparison: Comparison, int8_macs_percent: float) -> dict[str, float]:
    """int8 against fp32 on the test images."""
    return {
        "test/top1_drop": comparison.top1_drop_points,
        "test/top1_drop_low": comparison.top1_drop_low_points,
        "test/top1_drop_high": comparison.top1_drop_high_points,
        "test/top3_drop": comparison.top3_drop_points,
        "test/agreement": comparison.agreement_percent,
        "test/only_fp32_correct": float(comparison.only_fp32_correct_images),
        "test/only_int8_correct": float(comparison.only_int8_correct_images),
        "model/int8_macs_percent": int8_macs_percent,
    }


def of_bf16(accuracy: Accuracy, drop_points: float) -> dict[str, float]:
    """The baseline bf16 on the test images."""
    return {"test/bf16_top1": accuracy.top1_percent, "test/bf16_top1_drop": drop_points}


def of_latency(
    result: LatencyResult, chosen: str, floats: Sequence[str]
) -> Iterator[tuple[str | None, int | None, dict[str, float]]]:
    """Values with whose they are (the model's name, None for the run alone) and their step, the batch size.

    The p50 and the speed-up are there without a step too: a table of runs shows only the value at the largest one.
    `chosen`, the fastest int8 model, is also there as `int8`. Speed-ups of a model are over the registered fp32 model;
    `latency/speedup_over_floats` is that of `chosen` over the fastest of `floats`.
    """
    for row in result.rows:
        scalar = f"_batch{row.batch_size}"
        named = {name: (name, row.stats[name], row.speedups[name].median) for name in row.stats}
        for prefix, (name, stats, speedup) in (named | {"int8": named[chosen]}).items():
            quantiles = {"p50_ms": stats.p50_ms, "p90_ms": stats.p90_ms, "p99_ms": stats.p99_ms}
            values = {key: value for key, value in quantiles.items() if value is not None}
            values |= {"images_per_s": stats.images_per_second, "speedup": speedup}
            owners = [(None, f"latency/{prefix}_")] + ([(name, "latency/")] if prefix == name else [])
            for owner, start in owners:
                yield owner, row.batch_size, {f"{start}{key}": value for key, value in values.items()}
                yield owner, None, {f"{start}{key}{scalar}": values[key] for key in ("p50_ms", "speedup")}
        speedup = row.speedups[chosen].median
        yield None, row.batch_size, {"latency/speedup": speedup}
        yield None, None, {f"latency/speedup{scalar}": speedup}
        over_floats = row.ratio(row.fastest(floats), chosen).median
        yield None, row.batch_size, {"latency/speedup_over_floats": over_floats}
        yield None, None, {f"latency/speedup_over_floats{scalar}": over_floats}


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
