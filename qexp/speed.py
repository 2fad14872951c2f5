"""Sentences of the report on latency: computed from the measured values, with the noise held against them."""

from collections.abc import Sequence
from itertools import pairwise

from qexp.evidence import Evidence
from qexp.latency import FEWEST_PAIRS, LatencyRow, LatencyStats

NOISY_TAIL = 1.5  # p90 over p50; 1.0 to 1.2 on a quiet machine
SAME_SPEED = 0.05  # speed-ups within 5 % of 1 are called equal: the noise of a quiet machine


def latency(evidence: Evidence) -> list[str]:
    """Where int8 is faster than the registered fp32 model, how that changes with the batch, and how it was timed."""
    name, result = evidence.name, evidence.latency
    rows = sorted(result.rows, key=lambda row: row.batch_size)
    sentences = [faster_where(evidence, result.baseline)]
    if len(rows) > 1:
        gaps = [row.stats[result.baseline].p50_ms - row.stats[name].p50_ms for row in rows]
        grows = all(later > max(0.0, earlier) * (1 + SAME_SPEED) for earlier, later in pairwise(gaps))
        change = "grows with the batch size" if grows else "does not grow with the batch size"
        if gaps[-1] > max(0.0, gaps[0]) * (1 + SAME_SPEED) and not grows:
            change = "grows with the batch size, though not with every larger batch"
        ends = f"{gaps[0]:.2f} ms at {rows[0].batch_size}, {gaps[-1]:.2f} ms at {rows[-1].batch_size}"
        sentences.append(f"The time saved per batch {change}: {ends}.")
    return [*sentences, *busy(evidence), _how_timed(evidence)]


def busy(evidence: Evidence) -> list[str]:
    """A warning where fp32 or int8 stalled often: the noise, of int8 alone, may not show it."""
    tails = {
        row.batch_size: max(_tail(row.stats[name]) for name in (evidence.latency.baseline, evidence.name))
        for row in sorted(evidence.latency.rows, key=lambda row: row.batch_size)
    }
    noisy = [size for size, tail in tails.items() if tail > NOISY_TAIL]
    where = f"at batch size {', '.join(map(str, noisy))} p90 is up to {max(tails.values()):.1f} times p50"
    advice = "Measure again on a quiet machine before deciding on these speed-ups."
    return [f"**The machine was busy**: {where}. {advice}"] if noisy else []


def _how_timed(evidence: Evidence) -> str:
    rows = evidence.latency.rows
    rounds = [len(row.round_ms[evidence.name]) for row in rows]
    return (
        f"Wall time of one forward pass in a process of its own, {threads(evidence.latency.threads)}, all models in "
        f"{span(rounds)} short rounds in random order; a speed-up is the median of the rounds' ratios, with "
        f"{interval(rounds)}. An int8 model against a second copy of itself gave {_noise(rows)}; the table marks "
        f"differences that are no larger, either way. {_loaded(evidence)}."
    )


def faster_where(evidence: Evidence, other: str) -> str:
    """Where the chosen int8 model is faster than another, slower, or cannot be told apart from it."""
    rows = sorted(evidence.latency.rows, key=lambda row: row.batch_size)
    told = {row.batch_size: row.compared(other, evidence.name) for row in rows}
    ratios = [row.ratio(other, evidence.name).median for row in rows]
    for word, sign in (("faster", 1), ("slower", -1)):
        if all(found == sign for found in told.values()):
            return f"int8 is {word} than {other} at every batch size: {_range(ratios)}."
    few = f"not told apart from {{}} by fewer than {FEWEST_PAIRS} rounds (`--min-repeats`)"
    neither = few if too_few(evidence) else "indistinguishable from {} within the noise"
    groups = ((1, "faster than {}"), (-1, "slower than {}"), (0, neither))
    named = [
        f"{words.format(other)} at batch size {', '.join(str(size) for size, found in told.items() if found == sign)}"
        for sign, words in groups
        if sign in told.values()
    ]
    return f"int8 is {'; '.join(named)}."


def too_few(evidence: Evidence) -> bool:
    """Whether some batch size has fewer rounds than it takes to tell two models apart."""
    return min(len(row.round_ms[evidence.name]) for row in evidence.latency.rows) < FEWEST_PAIRS


def interval(rounds: Sequence[int]) -> str:
    """What the two values beside a speed-up are, after so many rounds at each batch size."""
    if min(rounds) < FEWEST_PAIRS:
        return f"the smallest and the largest ({FEWEST_PAIRS} rounds make a 95 % interval)"
    return "its 95 % interval"


def _noise(rows: Sequence[LatencyRow]) -> str:
    low, high = min(row.noise.low for row in rows), max(row.noise.high for row in rows)
    return f"{low:.2f}x to {high:.2f}x"


def span(counts: Sequence[int]) -> str:
    """`20`, or `20 to 35`."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _tail(stats: LatencyStats) -> float:
    return stats.p90_ms / stats.p50_ms


def _loaded(evidence: Evidence) -> str:
    names = evidence.measured.contenders[evidence.int8.version_uri]
    if len(names) == 1:
        return "Models are loaded from the registry as `qexp.load(uri)` loads them"
    both = ", ".join(f"{name} {evidence.latency.mean_speedup(name):.2f}x" for name in names)
    ahead = all(sum(row.compared(names[0], other) for row in evidence.latency.rows) < 0 for other in names[1:])
    word = "won" if ahead else "are used: no others are faster beyond the noise"
    return (
        f"Models are loaded from the registry; of int8 kernels, those of {names[0]} {word} (mean over fp32: {both}). "
        "`qexp.load(uri)` sets them; a plain `mlflow.pytorch.load_model` uses those of x86"
    )


def _range(speedups: Sequence[float]) -> str:
    """How fast int8 is over all batch sizes, in the words of `latency`: within 5 % is as fast."""
    low, high = min(speedups), max(speedups)
    if low > 1 + SAME_SPEED:
        return f"{_from_to(low, high)} faster"
    if high < 1 - SAME_SPEED:
        return f"{_from_to(1 / high, 1 / low)} slower"
    return f"{_from_to(low, high)} as fast as fp32"


def _from_to(low: float, high: float) -> str:
    ends = [f"{low:.2f}x", f"{high:.2f}x"]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
