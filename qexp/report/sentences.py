"""Every sentence of the report. Each is computed from `Evidence`, and says the opposite where that was measured.

The template (templates/report.md.j2) puts them in order; the note of a run begins with `answer`.
"""

from collections.abc import Sequence
from itertools import pairwise

from qexp.foundation.waiting import PASSIVE
from qexp.measurement.accuracy import Accuracy, share_interval
from qexp.measurement.cost import TORCHINFO, Cost
from qexp.measurement.gate import AGREEMENT, DROP, SIZE, SPEED, TOP1, VERIFIED
from qexp.measurement.host import Host
from qexp.measurement.latency import CONFIDENCE, FEWEST_LOADS, FEWEST_ROUNDS, LatencyResult, LatencyRow, Ratio
from qexp.measurement.sweep_models import (
    BASELINE,
    BF16,
    BF16_COMPILED,
    BF16_OPENVINO,
    EAGER,
    FP32_COMPILED,
    FP32_OPENVINO,
    backend_in,
    rounds,
    rounds_like,
    unfolded,
)
from qexp.measurement.throughput import KINDS
from qexp.measurement.verdict import KEEP_FLOAT, NOT_TRAINED, SIZE_ONLY, UNMEASURED
from qexp.models.names import ONNXRUNTIME, OPENVINO_BF16, RUNTIME_NAMES
from qexp.models.preprocessing import Preprocessing
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult, beyond_chance
from qexp.report.hosts import notes
from qexp.report.hosts import several_kinds as several_kinds
from qexp.report.results import DataFacts, Evidence, Int8Evidence, ThroughputEvidence

SAME_SPEED = 0.05  # times saved that differ by less than 5 % do not grow
FOLDED_AWAY = ", with the pool folded into the linear layer after it"
FLOATS = {
    BASELINE: "the registered fp32 version, a program exported by PyTorch",
    EAGER: "the fp32 model in PyTorch's eager mode",
    "fp32_traced": "the fp32 model, traced and frozen by TorchScript",
    BF16: "the model traced and frozen by TorchScript, computed in bf16",
    "fp32_onnx": "the fp32 model exported to ONNX and run by ONNX Runtime",
    FP32_COMPILED: "the fp32 model, compiled by torch for each batch size with its weights frozen",
    BF16_COMPILED: "the model in bf16, compiled by torch for each batch size with its weights frozen",
    FP32_OPENVINO: "the fp32 model as an ONNX file, run by OpenVINO",
    BF16_OPENVINO: "the fp32 model as an ONNX file, run by OpenVINO in bf16",
}
KERNELS = {"onednn": "oneDNN's", "x86": "the default", "": "the default"}
ENGINES = {"fx": "PyTorch's FX graph mode", "pt2e": "PyTorch 2 export, torchao", "onnx": "ONNX Runtime"}
FAILED_LIMITS = {
    DROP: "its drop in top-1 is not shown to be within the limit",
    SIZE: "its file is not small enough",
    SPEED: "it is not shown to be fast enough",
    TOP1: "its top-1 is not shown to be high enough",
    AGREEMENT: "it does not agree with fp32 on enough images",
    VERIFIED: "a model gives other outputs after it is reloaded",
}


# The verdict


def answer(evidence: Evidence) -> str:
    """The question's answer in one paragraph."""
    drop = evidence.int8.comparison["test"].top1_drop_points
    size = times(evidence.size_ratio, "smaller", "larger")
    parts = [
        verdict(evidence),
        f"As int8, top-1 on the test images {changed(drop)}, and the file is {size}.",
        *faster_where(evidence),
    ]
    return " ".join(parts)


def verdict(evidence: Evidence) -> str:
    """The one verdict, what it rests on, and what to ship."""
    word = evidence.verdict.word
    why = {NOT_TRAINED: _not_trained, UNMEASURED: _unmeasured, KEEP_FLOAT: _keep_float}.get(word, _ship_int8)
    return f"**{word.capitalize()}.** {why(evidence)}"


def _not_trained(evidence: Evidence) -> str:
    fp32 = evidence.fp32.accuracy["test"]
    low, high = share_interval(fp32.top1_percent, fp32.images)
    return (
        f"The fp32 model is not shown to be better than guessing: its top-1 on the test images is "
        f"{fp32.top1_percent:.2f} % (95 % interval {low:.2f} to {high:.2f}), and always naming the most frequent class "
        f"gives {evidence.fp32.data.guess:.2f} %."
    )


def _unmeasured(evidence: Evidence) -> str:
    return f"The times do not support a verdict: {'; '.join(evidence.gate.reasons)}."


def _keep_float(evidence: Evidence) -> str:
    failed = [FAILED_LIMITS[limit] for limit in evidence.gate.failed_limits] or evidence.gate.reasons
    best, uri = evidence.latency.winner(evidence.floats), evidence.fp32.version_uri
    use = f"The fastest float model is `{uri}`."
    if best != evidence.latency.baseline:
        made = explained(evidence).get(best, "a float model")
        use = f"The fastest float model is `{best}`: {made}, with the weights of `{uri}`."
    return f"`{evidence.int8.version_uri}` fails the gate: {join(failed)}. {use}"


