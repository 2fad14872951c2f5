"""Sentences of the report: each is computed from the measured values and says the opposite where that was measured."""

from collections.abc import Sequence
from itertools import pairwise

from qexp.evidence import Evidence, Int8Evidence
from qexp.latency import FEWEST_PAIRS, LatencyRow, LatencyStats
from qexp.quantization.result import QuantizeResult

NOISY_TAIL = 1.5  # p90 over p50; 1.0 to 1.2 on a quiet machine
SAME_SPEED = 0.05  # speed-ups within 5 % of 1 are called equal: the noise of a quiet machine


def answer(evidence: Evidence) -> str:
    """The question's answer in one paragraph."""
    drop, speed = evidence.int8.comparison["test"].top1_drop_points, _faster_where(evidence, evidence.latency.baseline)
    verdict = "**Yes**: it passes" if evidence.gate.passed else "**No**: it does not pass"
    return (
        f"{verdict} the gate of the configuration. As int8, top-1 on the test images {changed(drop)}, and the "
        f"file is {_times(evidence.size_ratio, 'smaller', 'larger')}. {speed}"
    )


def training(evidence: Evidence) -> list[str]:
    """How training went, and how far the kept weights fit the training images better than the test images."""
    train = evidence.fp32.train
    last = len(train.epochs)
    end = "early stopping ended it" if train.stopped_early else "it ran to the configured number of epochs"
    best = train.epochs[train.best_epoch - 1]
    gap = evidence.fp32.accuracy["train"].top1_percent - evidence.fp32.accuracy["test"].top1_percent
    fit = "above" if gap >= 0 else "below"
    return [
        f"Training took {last} {_plural(last, 'epoch')} and {train.duration_s:.0f} s; {end}.",
        f"The weights of epoch {train.best_epoch} were kept, for the best validation top-1 "
        f"during training ({best.validation_top1_percent:.2f} %).",
        f"fp32 top-1 on the training images is {abs(gap):.2f} points {fit} that on the test images.",
    ]


def accuracy(evidence: Evidence) -> list[str]:
    """Drop with its interval, agreement and flips, on the test images."""
    found = evidence.int8.comparison["test"]
    low, high = found.top1_drop_low_points, found.top1_drop_high_points
    if low > 0:
        meaning = "so int8 is less accurate, more than chance explains (95 % confidence)"
    elif high < 0:
        meaning = "so int8 is more accurate, more than chance explains (95 % confidence)"
    else:
        meaning = "which includes no change at all"
    lost, gained = found.only_fp32_correct_images, found.only_int8_correct_images
    return [
        f"Quantization: top-1 on the {found.images:,} test images {changed(found.top1_drop_points)}; the "
        f"95 % interval of the drop is {low:+.2f} to {high:+.2f} points, {meaning}. "
        f"Top-3 {changed(found.top3_drop_points)}.",
        f"The two models agree on {found.agreement_percent:.2f} % of the test images. {lost} {_plural(lost, 'image')} "
        f"only fp32 gets right, {gained} only int8.",
        "Neither training, early stopping, calibration nor search has seen a test image.",
    ]


def size(evidence: Evidence) -> list[str]:
    """How the stored files compare."""
    fp32, int8 = evidence.fp32.size_bytes / 1e6, evidence.int8.size_bytes / 1e6
    ratio = _times(evidence.size_ratio, "smaller", "larger")
    return [f"The int8 model is {ratio}: {int8:.3f} MB instead of {fp32:.3f} MB, as stored in the registry."]


def macs(evidence: Evidence) -> list[str]:
    """How MACs grow with the batch, and how many run in int8."""
    cost = evidence.int8.cost
    batches = list(cost.macs)
    sentences: list[str] = []
    if len(batches) > 1:
        first, last = batches[0], batches[-1]
        exact = all(cost.macs[batch] * first == cost.macs[first] * batch for batch in batches)
        growth = "grow in proportion to the batch size" if exact else "do not grow in proportion to the batch size"
        totals = f"{_macs_text(cost.macs[first])} at {first}, {_macs_text(cost.macs[last])} at {last}"
        sentences.append(f"MACs {growth}: {totals}.")
    counted = evidence.int8.fp32_cost
    first = next(iter(counted.macs))
    kept = (
        "leaves their number as it is"
        if cost.macs == counted.macs
        else (
            f"runs after folding the pool, which cuts MACs from {_macs_text(counted.macs[first])} to "
            f"{_macs_text(cost.macs[first])} at batch size {first}"
        )
    )
    sentences.append(
        f"Quantization {kept}; {cost.int8_percent:.1f} % of the MACs of convolution and linear layers run in int8 "
        f"afterwards{_left_fp32(evidence.int8)}."
    )
    return sentences + [
        f"With engine {other.quantize.engine} it is {other.cost.int8_percent:.1f} %{_left_fp32(other)}."
        for other in (judged.int8 for judged in evidence.versions[1:])
        if other.quantize.float_layers != evidence.int8.quantize.float_layers
    ]


def _left_fp32(int8: Int8Evidence) -> str:
    left = int8.quantize.float_layers
    return f"; {len(left)} {_plural(len(left), 'layer')} stayed fp32: {', '.join(left)}" if left else ""


