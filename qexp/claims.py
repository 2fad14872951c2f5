"""Sentences of the report: each is computed from the measured values and says the opposite where that was measured."""

from qexp.evaluation import Accuracy
from qexp.evidence import Evidence, Int8Evidence
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult
from qexp.speed import busy, faster_where


def answer(evidence: Evidence) -> str:
    """The question's answer in one paragraph."""
    drop = evidence.int8.comparison["test"].top1_drop_points
    yes = evidence.gate.passed and not evidence.is_worse
    verdict = f"**{'Yes' if yes else 'No'}**: it {'passes' if evidence.gate.passed else 'does not pass'}"
    word, then = "but" if evidence.gate.passed else "and", " of then" if evidence.now_uri else ""
    but = f", {word} does not replace the champion{then}, `{evidence.before_uri}`" if evidence.is_worse else ""
    speed = " ".join([faster_where(evidence, evidence.latency.baseline), *_busy_if_that_counts(evidence)])
    return (
        f"{verdict} the gate of the configuration{but}. As int8, top-1 on the test images {changed(drop)}, and the "
        f"file is {_times(evidence.size_ratio, 'smaller', 'larger')}. {speed}"
    )


def _busy_if_that_counts(evidence: Evidence) -> list[str]:
    """A warning of stalls that may have decided: the gate has failed, or int8 is not clearly faster everywhere."""
    base = evidence.latency.baseline
    clear = all(row.compared(base, evidence.name) > 0 for row in evidence.latency.rows)
    return [] if clear and evidence.gate.passed else busy(evidence)


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
        f"during training ({best.validation_top1_percent:.2f} %); of equal ones, the lowest loss decides.",
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
        f"The two models agree on {found.agreement_percent:.2f} % of the test images. {_images(lost)} only "
        f"fp32 gets right, {_number(gained)} only int8.",
        *_ties("fp32", evidence.fp32.accuracy["test"]),
        *_ties("int8", evidence.int8.accuracy["test"]),
        "Neither training, early stopping, calibration nor search has seen a test image.",
    ]


def _ties(model: str, accuracy: Accuracy) -> list[str]:
    """Test images whose label shares its logit with other classes, which accuracy counts by expectation."""
    tied = {1: accuracy.top1_tied_images, 3: accuracy.top3_tied_images}
    return [
        f"In {model}, {count} of {accuracy.images:,} test images {'ties' if count == 1 else 'tie'} at the border of "
        f"the top {k}; ties count by expectation."
        for k, count in tied.items()
        if count
    ]


def _images(count: float) -> str:
    return f"{_number(count)} {_plural(count, 'image')}"


def _number(count: float) -> str:
    return f"{round(count):,}" if count == round(count) else f"{count:,.2f}"


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
        "leaves those of each layer as they are"
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


def gate(evidence: Evidence) -> str:
    """The gate's decision, that against the champion, and what follows from them."""
    follows = {
        (True, True): "the int8 version is `champion`",
        (True, False): "the int8 version is not `champion`: `qexp promote` decides on that",
        (False, True): "the int8 version is `champion` all the same, by an earlier decision",
        (False, False): "`champion` stays where it was",
    }
    if evidence.is_worse:
        follows[True, False] = "it does not take the champion's place"
    against = f". Against the champion {evidence.succession.summary}" if evidence.succession else ""
    return f"Gate {evidence.gate.summary}{against}; {follows[evidence.gate.passed, evidence.champion]}."


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
    return f"{ranges(result)} observer, weights {granularity}" + (
        ", range reduced by one bit" if result.reduce_range else ""
    )


def ranges(result: QuantizeResult | SensitivityResult) -> str:
    """The observer that has set the ranges, with its percentile if it is the one that has one."""
    return result.observer + (f" ({result.percentile:g} %)" if result.percentile is not None else "")


def changed(drop_points: float) -> str:
    if abs(drop_points) < 0.005:
        return "does not change"
    return f"{'falls' if drop_points > 0 else 'rises'} by {abs(drop_points):.2f} points"


def _times(ratio: float, above: str, below: str) -> str:
    if abs(ratio - 1) < 0.005:
        return f"not {above}"
    return f"{ratio:.2f}x {above}" if ratio > 1 else f"{1 / ratio:.2f}x {below}"


def _plural(count: float, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _macs_text(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