def _ship_int8(evidence: Evidence) -> str:
    uri, stays = evidence.int8.version_uri, evidence.succession if evidence.champion_stays else None
    found = _small(evidence) if evidence.verdict.word == SIZE_ONLY else _fast(evidence)
    if stays and not stays.compared:
        return f"{found} It was not compared with the champion, `{evidence.before_uri}`, which stays: {_why(evidence)}."
    if stays and evidence.now_uri:
        return (
            f"Take `{evidence.verdict.ship}`, the present champion. {found} It did not replace "
            f"`{evidence.before_uri}`, the champion of that time: {_why(evidence)}."
        )
    if stays:
        take = f"Take `{evidence.verdict.ship}`, which stays champion."
        return f"{take} {found} It does not replace the champion: {_why(evidence)}."
    if better := evidence.better:
        return (
            f"Take `{better.int8.version_uri}` (`{better.name}`), which was timed together with `{uri}` and passes the "
            f"gate too. `{evidence.name}` is not the best: {evidence.choice.not_chosen[evidence.name]}. {found}"
        )
    return found


def _why(evidence: Evidence) -> str:
    """Why the champion stays; its name is said already."""
    reasons = evidence.succession.reasons if evidence.succession else ()
    return "; ".join(reason.removeprefix(f"beside {evidence.before_uri}: ") for reason in reasons)


def _fast(evidence: Evidence) -> str:
    return f"`{evidence.int8.version_uri}` passes the gate and is {_mean(evidence)}."


def _small(evidence: Evidence) -> str:
    """What stands behind `ship int8 for its size only`."""
    ratio = evidence.over_floats(evidence.name)
    how = "slower than" if ratio.high < 1 else "not shown to be faster than" if ratio.low <= 1 else "faster than"
    passed = "passes the gate" if evidence.gate.passed else "fails the gate only by its limit on speed"
    slow = f"on average it is {how} the fastest float model: {_mean(evidence, of='')}."
    if evidence.gate.passed:
        limit = ""
    else:
        least = evidence.latency.least_speedup(evidence.name, evidence.floats)
        limit = f" The limit is missed most clearly at batch size {least.batch_size}; with `--min-speedup 0` it passes."
    smaller = times(evidence.size_ratio, "smaller", "larger")
    but = "and" if ratio.low > 1 else "but"
    return f"`{evidence.int8.version_uri}` {passed}. Its file is {smaller}, {but} {slow}{limit}{_if_time(evidence)}"


def _if_time(evidence: Evidence) -> str:
    """What else to take, where int8 is not shown to be faster."""
    if evidence.over_floats(evidence.name).low > 1:
        return ""
    best = evidence.latency.winner(evidence.floats)
    made = explained(evidence).get(best, "a float model")
    return f" If time matters more than size, take `{best}`: {made}."


def _mean(evidence: Evidence, of: str = " as the fastest float model") -> str:
    """The speed-up over the fastest float model as one figure."""
    ratio = evidence.over_floats(evidence.name)
    weighted = "weighted" if evidence.latency.weights else "geometric"
    return f"{ratio.median:.2f}x as fast{of} ({weighted} mean over the batch sizes, {_interval(ratio)})"


def alias(evidence: Evidence) -> str:
    """Whether the chosen version has the alias `champion`; empty where the verdict says that another one keeps it."""
    uri, found = evidence.int8.version_uri, evidence.succession
    if evidence.champion and not evidence.gate.passed:
        return f"`{uri}` has the registry alias `champion` by an earlier decision, though it does not pass this gate."
    if evidence.champion and found and found.replaces:
        return f"`{uri}` has the registry alias `champion` now; it replaces `{evidence.before_uri}`: {_why(evidence)}."
    if evidence.champion:
        return f"`{uri}` has the registry alias `champion`."
    if evidence.champion_stays and evidence.verdict.ships_int8:
        return ""
    if evidence.gate.passed and not evidence.champion_stays:
        return f"`{uri}` does not have the registry alias `champion`; `qexp promote` decides that."
    return f"`{uri}` does not get the registry alias `champion`."


# The models


def explained(evidence: Evidence) -> dict[str, str]:
    """What each model of the sweep is, by its name in the latency table."""
    floats = [name for name in evidence.latency.rows[0].stats if unfolded(name) in FLOATS]
    found = {name: FLOATS[unfolded(name)] + ("" if name == unfolded(name) else FOLDED_AWAY) for name in floats}
    versions = {judged.int8.version_uri: judged.int8.quantize for judged in evidence.versions}
    for uri, names in evidence.measured.names.items():
        quantize = versions.get(uri)
        engine = quantize.engine if quantize else None
        made = f", quantized by engine {engine} ({ENGINES[engine]})" if engine in ENGINES else ""
        made += FOLDED_AWAY if quantize and quantize.folded else ""
        for name in names:
            backend = backend_in(name, engine) if engine else None
            kernels = ""
            if engine == "onnx" and len(names) > 1:
                kernels = f", run by {RUNTIME_NAMES[backend or ONNXRUNTIME]}"
                kernels += ", which computes in bf16 what is not int8" if backend == OPENVINO_BF16 else ""
            elif engine and len(names) > 1:
                kernels = f", with {KERNELS.get(backend or '', backend)} kernels"
            found[name] = f"the int8 version `{uri}`{made}{kernels}"
    return {name: found[name] for name in evidence.latency.rows[0].stats if name in found}


# Training