def latency(evidence: Evidence) -> list[str]:
    """Where int8 is faster than the registered fp32 model, how that changes with the batch, and how it was timed."""
    name, result = evidence.name, evidence.latency
    rows = sorted(result.rows, key=lambda row: row.batch_size)
    sentences = [_faster_where(evidence, result.baseline)]
    if len(rows) > 1:
        gaps = [row.stats[result.baseline].p50_ms - row.stats[name].p50_ms for row in rows]
        grows = all(later > max(0.0, earlier) * (1 + SAME_SPEED) for earlier, later in pairwise(gaps))
        change = "grows with the batch size" if grows else "does not grow with every larger batch"
        ends = f"{gaps[0]:.2f} ms at {rows[0].batch_size}, {gaps[-1]:.2f} ms at {rows[-1].batch_size}"
        sentences.append(f"The time saved per batch {change}: {ends}.")
    pair = (result.baseline, name)
    noisy = [row.batch_size for row in rows if max(_tail(row.stats[one]) for one in pair) > NOISY_TAIL]
    if noisy:
        worst = max(_tail(row.stats[one]) for row in rows for one in pair)
        sentences.append(
            f"**The machine was busy**: at batch size {', '.join(map(str, noisy))} p90 is up to {worst:.1f} times p50. "
            "Measure again on a quiet machine before deciding on these speed-ups."
        )
    return [*sentences, _how_timed(evidence)]


def _how_timed(evidence: Evidence) -> str:
    rows = evidence.latency.rows
    rounds = [len(row.round_ms[evidence.name]) for row in rows]
    return (
        f"Wall time of one forward pass in a process of its own, {threads(evidence.latency.threads)}, all models in "
        f"{_span(rounds)} short rounds in random order; a speed-up is the median of the rounds' ratios, with "
        f"{interval(rounds)}. An int8 model against a second copy of itself gave {_noise(rows)}; the table marks "
        f"differences within that range. {_loaded(evidence)}."
    )


def _faster_where(evidence: Evidence, other: str) -> str:
    """Where the chosen int8 model is faster than another, slower, or cannot be told apart from it."""
    rows = sorted(evidence.latency.rows, key=lambda row: row.batch_size)
    told = {row.batch_size: row.compared(other, evidence.name) for row in rows}
    ratios = [row.ratio(other, evidence.name).median for row in rows]
    for word, sign in (("faster", 1), ("slower", -1)):
        if all(found == sign for found in told.values()):
            return f"int8 is {word} than {other} at every batch size: {_range(ratios)}."
    groups = ((1, "faster than {}"), (-1, "slower than {}"), (0, "indistinguishable from {} within the noise"))
    named = [
        f"{words.format(other)} at batch size {', '.join(str(size) for size, found in told.items() if found == sign)}"
        for sign, words in groups
        if sign in told.values()
    ]
    return f"int8 is {'; '.join(named)}."


def interval(rounds: Sequence[int]) -> str:
    """What the two values beside a speed-up are, after so many rounds at each batch size."""
    if min(rounds) < FEWEST_PAIRS:
        return f"the smallest and the largest ({FEWEST_PAIRS} rounds make a 95 % interval)"
    return "its 95 % interval"


def _noise(rows: Sequence[LatencyRow]) -> str:
    low, high = min(row.noise.low for row in rows), max(row.noise.high for row in rows)
    return f"{low:.2f}x to {high:.2f}x"


def _span(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def gate(evidence: Evidence) -> str:
    """The gate's decision and what follows from it."""
    follows = {
        (True, True): "the int8 version is `champion`",
        (True, False): "the int8 version is not `champion`: `qexp promote` moves that alias",
        (False, True): "the int8 version is `champion` all the same, by an earlier decision",
        (False, False): "`champion` stays where it was",
    }
    return f"Gate {evidence.gate.summary}; {follows[evidence.gate.passed, evidence.champion]}."


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {_plural(count, 'thread')}"


def training_pace(evidence: Evidence) -> str:
    """Epochs, wall time, device, processes and stops if there were any, precision and peak learning rate."""
    train = evidence.fp32.train
    epochs = f"{len(train.epochs)} {_plural(len(train.epochs), 'epoch')}"
    precision = "bf16 autocast" if train.bf16 else "fp32"
    several = f", {train.processes} processes" if train.processes > 1 else ""
    stops = f", resumed {train.times_resumed} {_plural(train.times_resumed, 'time')}" if train.times_resumed else ""
    pace = f"{epochs} in {train.duration_s:.0f} s on {train.device.upper()}{several}{stops}"
    return f"{pace}, {precision}, peak learning rate {train.peak_learning_rate:g}"


def quantization(result: QuantizeResult) -> str:
    """Observer, granularity and range of a quantization."""
    granularity = "per channel" if result.per_channel else "per layer"
    return f"{result.observer} observer, weights {granularity}" + (
        ", range reduced by one bit" if result.reduce_range else ""
    )


def three_digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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


def changed(drop_points: float) -> str:
    if abs(drop_points) < 0.005:
        return "does not change"
    return f"{'falls' if drop_points > 0 else 'rises'} by {abs(drop_points):.2f} points"


def _times(ratio: float, above: str, below: str) -> str:
    if abs(ratio - 1) < 0.005:
        return f"not {above}"
    return f"{ratio:.2f}x {above}" if ratio > 1 else f"{1 / ratio:.2f}x {below}"


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


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _macs_text(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
