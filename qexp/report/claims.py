"""Sentences of the report: each is computed from the measured values and says the opposite where that was measured."""

from qexp.measurement.accuracy import Accuracy
from qexp.measurement.cost import TORCHINFO
from qexp.measurement.host import Host
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import speed
from qexp.report.results import DataFacts, Evidence, Int8Evidence
from qexp.report.speed import faster_where, over_fp32


def answer(evidence: Evidence) -> str:
    """The question's answer in one paragraph."""
    drop = evidence.int8.comparison["test"].top1_drop_points
    return (
        f"{verdict(evidence)} As int8, top-1 on the test images {changed(drop)}, and the file is "
        f"{_times(evidence.size_ratio, 'smaller', 'larger')}. {faster_where(evidence)} {over_fp32(evidence)}"
    )


def verdict(evidence: Evidence) -> str:
    """The one verdict, what to ship, and the limit that decided."""
    found = evidence.verdict
    ship = f" Ship `{found.ship}`." if found.ship else ""
    stays = ""
    if found.ships_int8 and evidence.champion_stays and evidence.succession:
        why = "; ".join(evidence.succession.reasons)
        stays = f" It is the champion, which stays: {why}."
        if not evidence.succession.compared:
            stays = f" It was not compared with the champion, `{evidence.before_uri}`, which stays: {why}."
    elif found.ships_int8 and evidence.better:
        stays = f" It was timed beside this version, passes the gate too, and is faster ({evidence.better.name})."
    return f"**{found.word.capitalize()}**: {found.reason}.{ship}{stays}"


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
        *_seen_before(evidence.fp32.data),
    ]


def _seen_before(data: DataFacts) -> list[str]:
    """What the counts of equal images say about these figures."""
    found = data.duplicates
    if found is None:
        return ["Whether test images are among the training images was not counted."]
    if warning := found.warning(data.test_images):
        count, _, rest = warning.partition(" equal ")
        sentences = [
            f"**{count} equal {rest}** ({found.test_in_training} a training image, of which calibration takes its own; "
            f"{found.test_in_validation} a validation image)."
        ]
    else:
        sentences = [
            "No test image equals a training or validation image, pixel by pixel after decoding; calibration images "
            "are training images."
        ]
    if found.validation_in_training:
        sentences.append(
            f"{found.validation_in_training:,} of {data.validation_images:,} validation images equal a training image: "
            "on these, early stopping, budget and search judge what training has seen."
        )
    if twice := found.labelled_twice:
        have = "image is" if twice == 1 else "images are"
        sentences.append(f"{twice:,} {have} in the data set with several labels: no model gets all of these right.")
    return sentences


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
    sentences = [f"The int8 model is {ratio}: {int8:.3f} MB instead of {fp32:.3f} MB, as stored in the registry."]
    before, after = evidence.fp32.contents, evidence.int8.contents
    if before and after:
        alone = _times(before.weights_bytes / after.weights_bytes, "smaller", "larger")
        sentences.append(
            f"The weights alone (with biases, scales and statistics) are {alone}: {after.weights_bytes / 1e6:.3f} MB "
            f"instead of {before.weights_bytes / 1e6:.3f} MB. The rest is the formats': code, metadata and container."
        )
    return sentences


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
    of_all = "the MACs of convolution and linear layers" if cost.counted_by == TORCHINFO else "all MACs"
    sentences.append(
        f"Quantization {kept}; {cost.int8_percent:.1f} % of {of_all} run in int8 afterwards{_left_fp32(evidence.int8)}."
    )
    if cost.no_layer_percent > 0:
        sentences.append(
            f"{cost.no_layer_percent:.1f} % of them belong to no layer with weights (inside attention, activations are "
            "multiplied by each other): they are not counted as int8, whatever an engine does with them."
        )
    if cost.counted_by == TORCHINFO:
        sentences.append(
            "These MACs were counted by an earlier version with torchinfo: with bias and batch norm, but of a linear "
            "layer on tokens only one, and nothing of attention."
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
    if evidence.champion:
        follows = "the int8 version is `champion`"
        follows += "" if evidence.gate.passed else " all the same, by an earlier decision"
    elif evidence.gate.passed and not evidence.champion_stays:
        follows = "the int8 version is not `champion`: `qexp promote` decides on that"
    else:
        follows = "`champion` stays where it was"
    against = f". Against the champion: {evidence.succession.summary}" if evidence.succession else ""
    return f"Gate {evidence.gate.summary}{against}; {follows}."


def training_pace(evidence: Evidence) -> str:
    """Epochs, wall time, device, processes and stops if there were any, how the steps were computed, and the recipe."""
    train = evidence.fp32.train
    epochs = f"{len(train.epochs)} {_plural(len(train.epochs), 'epoch')}"
    precision = "bf16 autocast" if train.bf16 else "fp32"
    several = f", {train.processes} processes" if train.processes > 1 else ""
    stops = f", resumed {train.times_resumed} {_plural(train.times_resumed, 'time')}" if train.times_resumed else ""
    pace = f"{epochs} in {train.duration_s:.0f} s on {train.device.upper()}{several}{stops}"
    if not train.threads:  # of an earlier version, which did not record it
        return f"{pace}, {precision}, peak learning rate {train.peak_learning_rate:g}"
    layout = "channels-last" if train.channels_last else "contiguous"
    how = f"{precision} on {speed.threads(train.threads)}, {layout}" + (", as timed" if train.trials else "")
    skipped = f", {train.skipped_steps} steps skipped" if train.skipped_steps else ""
    return f"{pace}, {how}; {train.optimizer}, peak learning rate {train.peak_learning_rate:g}{skipped}"


def processor(host: Host, threads: int) -> str:
    """CPU, cores, quota, threads and memory of a machine."""
    cores = f"{host.cores} {_plural(host.cores, 'logical CPU')}"
    if host.physical_cores is not None:
        cores += f" on {host.physical_cores} {_plural(host.physical_cores, 'core')}"
        cores += f", quota of {host.cpu_quota:g} CPUs" if host.cpu_quota else ", no CPU quota"
    return f"{host.cpu}, {cores}, {speed.threads(threads)}, {host.memory_gb:g} GB"


def quantization(result: QuantizeResult) -> str:
    """Observer, granularity and range of a quantization."""
    granularity = "per channel" if result.per_channel else "per layer"
    reduced = ""
    if result.reduce_range:
        reduced = ", range reduced by one bit"
    elif result.saturating_layers:
        reduced = f", range of the weights of {len(result.saturating_layers)} layers reduced by one bit"
    return f"{ranges(result)} observer, weights {granularity}{reduced}"


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