def training(evidence: Evidence) -> list[str]:
    """How training went, and how much better the weights fit the training images than the test images; or that there
    was none, and what was assumed of the model."""
    if (train := evidence.fp32.train) is None:
        return _trained_elsewhere(evidence)
    last = len(train.epochs)
    epochs = f"{last} {_plural(last, 'epoch')} ({train.duration_s:,.0f} s)"
    end = f"Early stopping ended training after {epochs}"
    best = train.epochs[train.best_epoch - 1]
    reached = [epoch for epoch in train.epochs if epoch.validation_top1_percent == best.validation_top1_percent]
    lowest = "; of the epochs that reached it, it has the lowest validation loss" if len(reached) > 1 else ""
    gap = evidence.fp32.accuracy["train"].top1_percent - evidence.fp32.accuracy["test"].top1_percent
    fit = "higher" if gap >= 0 else "lower"
    return [
        f"{end if train.stopped_early else f'Training ran for the configured {epochs}'}.",
        f"The weights are those of epoch {train.best_epoch}, which has the best validation top-1 "
        f"({best.validation_top1_percent:.2f} %){lowest}.",
        f"With these weights, top-1 is {abs(gap):.2f} points {fit} on the training images than on the test images.",
    ]


def _trained_elsewhere(evidence: Evidence) -> list[str]:
    """Where the model comes from, and what it is given, which decides its accuracy."""
    said = [f"The model was trained elsewhere: {_source(evidence, digests=False)}."]
    if found := evidence.fp32.preprocessing:
        said.append(f"It was given {preprocessing(found)}.")
    if evidence.verdict.word == NOT_TRAINED:
        said.append(
            "Its accuracy on the test images is near chance: the preprocessing or the order of the classes may be "
            "another one than it was trained with (`--preprocess`, `--mean`, `--std`, `--resize`, `--crop`, "
            "`--channels`, `--input-range`, `--classes`)."
        )
    return said


def preprocessing(found: Preprocessing) -> str:
    """How an image becomes the input of a model that was trained elsewhere, in words."""
    size = f"{found.height_px} x {found.width_px} px"
    resized = f"resized to {size}"
    if found.resize_px:
        resized = f"resized to a short side of {found.resize_px} px, of which the middle, {size}, is cropped"
    colours = {"rgb": "RGB", "bgr": "BGR", "grey": "grey"}[found.channels]
    low, high = found.input_range
    scale = f"values from {low:g} to {high:g}"
    if found.mean and found.std and (any(found.mean) or set(found.std) != {1.0}):
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
        scale += f", minus the mean {mean}, divided by the standard deviation {std}"
    else:
        scale += ", not normalised"
    return f"{colours} images, {resized} ({found.interpolation}), {scale}"


def _source(evidence: Evidence, digests: bool = True) -> str:
    """What is known of a model that was trained elsewhere, with the digests of its files or without."""
    facts = evidence.fp32.source.items()
    told = [(name, value) for name, value in facts if name != "trained" and (digests or not name.endswith("_sha256"))]
    return ", ".join(f"{name} `{value}`" for name, value in told)


def training_setup(evidence: Evidence) -> str:
    """Seed, device, precision, layout and recipe; or where the model was trained."""
    if (train := evidence.fp32.train) is None:
        return f"elsewhere: {_source(evidence)}"
    precision = "bf16 autocast" if train.bf16 else "fp32"
    on = train.device.upper()
    if train.processes > 1:
        on += f", {train.processes} processes"
    if train.threads:  # recorded since
        layout = "channels-last" if train.channels_last else "contiguous"
        timed = " (chosen by timing)" if train.trials else ""
        spin = " that spin while they wait" if train.threads > 1 and train.waiting not in ("", PASSIVE) else ""
        precision = f"{precision} on {threads(train.threads)}{spin}, {layout}{timed}"
    optimizer = f"{train.optimizer}, " if train.optimizer else ""
    stops = f"; resumed {train.times_resumed} {_plural(train.times_resumed, 'time')}" if train.times_resumed else ""
    skipped = f"; {train.skipped_steps} steps skipped" if train.skipped_steps else ""
    rate = f"{optimizer}peak learning rate {train.peak_learning_rate:g}"
    return f"seed {evidence.fp32.seed}; {on}, {precision}; {rate}{stops}{skipped}"


# Accuracy


def accuracy(evidence: Evidence) -> list[str]:
    """What the drop means, agreement and flips, bf16, ties and repeated images: all on the test images."""
    found = evidence.int8.comparison["test"]
    if found.top1_drop_low_points > 0:
        meaning = "int8 is less accurate by more than chance explains: the 95 % interval of the drop lies above 0"
    elif found.top1_drop_high_points < 0:
        meaning = "int8 is more accurate by more than chance explains: the 95 % interval of the drop lies below 0"
    else:
        meaning = "The change in top-1 may be chance: the 95 % interval of the drop includes 0"
    lost, gained = found.only_fp32_correct_images, found.only_int8_correct_images
    divergence = (
        f", and the mean divergence of its probabilities (KL) is {found.kl_nats:.2g} nats" if found.kl_nats else ""
    )
    if not evidence.fp32.data.labelled:
        return [
            "The test images have no labels. What fp32 says stands in for them: its own top-1 is 100 % by definition, "
            "and that of int8 is the share of images for which both name the same class.",
            f"int8 names another class than fp32 for {_number(found.only_fp32_correct_images)} of {found.images:,} "
            f"images{divergence}.",
        ]
    return [
        f"After quantization, top-1 on the test images {changed(found.top1_drop_points)} and top-3 "
        f"{changed(found.top3_drop_points)}. {meaning}.",
        f"fp32 and int8 name the same class for {found.agreement_percent:.2f} % of the test images. Only fp32 is right "
        f"on {_number(lost)} {_plural(lost, 'image')}, only int8 on {_number(gained)}.",
        *_runtimes(evidence.int8),
        *_bf16(evidence),
        *_ties("fp32", evidence.fp32.accuracy["test"]),
        *_ties("int8", evidence.int8.accuracy["test"]),
        *_seen_before(evidence.fp32.data, "training" if evidence.fp32.train else "calibration"),
    ]


