"""The interactive chart of the inference time: one point for each model and batch size, both axes logarithmic.

It needs no network: lines are inline SVG, everything with text is HTML at its own size, so that it can be read at the
width of a phone. A few lines of JavaScript show a value with its interval and switch models on and off. figures.py
draws the same as a picture, with the same colours.
"""

import math
from dataclasses import dataclass

from jinja2 import Environment

from qexp.measurement.latency import LatencyRow
from qexp.report.results import Evidence
from qexp.report.sentences import by_batch_size, threads, three_digits

FP32, INT8 = "#5b6c8f", "#e07b39"
OTHER_FLOATS = ("#3b7a57", "#2a78b5", "#8e5ea2", "#937860", "#1fa39a", "#6d7a88", "#3f3f9f", "#7cb342")
OTHER_INT8 = ("#c0392b", "#d4a017", "#c77cab", "#7f8c3d", "#8a4b2a", "#e05a9c")
MARGIN_PERCENT = 3.0  # of the width, on both sides of the points
MOST_TICKS = 8


@dataclass(frozen=True)
class Style:
    """How a model is drawn."""

    color: str
    dashes: str  # of SVG; empty for a full line

    @property
    def is_main(self) -> bool:
        """Whether it is fp32 or the chosen version."""
        return not self.dashes


@dataclass(frozen=True)
class Point:
    """Place in percent of the width and the height, from the upper left, and what is said of it."""

    x: float
    y: float
    text: str


def styles(evidence: Evidence) -> dict[str, Style]:
    """Of each model: the registered fp32 version and the chosen int8 version stand out."""
    main = {evidence.latency.baseline: Style(FP32, ""), evidence.name: Style(INT8, "")}
    floats = [name for name in evidence.measured.floats if name not in main]
    int8 = [name for name in evidence.latency.rows[0].stats if name not in (*main, *floats)]
    others = {name: Style(OTHER_FLOATS[n % len(OTHER_FLOATS)], "6 4") for n, name in enumerate(floats)}
    others |= {name: Style(OTHER_INT8[n % len(OTHER_INT8)], "2 3") for n, name in enumerate(int8)}
    return {name: (main | others)[name] for name in evidence.latency.rows[0].stats}


def latency_chart(evidence: Evidence, templates: Environment) -> str:
    """The chart as HTML, to be put into a page."""
    rows = by_batch_size(evidence)
    times = [stats.p50_ms for row in rows for stats in row.stats.values()]
    low, high = _ends(min(times), max(times))

    def x(batch_size: int) -> float:
        first, last = (math.log(row.batch_size) for row in (rows[0], rows[-1]))
        share = (math.log(batch_size) - first) / (last - first) if last > first else 0.5
        return MARGIN_PERCENT + (100 - 2 * MARGIN_PERCENT) * share

    def y(time_ms: float) -> float:
        return 100 * (1 - (math.log(time_ms) - math.log(low)) / (math.log(high) - math.log(low)))

    series = {
        name: [Point(x(row.batch_size), y(row.stats[name].p50_ms), _told(evidence, row, name)) for row in rows]
        for name in rows[0].stats
    }
    return templates.get_template("chart.html.j2").render(
        title=f"Inference time by batch size, p50 in ms per batch, {threads(evidence.latency.threads)}",
        series=series,
        styles=styles(evidence),
        x_ticks=[(x(row.batch_size), row.batch_size) for row in rows],
        y_ticks=[(y(tick), f"{tick:g}") for tick in _ticks(low, high)],
    )


def _told(evidence: Evidence, row: LatencyRow, name: str) -> str:
    """Value and interval of a point."""
    stats, base = row.stats[name], evidence.latency.baseline
    tail = [f"{word} {three_digits(value)}" for word, value in (("p90", stats.p90_ms), ("p99", stats.p99_ms)) if value]
    text = f"{name}, batch size {row.batch_size}: {three_digits(stats.p50_ms)} ms"
    text += f" ({', '.join(tail)})" if tail else ""
    if name == base:
        return text
    ratio = row.speedups[name]
    return f"{text}; {ratio.median:.2f}x as fast as {base} (95 % interval {ratio.low:.2f} to {ratio.high:.2f})"


def _ends(smallest: float, largest: float) -> tuple[float, float]:
    """With some room at both ends."""
    room = max(1.1, (largest / smallest) ** 0.06)
    return smallest / room, largest * room


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... between two values; of many, those of 1 and 10 alone."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]
    tens = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    return tens if len(ticks) > MOST_TICKS and len(tens) > 1 else ticks
