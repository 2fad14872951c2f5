"""The figures of a search, from its result alone."""

from pathlib import Path

from qexp.report.figures import FP32, INT8, Axes, save_figure
from qexp.report.results import SearchPoint, SearchResult

MARKERS = "os^Dvp*"  # by observer
COLORS = ("#e07b39", "#3b7a57", "#7a4b9c")  # by engine


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
    axes.plot(
        winner.calibration_samples, winner.top1_percent, "o", ms=9, mfc="none", color=INT8, label="smallest in noise"
    )
    counts = sorted({point.calibration_samples for point in result.points})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_title("Accuracy by calibration sample count")
    axes.set(xlabel="calibration images (bars: spread between seeds)", ylabel="validation top-1, %")
    axes.legend(fontsize=6)


def _kind(point: SearchPoint) -> str:
    scale = ", scale a layer" if point.weight_scale == "layer" else ""
    kept = f", {point.fp32_layers} in fp32" if point.fp32_layers else ""
    return f"{point.engine}, {point.observer}{scale}{kept}"


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
    axes.plot((winner.cost or 0) / unit, winner.top1_percent, "o", ms=10, mfc="none", color="black", label="to take")
    fp32 = f"fp32 ({(result.fp32_cost or 0) / unit:.2f} {'ms' if timed else 'MB'})"
    axes.axhline(result.fp32_top1_percent, color=FP32, ls="--", lw=0.8, label=fp32)
    xlabel = f"p50 at batch size {result.latency_batch_size}, ms" if timed else "size on disk, MB (10⁶ bytes)"
    axes.set(title="Accuracy against " + ("latency" if timed else "size"), xlabel=xlabel, ylabel="validation top-1, %")
    axes.legend(fontsize=6)