def _runtimes(int8: Int8Evidence) -> list[str]:
    """What the same file gives in a runtime that was not chosen."""
    if not int8.runtimes:
        return []
    said = [f"These figures of int8 are those in {RUNTIME_NAMES[str(int8.runtime)]}, which `qexp.load` uses."]
    for runtime, measured in int8.runtimes.items():
        found = measured.comparison["test"]
        low, high = found.top1_drop_low_points, found.top1_drop_high_points
        said.append(
            f"In {RUNTIME_NAMES[runtime]}, which rounds otherwise, top-1 of the same file "
            f"{changed(found.top1_drop_points)} (95 % interval of the drop {low:+.2f} to {high:+.2f} points), and fp32 "
            f"and int8 name the same class for {found.agreement_percent:.2f} % of the test images."
        )
    return said


def _bf16(evidence: Evidence) -> list[str]:
    """What the float models that round cost in accuracy, and whether int8 was compared with them."""
    found = dict.fromkeys(rounds_like(name) for name in evidence.measured.floats if rounds(name))
    return [_bf16_in(evidence, name) for name in found]


def _bf16_in(evidence: Evidence, name: str) -> str:
    """Of a float that rounds, and of what is compiled, whose accuracy is taken to be the same."""
    alike = [one for one in evidence.measured.floats if rounds_like(one) == name]
    if not (found := evidence.measured.rounded.get(name)):
        names = " and ".join(f"`{one}`" for one in alike)
        them = "it" if len(alike) == 1 else "them"
        return f"The accuracy of {names} was not measured, so int8 is not compared with {them}."
    low, high = found.top1_drop_low_points, found.top1_drop_high_points
    counts = (
        "It keeps the gate's limits on accuracy, so int8 is compared with it"
        if set(alike) & set(evidence.floats)
        else "It does not keep the gate's limits on accuracy, so int8 is not compared with it"
    )
    if compiled := [one for one in alike if one != name]:
        counts += f"; the same holds for `{compiled[0]}`, which rounds in the same places or in fewer"
    where = "bf16" if unfolded(name) == BF16 else "bf16 in OpenVINO"
    where += "" if name == unfolded(name) else FOLDED_AWAY.removeprefix(",")
    return (
        f"In {where}, top-1 on the test images {changed(found.top1_drop_points)} (95 % interval of the drop "
        f"{low:+.2f} to {high:+.2f} points). {counts}."
    )


def _ties(model: str, accuracy: Accuracy) -> list[str]:
    """Test images whose label shares its logit with other classes."""
    tied = {1: accuracy.top1_tied_images, 3: accuracy.top3_tied_images}
    where = [f"for a place in the top {k} on {count:,}" for k, count in tied.items() if count]
    if not where:
        return []
    return [
        f"In {model}, the label ties with another class {join(where)} of {accuracy.images:,} test images. Each of "
        "these counts as its chance to win the tie."
    ]


def _seen_before(data: DataFacts, used: str) -> list[str]:
    """What the counts of equal images say about these figures; `used` is what the first part of the images is for."""
    found = data.duplicates
    if found is None:
        return [f"How many test images also are {used} images was not counted."]
    sentences = [f"No test image is also a {used} or validation image (compared pixel by pixel)."]
    if found.test_images_seen:
        sentences = [
            f"**{found.test_images_seen:,} of {data.test_images:,} test images also are {used} or validation images. "
            f"Accuracy on these says nothing about new images** ({found.test_in_training:,} are {used} images, "
            f"{found.test_in_validation:,} validation images; compared pixel by pixel)."
        ]
    if found.validation_in_training:
        sentences.append(
            f"{found.validation_in_training:,} of {data.validation_images:,} validation images also are training "
            "images. Early stopping, the accuracy budget and the search judge partly on images that training has seen."
        )
    if twice := found.labelled_twice:
        sentences.append(
            f"{twice:,} {_plural(twice, 'image')} {_plural(twice, 'is', 'are')} in the data set with several labels: "
            "no model gets all of them right."
        )
    return sentences


# Size and MACs


def size(evidence: Evidence) -> list[str]:
    """How the stored files compare, and the weights in them."""
    sentences = [f"The int8 file is {times(evidence.size_ratio, 'smaller', 'larger')} than the fp32 file."]
    if abs(evidence.size_ratio - 1) < 0.005:
        sentences = ["The files of int8 and fp32 have the same size."]
    if evidence.int8.quantize.folded:
        fewer = evidence.int8.fp32_cost.parameters / evidence.int8.cost.parameters
        sentences.append(
            f"Part of that is no gain of int8: with the pool folded away there are {fewer:.2f}x fewer parameters."
        )
    before, after = evidence.fp32.contents, evidence.int8.contents
    if before and after and after.weights_bytes and before.weights_bytes:
        alone = times(before.weights_bytes / after.weights_bytes, "smaller", "larger")
        sentences.append(f"The weights alone, with biases, scales and statistics, are {alone}.")
    return sentences


