"""Sentences of the report on latency: computed from the measured values, with the noise held against them."""

from collections.abc import Sequence
from itertools import pairwise

from qexp.measurement.latency import CONFIDENCE, FEWEST_LOADS, FEWEST_ROUNDS, LatencyRow, Ratio
from qexp.report.results import Evidence

SAME_SPEED = 0.05  # times saved that differ by less than 5 % do not grow


def latency(evidence: Evidence) -> list[str]:
    """Where int8 is faster than the fastest float and the registered fp32 model, and how it was timed."""
    name, result = evidence.name, evidence.latency
    rows = sorted(result.rows, key=lambda row: row.batch_size)
    sentences = [faster_where(evidence), over_fp32(evidence)]
    if len(rows) > 1:
        gaps = [row.stats[row.fastest(evidence.floats)].p50_ms - row.stats[name].p50_ms for row in rows]
        grows = all(later > max(0.0, earlier) * (1 + SAME_SPEED) for earlier, later in pairwise(gaps))
        change = "grows with the batch size" if grows else "does not grow with the batch size"
        if gaps[-1] > max(0.0, gaps[0]) * (1 + SAME_SPEED) and not grows:
            change = "grows with the batch size, though not with every larger batch"
        ends = f"{gaps[0]:.2f} ms at {rows[0].batch_size}, {gaps[-1]:.2f} ms at {rows[-1].batch_size}"
        sentences.append(f"The time saved per batch against the fastest float {change}: {ends}.")
    return [*sentences, *shortcomings(evidence), *_others(evidence), _how_timed(evidence), _loaded(evidence)]


def faster_where(evidence: Evidence) -> str:
    """Where the chosen int8 model is faster than the fastest float of each batch size, slower, or neither is shown."""
    rows = sorted(evidence.latency.rows, key=lambda row: row.batch_size)
    told = {row.batch_size: row.compared(row.fastest(evidence.floats), evidence.name) for row in rows}
    ratios = [row.ratio(row.fastest(evidence.floats), evidence.name).median for row in rows]
    mean = evidence.over_floats(evidence.name)
    weighted = "weighted mean" if evidence.latency.weights else "geometric mean"
    range_ = f"{_from_to(ratios)} as fast, {mean.median:.2f}x in the {weighted} ({_ends(mean)})"
    names = ", ".join(dict.fromkeys(row.fastest(evidence.floats) for row in rows))
    groups = (
        (1, "faster"),
        (-1, "slower"),
        (0, "not shown to be faster or slower"),
    )
    found = [
        f"{words} {_where([size for size, sign in told.items() if sign == group], len(told))}"
        for group, words in groups
        if group in told.values()
    ]
    unclear = " (at a confidence that leaves 5 % for all comparisons of the sweep)" if 0 in told.values() else ""
    return f"Against the fastest float at each batch size ({names}), int8 is {'; '.join(found)}{unclear}: {range_}."


def over_fp32(evidence: Evidence) -> str:
    """The speed-up over the registered fp32 program, as a user loads it."""
    return f"Over the registered fp32 program, int8 is {_from_to(evidence.speedups)} as fast."


def _where(sizes: Sequence[int], all_sizes: int) -> str:
    return "at every batch size" if len(sizes) == all_sizes else f"at batch size {join(sizes)}"


def shortcomings(evidence: Evidence) -> list[str]:
    """Why no verdict rests on these times, if none does."""
    return [f"**No verdict rests on these times**: {reason}." for reason in evidence.latency.shortcomings]


def _others(evidence: Evidence) -> list[str]:
    """What the rest of the machine did."""
    found = [row.activity for row in evidence.latency.rows if row.activity]
    if not found:
        return []
    wall, own, others = (sum(getattr(one, name) for one in found) for name in ("wall_s", "own_cpu_s", "others_cpu_s"))
    most = max(one.busy_percent for one in found)
    return [
        f"In {wall:.0f} s of wall time, the timed process used {own:.0f} s of CPU time and others {others:.0f} s on "
        f"{found[0].cores} {'core' if found[0].cores == 1 else 'cores'}; at no batch size did others take more than "
        f"{most:.1f} % of the timed cores."
    ]


def _how_timed(evidence: Evidence) -> str:
    rows = evidence.latency.rows
    rounds = [len(row.round_ms[evidence.name]) for row in rows]
    loads = [max(1, len(row.loads)) for row in rows]
    return (
        f"Wall time of one forward pass in a process of its own, {threads(evidence.latency.threads)}. All models are "
        f"loaded anew {span(loads)} times for each batch size and take turns in {span(rounds)} short rounds in random "
        f"order. A ratio is the geometric mean over the loads of the median of their rounds, with "
        f"{interval(rows)}. {_noise(rows)}"
    )


def interval(rows: Sequence[LatencyRow]) -> str:
    """What the two values beside a ratio are."""
    if all(row.enough for row in rows):
        return f"its {100 * CONFIDENCE:.0f} % interval (Student's t over the loads)"
    return f"an interval that fewer than {FEWEST_ROUNDS} rounds in {FEWEST_LOADS} loads do not support"


def _noise(rows: Sequence[LatencyRow]) -> str:
    low, high = min(row.noise.low for row in rows), max(row.noise.high for row in rows)
    return (
        f"As a control, an int8 model took {low:.2f} to {high:.2f} times as long as a second copy of it. "
        "A model is called faster only beyond both, at a confidence that leaves 5 % for all comparisons of the sweep."
    )


def _loaded(evidence: Evidence) -> str:
    names = evidence.measured.contenders[evidence.int8.version_uri]
    if len(names) == 1:
        return "Models are loaded from the registry as `qexp.load(uri)` loads them."
    both = ", ".join(f"{name} {evidence.latency.mean_speedup(name):.2f}x" for name in names)
    ahead = all(evidence.latency.mean_ratio([other], names[0]).low > 1 for other in names[1:])
    word = "won" if ahead else "are used: no others are shown to be faster"
    return (
        f"Models are loaded from the registry; of int8 kernels, those of {names[0]} {word} (mean over fp32: {both}). "
        "`qexp.load(uri)` sets them; a plain `mlflow.pytorch.load_model` uses those of x86."
    )


def span(counts: Sequence[int]) -> str:
    """`20`, or `20 to 35`."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _from_to(ratios: Sequence[float]) -> str:
    ends = [f"{value:.2f}x" for value in (min(ratios), max(ratios))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _ends(ratio: Ratio) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def join(sizes: Sequence[int]) -> str:
    """Batch sizes in a row."""
    return ", ".join(map(str, sizes))


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'' if count == 1 else 's'}"


def three_digits(value: float | None) -> str:
    """Three significant digits, and all of those before the point; a dash where there is no value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
