"""Sentences of the report: each is computed from the measured values and says the opposite where that was measured."""

from collections.abc import Sequence
from itertools import pairwise

from qexp.evidence import Evidence
from qexp.latency import LatencyStats
from qexp.quantization.result import QuantizeResult

NOISY_TAIL = 1.5  # p90 over p50; 1.0 to 1.2 on a quiet machine
SAME_SPEED = 0.05  # speed-ups within 5 % of 1 are called equal: the noise of a quiet machine


def answer(evidence: Evidence) -> str:
    """The question's answer in one paragraph."""
    drop = evidence.int8.comparison["test"].top1_drop_points
    speedups = [row.speedup for row in evidence.latency.rows]
    verdict = "**Yes**: it passes" if evidence.gate.passed else "**No**: it does not pass"
    return (
        f"{verdict} the gate of the configuration. As int8, top-1 on the test images {_changed(drop)}, the "
        f"file is {_times(evidence.size_ratio, 'smaller', 'larger')}, and inference is {_range(speedups)}."
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
        meaning = "so int8 is less accurate, beyond what chance in the choice of images explains"
    elif high < 0:
        meaning = "so int8 is more accurate, beyond what chance in the choice of images explains"
    else:
        meaning = "which includes no change at all"
    lost, gained = found.only_fp32_correct_images, found.only_int8_correct_images
    return [
        f"Quantization: top-1 on the {found.images:,} test images {_changed(found.top1_drop_points)}; the "
        f"95 % interval of the drop is {low:+.2f} to {high:+.2f} points, {meaning}. "
        f"Top-3 {_changed(found.top3_drop_points)}.",
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
    sentences = []
    if len(batches) > 1:
        first, last = batches[0], batches[-1]
        exact = all(cost.macs[batch] * first == cost.macs[first] * batch for batch in batches)
        growth = "grow in proportion to the batch size" if exact else "do not grow in proportion to the batch size"
        totals = f"{_macs_text(cost.macs[first])} at {first}, {_macs_text(cost.macs[last])} at {last}"
        sentences.append(f"MACs {growth}: {totals}.")
    left = evidence.int8.quantize.float_layers
    names = f"; {len(left)} {_plural(len(left), 'layer')} stayed fp32: {', '.join(left)}" if left else ""
    sentences.append(
        f"Quantization leaves their number as it is; {cost.int8_percent:.1f} % of the MACs of convolution and linear "
        f"layers run in int8 afterwards{names}."
    )
    return sentences


def latency(evidence: Evidence) -> list[str]:
    """Where int8 is faster, and how the advantage changes with the batch."""
    rows = sorted(evidence.latency.rows, key=lambda row: row.batch_size)
    faster = [row.batch_size for row in rows if row.speedup > 1 + SAME_SPEED]
    slower = [row.batch_size for row in rows if row.speedup < 1 - SAME_SPEED]
    level = [row.batch_size for row in rows if row.batch_size not in faster + slower]
    if len(faster) == len(rows):
        first = f"int8 is faster at every batch size: {_range([row.speedup for row in rows])}."
    elif len(slower) == len(rows):
        first = f"int8 is slower at every batch size: {_range([row.speedup for row in rows])}."
    else:
        groups = (("faster", faster), ("slower", slower), ("as fast as fp32 within 5 %", level))
        named = [f"{word} at batch size {', '.join(map(str, sizes))}" for word, sizes in groups if sizes]
        first = f"int8 is {'; '.join(named)}."
    sentences = [first]
    if len(rows) > 1:
        gaps = [row.fp32.p50_ms - row.int8.p50_ms for row in rows]
        grows = all(later > max(0.0, earlier) * (1 + SAME_SPEED) for earlier, later in pairwise(gaps))
        change = "grows with every larger batch" if grows else "does not grow with every larger batch"
        ends = f"{gaps[0]:.2f} ms at {rows[0].batch_size}, {gaps[-1]:.2f} ms at {rows[-1].batch_size}"
        sentences.append(f"The time saved a batch {change}: {ends}.")
    noisy = [row.batch_size for row in rows if max(_tail(row.fp32), _tail(row.int8)) > NOISY_TAIL]
    if noisy:
        worst = max(max(_tail(row.fp32), _tail(row.int8)) for row in rows)
        sentences.append(
            f"**The machine was busy**: at batch size {', '.join(map(str, noisy))} p90 is up to {worst:.1f} times p50. "
            "Measure again on a quiet machine before deciding on these speed-ups."
        )
    least = min(row.fp32.repeats for row in rows)
    sentences.append(
        f"Wall time of one forward pass, both models in turn in a process of its own, "
        f"{threads(evidence.latency.threads)}, at least {least} repeats each, {_loaded(evidence)}."
    )
    return sentences


def gate(evidence: Evidence) -> str:
    """The gate's decision and what follows from it."""
    follows = {
        (True, True): "the int8 version is `champion`",
        (True, False): "the int8 version is not `champion`: only `qexp run` moves that alias",
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


def _tail(stats: LatencyStats) -> float:
    return stats.p90_ms / stats.p50_ms


def _loaded(evidence: Evidence) -> str:
    if evidence.int8.quantize.load_backend in (None, "x86"):
        return "loaded from the registry as `mlflow.pytorch.load_model` loads them"
    backend = evidence.int8.quantize.backend
    return f"loaded from the registry by `qexp.load`, which sets the {backend} kernels (a plain load uses x86)"


def _changed(drop_points: float) -> str:
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