def macs(evidence: Evidence) -> list[str]:
    """How MACs grow with the batch, and how many run in int8."""
    cost, counted = evidence.int8.cost, evidence.int8.fp32_cost
    batches = list(cost.macs)
    first = batches[0]
    sentences = []
    if len(batches) > 1:
        exact = all(cost.macs[batch] * first == cost.macs[first] * batch for batch in batches)
        sentences.append(f"MACs {'grow' if exact else 'do not grow'} in proportion to the batch size.")
    change = "Quantization leaves the MACs of each layer as they are"
    if cost.macs != counted.macs:
        change = f"Before quantization a pool was folded away, which cuts {_macs_cut(counted, cost)}"
    of_all = "the MACs of convolution and linear layers" if cost.counted_by == TORCHINFO else "all MACs"
    sentences.append(f"{change}; {cost.int8_percent:.1f} % of {of_all} run in int8{_left_fp32(evidence.int8)}.")
    if cost.no_layer_percent > 0:
        sentences.append(
            f"{cost.no_layer_percent:.1f} % of the MACs belong to no layer with weights: inside attention, activations "
            "are multiplied by each other. They do not count as int8."
        )
    if cost.counted_by == TORCHINFO:
        sentences.append(
            "An earlier version counted these MACs, with torchinfo: bias and batch norm are in them, but a linear "
            "layer counts for one token only, and attention not at all."
        )
    return sentences + [
        f"With engine {other.quantize.label}, {other.cost.int8_percent:.1f} % run in int8{_left_fp32(other)}."
        for other in (judged.int8 for judged in evidence.versions[1:])
        if other.quantize.float_layers != evidence.int8.quantize.float_layers
    ]


def _macs_cut(before: Cost, after: Cost) -> str:
    first = next(iter(before.macs))
    return f"the MACs from {_macs_text(before.macs[first])} to {_macs_text(after.macs[first])} at batch size {first}"


def folding(evidence: Evidence) -> list[str]:
    """What folding alone gives and what int8 gives beside it; nothing where no version is folded, or no float is."""
    folded = evidence.folded
    plain = [name for name in evidence.floats if name == unfolded(name)]
    small = [name for name in evidence.floats if name not in plain]
    if not (folded and small and plain):
        return []
    before, after = folded.int8.fp32_cost, folded.int8.cost
    result = evidence.latency
    best = result.winner(small)
    return [
        "Models with `_folded` in their names compute the same with a smaller linear layer: the pool before it only "
        f"enlarges its map, and is folded into its weights. That cuts the parameters from {before.parameters:,} to "
        f"{after.parameters:,} and {_macs_cut(before, after)}, in float as in int8.",
        f"Folding is not quantization: `{best}` is {_ratio(result.mean_ratio(plain, best))} as fast as the fastest "
        f"float that is not folded, and `{folded.name}` is {_ratio(result.mean_ratio(small, folded.name))} as fast as "
        "the fastest folded float, in the mean over batch sizes.",
    ]


def _ratio(found: Ratio) -> str:
    return f"{found.median:.2f}x ({found.low:.2f} to {found.high:.2f})"


def _left_fp32(int8: Int8Evidence) -> str:
    left = int8.quantize.float_layers
    if not left:
        return ""
    return f"; {len(left)} {_plural(len(left), 'layer stays', 'layers stay')} in fp32 ({', '.join(left)})"


# Inference time


def latency(evidence: Evidence) -> list[str]:
    """Where int8 is faster than the fastest float model and than fp32, and how that changes with the batch size."""
    unsupported = [] if evidence.verdict.word == UNMEASURED else evidence.latency.shortcomings
    over_floats, over_fp32 = faster_where(evidence)
    return [
        over_floats,
        *_saved(evidence),
        over_fp32,
        *folding(evidence),
        *(f"**These times do not support a verdict**: {reason}." for reason in unsupported),
        *_kernels(evidence),
    ]


def faster_where(evidence: Evidence) -> list[str]:
    """Where int8 is faster than the fastest float model of each batch size, slower, or neither is shown; and the
    speed-up over the registered fp32 version."""
    rows = by_batch_size(evidence)
    told = {row.batch_size: row.compared(row.fastest(evidence.floats), evidence.name) for row in rows}
    ratios = [row.ratio(row.fastest(evidence.floats), evidence.name).median for row in rows]
    sizes = {sign: [size for size, found in told.items() if found == sign] for sign in (1, -1, 0)}
    one = len(told) == 1
    shown = [
        f"{word} {_where(sizes[sign], 'every' if not one and len(sizes[sign]) == len(told) else '')}"
        for word, sign in (("faster", 1), ("slower", -1))
        if sizes[sign]
    ]
    level = f"no difference is shown {_where(sizes[0], '' if shown or one else 'any')}" if sizes[0] else ""
    how = "; ".join(filter(None, (f"it is {join(shown)}" if shown else "", level)))
    return [
        f"Compared with the fastest float model, int8 is {_from_to(ratios)} as fast: {how}.",
        f"Compared with the registered fp32 version, int8 is {_from_to(evidence.speedups)} as fast.",
    ]


def _where(sizes: Sequence[int], all_of_them: str) -> str:
    if all_of_them:
        return f"at {all_of_them} batch size"
    return f"at batch {_plural(len(sizes), 'size')} {join([str(size) for size in sizes])}"


