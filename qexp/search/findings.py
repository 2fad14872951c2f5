"""What a search has found, as the parent run in MLflow shows it and as the last line of the command has it."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qexp.report.results import SearchPoint, SearchResult
from qexp.search import figures
from qexp.tracking import metrics
from qexp.tracking import runs as tracking

MOST_ROWS = 15  # of the front, in a note


def log_findings(result: SearchResult) -> str:
    """Tables, figure, metrics and note of the active run; the note."""
    rows = [
        _row(point) | {"below_best_points": below.difference_points, "margin_points": below.margin_points}
        for point, below in zip(result.points, result.below_best, strict=True)
    ]
    tracking.log_table(metrics.columns(rows), "search")
    tracking.log_table(metrics.columns([_row(point) for point in result.front]), "pareto")
    tracking.log_result("search", result)
    with tempfile.TemporaryDirectory() as folder:
        figures.save_figures(result, Path(folder))
        tracking.log_folder(Path(folder), "figures")
    winner = result.winner
    values = {"val/best_top1": result.best.top1_percent, "search/winner": float(winner.calibration_samples)}
    values |= {"search/winner_top1": winner.top1_percent, "search/failed_trials": float(result.failed_trials)}
    values["search/not_told_apart"] = float(result.not_told_apart)
    if winner.cost is not None:
        values["search/winner_p50_ms" if winner.speedup else "search/winner_mb"] = winner.cost / _unit(result)
    tracking.log_metrics(values)
    note = _note(result)
    tracking.set_note(note)
    return note


def summary(result: SearchResult) -> dict[str, Any]:
    """The figures of the command's last line."""
    points = {"best": _short(result.best), "winner": _short(result.winner)}
    if result.objective != "top1":
        points["front"] = [_short(point) for point in result.front]  # type: ignore[assignment]
    facts = {"study": result.study, "objective": result.objective, "noise_points": result.noise_points}
    facts |= {"not_told_apart": result.not_told_apart}
    return facts | {"trials": len(result.points), "failed_trials": result.failed_trials} | points


def _row(point: SearchPoint) -> dict[str, Any]:
    """One value a column: ratios with their intervals in columns of their own."""
    row = asdict(point)
    row["top1_by_seed_percent"] = list(point.top1_by_seed_percent)
    del row["correct_by_seed"]
    for key in ("speedup", "noise"):
        ratio = row.pop(key) or {"median": None, "low": None, "high": None}
        row |= {f"{key}_{part}": value for part, value in ratio.items()}
    return row


def _short(point: SearchPoint) -> dict[str, Any]:
    return {key: value for key, value in _row(point).items() if value is not None and key != "top1_by_seed_percent"}


def _note(result: SearchResult) -> str:
    winner, best = result.winner, result.best
    noise = f"fp32 {result.fp32_top1_percent:.2f} %. {_told(result)}"
    failed = f" {result.failed_trials} trials failed: see their runs." if result.failed_trials else ""
    if result.objective == "top1":
        return (
            f"{winner.calibration_samples} calibration images ({_kind(winner)}) are enough: validation top-1 "
            f"{winner.top1_percent:.2f} %, best {best.top1_percent:.2f} % with {best.calibration_samples} "
            f"({_kind(best)}), {noise}{failed}"
        )
    return (
        f"To take: {winner.calibration_samples} calibration images, {_kind(winner)}: validation top-1 "
        f"{winner.top1_percent:.2f} % at {_cost(result, winner)}; best {best.top1_percent:.2f} % at "
        f"{_cost(result, best)}, {noise}{failed}\n\nNo other point beats these in both objectives (measured values, "
        f"noise not considered):\n\n{_table(result, result.front)}"
    )


def _told(result: SearchResult) -> str:
    """What the images and seeds can tell apart, and what not."""
    others, seeds = len(result.points) - 1, min(len(point.top1_by_seed_percent) for point in result.points)
    count = f"Of the {others} other points, {result.not_told_apart} cannot be told apart from the best"
    margin = f"median margin {result.noise_points:.2f} points"
    if not result.is_paired:
        return f"{count} ({margin}, from the spread between seeds alone: there are trials of an earlier version)."
    sampled = f"{result.validation_images:,} validation images"
    if seeds > 1:
        return f"{count} ({margin}, from the same {sampled} with {seeds} calibration subsets each, all at 95 %)."
    return (
        f"{count} ({margin}, from the same {sampled}; with one calibration subset, what others would give is unknown)."
    )


def _table(result: SearchResult, points: Sequence[SearchPoint]) -> str:
    timed = result.objective == "top1+latency"
    cost = f"p50 at batch {result.latency_batch_size}, ms | speed-up over fp32 (95 % interval)" if timed else "size, MB"
    lines = [f"| top-1, % | {cost} | calibration | how |", "| --: |" + " --: |" * (2 if timed else 1) + " --: | :-- |"]
    for point in points[:MOST_ROWS]:
        value = f"{(point.cost or 0) / _unit(result):.3f}"
        if ratio := point.speedup:
            value += f" | {ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
        lines.append(f"| {point.top1_percent:.2f} | {value} | {point.calibration_samples} | {_kind(point)} |")
    return "\n".join(lines)


def _kind(point: SearchPoint) -> str:
    scale = ", a weight scale a layer" if point.weight_scale == "layer" else ""
    kept = f", {point.fp32_layers} layers in fp32" if point.fp32_layers else ""
    return f"{point.engine}, {point.observer}{scale}{kept}"


def _unit(result: SearchResult) -> float:
    return 1.0 if result.objective == "top1+latency" else 1e6


def _cost(result: SearchResult, point: SearchPoint) -> str:
    return f"{(point.cost or 0) / _unit(result):.3f} {'ms' if point.speedup else 'MB'}"
