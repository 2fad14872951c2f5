"""The names under which results appear in MLflow: a slash makes a section of the UI. Pure functions, no MLflow."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qexp.evaluation import Accuracy, Comparison
from qexp.latency import LatencyResult, LatencyRow, LatencyStats
from qexp.training import EpochResult

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


def of_latency(result: LatencyResult) -> Iterator[tuple[str, int | None, dict[str, float]]]:
    """Values with their step, the batch size, and whose they are: "fp32" or "int8", or "both" for the comparison.

    The p50 and the speed-up are there without a step too: a table of runs shows only the value at the largest one.
    """
    for row in result.rows:
        step, scalar = row.batch_size, f"_batch{row.batch_size}"
        yield "both", step, {"latency/speedup": row.speedup}
        yield "both", None, {f"latency/speedup{scalar}": row.speedup}
        for kind in ("fp32", "int8"):
            stats: LatencyStats = getattr(row, kind)
            values = {"p50_ms": stats.p50_ms, "p90_ms": stats.p90_ms, "p99_ms": stats.p99_ms}
            values["images_per_s"] = stats.images_per_second
            for owner, prefix in ((kind, "latency/"), ("both", f"latency/{kind}_")):
                yield owner, step, {f"{prefix}{name}": value for name, value in values.items()}
                yield owner, None, {f"{prefix}p50_ms{scalar}": stats.p50_ms}


def latency_table(rows: Sequence[LatencyRow]) -> dict[str, list[Any]]:
    """Columns by name, one row a batch size."""
    flat = [
        {"batch_size": row.batch_size, "speedup": row.speedup}
        | {f"{kind}_{name}": value for kind in ("fp32", "int8") for name, value in asdict(getattr(row, kind)).items()}
        for row in rows
    ]
    return columns(flat)


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