def _saved(evidence: Evidence) -> list[str]:
    """Whether the time that int8 saves grows with the batch size."""
    rows = by_batch_size(evidence)
    if len(rows) < 2:
        return []
    gaps = [row.stats[row.fastest(evidence.floats)].p50_ms - row.stats[evidence.name].p50_ms for row in rows]
    grows = all(later > max(0.0, earlier) * (1 + SAME_SPEED) for earlier, later in pairwise(gaps))
    verbs = ["saves" if gap >= 0 else "loses" for gap in (gaps[0], gaps[-1])]
    first = f"{verbs[0]} {three_digits(abs(gaps[0]))} ms per batch at batch size {rows[0].batch_size}"
    last = f"{three_digits(abs(gaps[-1]))} ms at batch size {rows[-1].batch_size}"
    last = last if verbs[0] == verbs[1] else f"{verbs[1]} {last}"
    change = ""
    if gaps[-1] > 0:
        mostly = gaps[-1] > max(0.0, gaps[0]) * (1 + SAME_SPEED)
        though = "" if grows else ", though not with every larger one" if mostly else ""
        change = f"; the time saved {'grows' if mostly else 'does not grow'} with the batch size{though}"
    return [f"It {first} and {last}{change}."]


def _kernels(evidence: Evidence) -> list[str]:
    """Which of several int8 kernels or runtimes of the chosen version are used, and why."""
    names = evidence.measured.names[evidence.int8.version_uri]
    if len(names) == 1:
        return []
    first, *others = names
    ahead = all(evidence.latency.mean_ratio([other], first).low > 1 for other in others)
    if evidence.int8.quantize.engine == "onnx":
        why = "it is the fastest" if ahead else "no other is shown to be faster"
        return [f"Of the runtimes for the chosen version, `qexp.load` uses that of `{first}`: {why}."]
    why = "they are the fastest" if ahead else "no other kernels are shown to be faster"
    return [f"Of the kernels for the chosen version, `qexp.load` uses those of `{first}`: {why}."]


def _left_out(latency: LatencyResult) -> list[str]:
    said = [
        f"{'`' if name.startswith('int8') else 'Baseline `'}{name}` was not timed: {reason}."
        for name, reason in latency.models_left_out.items()
    ]
    if latency.left_out:
        sizes = ", ".join(map(str, latency.left_out))
        said.insert(0, f"Batch sizes {sizes} were not timed: {latency.left_out_because}.")
    return said


def _weighted(latency: LatencyResult) -> list[str]:
    """How much each batch size counts, where that was said."""
    if not latency.weights:
        return []
    whole = sum(latency.weights.get(row.batch_size, 0.0) for row in latency.rows)
    shares = [f"{row.batch_size} by {100 * latency.weights[row.batch_size] / whole:.3g} %" for row in latency.counted]
    others = [str(row.batch_size) for row in latency.rows if row not in latency.counted]
    left = f"; {join(others)} {'does' if len(others) == 1 else 'do'} not count" if others else ""
    return [f"The mean over the batch sizes and the choice of a version weigh batch size {join(shares)}{left}."]


def how_timed(evidence: Evidence) -> list[str]:
    """What a time, a ratio and an interval are, and what else the machine did."""
    rows = evidence.latency.rows
    rounds = span([len(row.round_ms[evidence.name]) for row in rows])
    counts = span([max(1, len(row.loads)) for row in rows])
    loads = "once" if counts == "1" else f"{counts} times"
    low, high = min(row.noise.low for row in rows), max(row.noise.high for row in rows)
    return [
        f"A time is the wall time of one forward pass of one batch, on {threads(evidence.latency.threads)}, in a "
        f"process that only times models. For each batch size, every model is loaded {loads}, and the models take "
        f"turns in random order for {rounds} rounds in all.",
        *_left_out(evidence.latency),
        *_weighted(evidence.latency),
        "A ratio is the geometric mean over the loads; of each load, the median of its rounds counts. "
        f"{interval(rows)}",
        f"As a control, an int8 model was compared with a copy of itself: it took {low:.2f} to {high:.2f} times as "
        "long. A model is called faster or slower only if its ratio lies beyond the control, and if its interval "
        "excludes 1 at a confidence corrected for the number of comparisons in the sweep.",
        *_others(evidence),
    ]


def interval(rows: Sequence[LatencyRow]) -> str:
    """What the two ends of a ratio's interval are."""
    if all(row.enough for row in rows):
        return f"Its {100 * CONFIDENCE:.0f} % interval is that of Student's t over the loads."
    return f"Its interval is not reliable here: that takes at least {FEWEST_ROUNDS} rounds in {FEWEST_LOADS} loads."


def _others(evidence: Evidence) -> list[str]:
    """What the rest of the machine did."""
    found = [row.activity for row in evidence.latency.rows if row.activity]
    if not found:
        return []
    wall, own, others = (sum(getattr(one, name) for one in found) for name in ("wall_s", "own_cpu_s", "others_cpu_s"))
    most, cores = max(one.busy_percent for one in found), found[0].cores
    return [
        f"During these {wall:.0f} s, on {cores} {_plural(cores, 'core')}, the timed process used {own:.0f} s of CPU "
        f"time and other processes {others:.0f} s. At no batch size did others take more than {most:.1f} % of the "
        "timed cores."
    ]


# Throughput


def throughput(found: ThroughputEvidence) -> list[str]:
    """Which setting serves most, what a rate takes, and what else must be known of the figures."""
    return [
        *(f"**Nothing may rest on these figures**: {reason}." for reason in found.result.shortcomings),
        _most_served(found),
        *_needed(found),
        *(f"Not tried: {reason}." for reason in found.result.left_out),
    ]


