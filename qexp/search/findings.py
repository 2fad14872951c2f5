"""How a search shows what it has found: tables, figure and note of the parent run, and the last line of the command.

Fed by the result of conclusion.py alone; job.py calls it.
"""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qexp.config import Config, QuantizeConfig, option_name
from qexp.report.figures import FP32, INT8, Axes, save_figure
from qexp.search.results import SearchPoint, SearchResult
from qexp.tracking import metrics
from qexp.tracking import runs as tracking

MOST_ROWS = 15  # of the front, in a note
MARKERS = "os^Dvp*"  # by observer
COLORS = ("#e07b39", "#3b7a57", "#7a4b9c")  # by engine
ALWAYS_SHOWN = ("engine", "calibration_samples", "observer")  # in the command, their defaults too


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
        save_figures(result, Path(folder))
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


def quantize_command(config: Config, model_uri: str, options: QuantizeConfig) -> str:
    """`qexp quantize` with these options, as one types it; most are left out where they are the default."""
    words = ["qexp", "quantize", "--model-uri", model_uri]
    words += ["--data-dir", config.data.data_dir] if config.data.data_dir else []
    for key, value in options.model_dump(mode="json").items():
        if key in ALWAYS_SHOWN or value != getattr(QuantizeConfig(), key):
            text = ",".join(value) if isinstance(value, list) else str(value)
            text = text.lower() if isinstance(value, bool) else text
            words += [f"--{option_name('quantize', key).replace('_', '-')}", text]
    return shlex.join(words)


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


# --- Figures ---


def save_figures(result: SearchResult, folder: Path) -> None:
    """`search.png` for one objective, `pareto.png` for two."""
    draw, name = (_by_count, "search") if result.objective == "top1" else (_pareto, "pareto")
    save_figure(draw, result, folder / f"{name}.png")


def _by_count(axes: Axes, result: SearchResult) -> None:
    """Validation top-1 against calibration sample count, with the spread between seeds."""
    for kind in sorted({_kind(point) for point in result.points}):
        points = [point for point in result.points if _kind(point) == kind]
        counts = [point.calibration_samples for point in points]
        means, spreads = [p.top1_percent for p in points], [p.spread_points for p in points]
        axes.errorbar(counts, means, spreads, fmt="o-", ms=3, capsize=3, label=f"int8, {kind}")
    axes.axhline(result.fp32_top1_percent, color=FP32, ls="--", lw=0.8, label="fp32")
    winner = result.winner
    axes.plot(winner.calibration_samples, winner.top1_percent, "o", ms=9, mfc="none", color=INT8, label="winner")
    counts = sorted({point.calibration_samples for point in result.points})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_title("Accuracy by calibration sample count")
    axes.set(xlabel="calibration images (bars: spread between seeds)", ylabel="validation top-1, %")
    axes.legend(fontsize=6)


def _pareto(axes: Axes, result: SearchResult) -> None:
    """Validation top-1 against ms or MB: all points, the front as steps, and the winner."""
    timed = result.objective == "top1+latency"
    unit = 1.0 if timed else 1e6
    engines = sorted({point.engine for point in result.points})
    observers = sorted({point.observer for point in result.points})
    for kind in sorted({(point.engine, point.observer) for point in result.points}):
        points = [point for point in result.points if (point.engine, point.observer) == kind]
        costs, top1 = [(p.cost or 0) / unit for p in points], [p.top1_percent for p in points]
        color, marker = COLORS[engines.index(kind[0])], MARKERS[observers.index(kind[1])]
        axes.plot(costs, top1, marker, ms=4, mfc="none", color=color, label=", ".join(kind))
    costs, top1 = [(p.cost or 0) / unit for p in result.front], [p.top1_percent for p in result.front]
    axes.step(costs, top1, "-", where="post", lw=1, color="grey", label="Pareto front")
    winner = result.winner
    axes.plot((winner.cost or 0) / unit, winner.top1_percent, "o", ms=10, mfc="none", color="black", label="winner")
    fp32 = f"fp32 ({(result.fp32_cost or 0) / unit:.2f} {'ms' if timed else 'MB'})"
    axes.axhline(result.fp32_top1_percent, color=FP32, ls="--", lw=0.8, label=fp32)
    xlabel = f"p50 at batch size {result.latency_batch_size}, ms" if timed else "size on disk, MB (10⁶ bytes)"
    axes.set(title="Accuracy against " + ("latency" if timed else "size"), xlabel=xlabel, ylabel="validation top-1, %")
    axes.legend(fontsize=6)