def _most_served(found: ThroughputEvidence) -> str:
    limit = "" if found.max_p99_ms is None else f"Within {found.max_p99_ms:g} ms for 99 of 100 requests, "
    told, best = [], {kind: found.best(kind) for kind in KINDS}
    for kind, name in (("int8", "int8"), ("float", "the fastest float")):
        one = best[kind]  # type: ignore[index]
        if one is None:
            told.append(f"{name} is not shown to serve anything")
            continue
        served = one.served
        p99 = "" if served.p99_ms is None else f", 99 of 100 requests within {three_digits(served.p99_ms)} ms"
        which = f" (`{served.model}`)" if kind == "float" else ""
        low, middle, high = (three_digits(end) for end in (served.rate.low, served.rate.median, served.rate.high))
        rate = f"{middle} images a second ({low} to {high})"
        told.append(f"{name}{which} serves {rate} with {one.setting.text}{p99}")
    text = f"{limit}{'; '.join(told)}."
    return text[0].upper() + text[1:]


def _needed(found: ThroughputEvidence) -> list[str]:
    """What a rate takes, for int8 and for the fastest float."""
    if found.images_per_second is None:
        return []
    told = []
    for kind, name in (("int8", "int8"), ("float", "the fastest float")):
        need = found.needed(kind)  # type: ignore[arg-type]
        if need is None:
            told.append(f"nothing is shown to do for {name}")
            continue
        machines = "" if need.machines == 1 else f" of {need.machines} machines like this one, each"
        cores = f"{need.cores} {_plural(need.cores, 'core')}"
        told.append(f"{name} needs {cores}{machines} with {need.each.setting.text}")
    return [f"For {found.images_per_second:,.10g} images a second, {'; '.join(told)}."]


def how_served(found: ThroughputEvidence) -> list[str]:
    """What a worker, a request and a rate are."""
    result = found.result
    pinned = (
        "each pinned to as many cores of its own as it has threads"
        if result.pinned
        else "which this system does not pin to cores"
    )
    rounds = span([len(row.int8.images_per_second) for row in result.rows])
    return [
        f"Workers are processes, {pinned}. Each computes one request after the other, a request being "
        "one batch: its time is that of the computation beside busy neighbours, without waiting in a queue.",
        f"Images a second are those of all workers while all of them are at work, in {rounds} rounds with new "
        "processes, in each of which float and int8 take turns. The float at a batch size is the one that was the "
        "fastest in the latest latency sweep on this CPU.",
    ]


# Layer sensitivity and budget


def sensitivity(result: SensitivityResult) -> list[str]:
    """Which layer costs most in int8, and which of them change top-1 by more than chance does."""
    simulated = f"{ranges(result)} ranges, weights {'per channel' if result.per_channel else 'per layer'}"
    first = (
        f"On {result.images:,} validation images, top-1 is {result.fp32_top1_percent:.2f} % in fp32 and "
        f"{result.int8_top1_percent:.2f} % with all layers in int8. int8 is simulated ({simulated}"
        f"{_simulated_bits(result)})."
    )
    return [first, *_most_divergent(result), *_noisiest(result), *_top1_beyond_chance(result)]


def _simulated_bits(result: SensitivityResult) -> str:
    if not result.engines:
        return ""
    reduced = sum(layer.weight_bits == 7 for layer in result.layers)
    some = f"of 8 bits, of 7 in {reduced} {_plural(reduced, 'layer')}"
    bits = {0: "of 8 bits", len(result.layers): "of 7 bits"}.get(reduced, some)
    return f" {bits}, as with {_plural(len(result.engines), 'engine')} {join(result.engines)}"


def _most_divergent(result: SensitivityResult) -> list[str]:
    measured = {layer.layer: layer.kl_only_int8_nats for layer in result.layers if layer.kl_only_int8_nats is not None}
    if not measured or result.int8_kl_nats is None:
        return []
    if not any(measured.values()):
        return ["No single layer in int8 changes the class probabilities."]
    worst = max(measured, key=lambda name: measured[name])
    return [
        f"As the only layer in int8, `{worst}` changes the class probabilities most. With all layers in int8, the "
        f"divergence is {result.int8_kl_nats:.2g} nats."
    ]


def _noisiest(result: SensitivityResult) -> list[str]:
    noisy = [layer for layer in result.layers if layer.sqnr_db is not None]
    if not noisy:
        return []
    lowest = min(noisy, key=lambda layer: layer.sqnr_db or 0.0)
    return [f"The output of `{lowest.layer}` has the lowest signal-to-noise ratio."]


def _top1_beyond_chance(result: SensitivityResult) -> list[str]:
    """Of top-1, what McNemar's test finds: the largest of many differences is often one image."""
    if not result.engines:  # of an earlier version, which did not count the images that flip
        return []
    layers = result.layers
    lost = [(layer.only_int8_lost_images, layer.only_int8_gained_images) for layer in layers]
    won = [(layer.only_fp32_gained_images, layer.only_fp32_lost_images) for layer in layers]
    worse, better = (
        [f"`{layer.layer}`" for layer, told in zip(layers, beyond_chance(flips), strict=True) if told]
        for flips in (lost, won)
    )
    test = f"(McNemar's exact test, corrected for {len(layers)} layers)"
    if not worse and not better:
        return [f"No layer, as the only one in int8 or the only one in fp32, changes top-1 beyond chance {test}."]
    found = []
    if worse:
        found.append(f"As the only layer in int8, {join(worse)} {_plural(len(worse), 'lowers', 'lower')} top-1 beyond "
                     f"chance {test}.")  # fmt: skip
    if better:
        found.append(f"As the only layer in fp32, {join(better)} {_plural(len(better), 'raises', 'raise')} top-1 "
                     f"beyond chance above that of all layers in int8 {test}.")  # fmt: skip
    return found


def budget(evidence: Evidence) -> list[str]:
    """Which layers went back to fp32, and what that cost, for each int8 version."""
    several = len(evidence.versions) > 1
    return [
        f"Engine {judged.int8.quantize.label}: {sentence}" if several else sentence
        for judged in evidence.versions
        for sentence in _budget_of(judged.int8)
    ]


def _budget_of(int8: Int8Evidence) -> list[str]:
    found = int8.budget
    if found is None:
        return []
    kept, tries, first_try = int8.quantize.kept_layers, len(found.tries), found.tries[0]
    met = "is met" if found.met else "**is not met**"
    stay = f"{_plural(len(kept), 'layer stays', 'layers stay')} in fp32"
    layers = f"{len(kept)} {stay} ({', '.join(kept)})" if kept else "no layer stays in fp32"
    limit = f"{found.max_top1_drop_points:g} {_plural(found.max_top1_drop_points, 'point')}"
    sentences = [
        f"The accuracy budget, a drop in top-1 of at most {limit} on validation images, {met} after {tries} "
        f"{_plural(tries, 'try', 'tries')}; {layers}."
    ]
    if found.too_few_images and not found.met:
        sentences.append(
            f"{found.images:,} validation images are too few for it: the upper end of the drop's 95 % interval counts, "
            f"and that is {found.least_high_points:.2f} points even if no image changes."
        )
    if int8.budget_cost is None:  # the version is that of the first try: none after it was better
        others = "all other layers" if kept else "all layers"
        high = first_try.validation_top1_drop_high_points
        end = "" if high is None else f" (upper end of the drop's 95 % interval: {high:+.2f} points)"
        drop = changed(first_try.validation_top1_drop_points)
        return [*sentences, f"With {others} in int8, top-1 on validation images {drop}{end}."]
    return [*sentences, _cost_of_fp32_layers(int8)]


def _cost_of_fp32_layers(int8: Int8Evidence) -> str:
    cost = int8.budget_cost
    assert cost is not None
    grown = (cost.size_bytes - cost.all_int8_bytes) / 1e6
    shown = [
        f"{ratio.median:.2f}x as long at batch size {batch} ({_interval(ratio)})"
        for batch, ratio in cost.slowdown.items()
        if batch in cost.told_apart
    ]
    level = [str(batch) for batch in cost.slowdown if batch not in cost.told_apart]
    slower = f" A batch takes {join(shown)}." if shown else ""
    equal = f" At batch {_plural(len(level), 'size')} {join(level)}, no difference in time is shown." if level else ""
    return f"Compared with all layers in int8, the file is {grown:.3f} MB larger.{slower}{equal}"


# Several kinds of machine


def hosts(evidence: Evidence) -> list[str]:
    """Where the logits of the chosen version are others than those recorded, or were not compared with them."""
    return list(notes(evidence.hosts))


# Environment


def processor(host: Host, thread_count: int) -> str:
    """CPU, cores, quota, threads and memory of a machine."""
    cores = f"{host.cores} {_plural(host.cores, 'logical CPU')}"
    if host.physical_cores is not None:
        cores += f" on {host.physical_cores} {_plural(host.physical_cores, 'core')}"
        cores += f", quota of {host.cpu_quota:g} CPUs" if host.cpu_quota else ", no CPU quota"
    return f"{host.cpu}, {cores}, {threads(thread_count)}, {host.memory_gb:g} GB"


def quantization(result: QuantizeResult) -> str:
    """Observer, granularity and bits of a quantization."""
    granularity = "per channel" if result.per_channel else "per layer"
    bits = ""
    if result.reduce_range:
        bits = ", of 7 bits"
    elif reduced := len(result.saturating_layers):
        bits = f", of 7 bits in {reduced} {_plural(reduced, 'layer')}"
    return f"{ranges(result)} observer, weights {granularity}{bits}"


def ranges(result: QuantizeResult | SensitivityResult) -> str:
    """The observer that has set the ranges, with its percentile if it is the one that has one."""
    return result.observer + (f" ({result.percentile:g} %)" if result.percentile is not None else "")


# Wording


def by_batch_size(evidence: Evidence) -> list[LatencyRow]:
    """The rows of the sweep, the smallest batch first: those of a file may be in any order."""
    return sorted(evidence.latency.rows, key=lambda row: row.batch_size)


def changed(drop_points: float) -> str:
    """What a drop does to a share, as a verb."""
    if abs(drop_points) < 0.005:
        return "does not change"
    return f"{'falls' if drop_points > 0 else 'rises'} by {abs(drop_points):.2f} points"


def times(ratio: float, above: str, below: str) -> str:
    """`4.00x smaller`, `2.00x larger`, or `not smaller`."""
    if abs(ratio - 1) < 0.005:
        return f"not {above}"
    return f"{ratio:.2f}x {above}" if ratio > 1 else f"{1 / ratio:.2f}x {below}"


def join(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def span(counts: Sequence[int]) -> str:
    """`20`, or `20 to 35`."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {_plural(count, 'thread')}"


def three_digits(value: float | None) -> str:
    """Three significant digits, and all of those before the point; a dash where there is no value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _interval(ratio: Ratio) -> str:
    return f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"


def _from_to(ratios: Sequence[float]) -> str:
    ends = [f"{value:.2f}x" for value in (min(ratios), max(ratios))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _number(count: float) -> str:
    return f"{round(count):,}" if count == round(count) else f"{count:,.2f}"


def _plural(count: float, one: str, many: str = "") -> str:
    return one if count == 1 else many or f"{one}s"


def _macs_text(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
