"""What to ship, from accuracy, size and latency together, and what each choice cost; sentences for the report."""

from collections.abc import Sequence

from qexp import claims, speed
from qexp.evidence import Evidence, Int8Evidence, Judged
from qexp.latency import FEWEST_PAIRS, LatencyRow
from qexp.quantization.sensitivity import SensitivityResult, beyond_chance


def recommendation(evidence: Evidence) -> list[str]:
    """Which model to ship, and where int8 does not pay."""
    floats = float_models(evidence)
    told = {row.batch_size: row.compared(fastest(row, floats), evidence.name) for row in evidence.latency.rows}
    kept = [_best_floats(evidence, floats)]
    if not evidence.gate.passed:
        again = "".join(f" {sentence}" for sentence in speed.busy(evidence))
        first = f"**Do not ship int8 yet**: the gate {evidence.gate.summary}. {_until_then(evidence)}{again}"
    elif evidence.is_worse and evidence.succession:
        why = "; ".join(evidence.succession.reasons)
        first = f"**Keep the champion, `{_champion(evidence)}`**: this version passes the gate, but {why}."
    elif better := _better_one(evidence):
        first = (
            f"**Ship `{better.int8.version_uri}`** ({better.name}) **rather than this version**: it passes the gate "
            f"too, and is faster than {evidence.name}, beyond the noise, at more batch sizes than slower."
        )
    elif speed.too_few(evidence):
        first = (
            f"**Measure with `--min-repeats {FEWEST_PAIRS}` or more**: fewer rounds tell no two models apart. int8 is "
            f"{evidence.size_ratio:.2f}x smaller."
        )
    elif not any(told.values()) and not _is_level(evidence, floats):
        first = (
            "**Measure again on a quiet machine**: the noise is too high to tell int8 from the fastest model that "
            f"is not int8 at any batch size. It is {evidence.size_ratio:.2f}x smaller."
        )
    elif not any(sign > 0 for sign in told.values()):
        first = _not_for_time_alone(evidence, floats)
    else:
        first = _ship(evidence, floats, told)
        kept += _not_faster(evidence, floats, told)
    failed = [f"Engine {engine} could not quantize it: {why}." for engine, why in evidence.failed_engines.items()]
    others = [_about(evidence, judged) for judged in evidence.versions[1:]]
    return [first, *kept, *_bf16(evidence), *others, *failed]


def _better_one(evidence: Evidence) -> Judged | None:
    """A version timed beside the one that was asked for, which `qexp run` would have chosen instead."""
    passed = {judged.name: judged for judged in evidence.versions if judged.gate.passed}
    best = passed[evidence.latency.winner(list(passed))]
    return None if best.name == evidence.name else best


def _is_level(evidence: Evidence, floats: Sequence[str]) -> bool:
    """Whether int8 and the fastest model that is not int8 were shown to be equally fast, as far as that goes."""
    ratios = [row.ratio(fastest(row, floats), evidence.name) for row in evidence.latency.rows]
    within = all(1 - speed.SAME_SPEED <= ratio.low and ratio.high <= 1 + speed.SAME_SPEED for ratio in ratios)
    return within and all(row.noise_edge <= 1 + speed.SAME_SPEED for row in evidence.latency.rows)


def _ship(evidence: Evidence, floats: Sequence[str], told: dict[int, int]) -> str:
    faster = [size for size, sign in told.items() if sign > 0]
    where = "at every batch size" if len(faster) == len(told) else f"at batch size {_join(faster)}"
    return (
        f"**Ship `{evidence.int8.version_uri}`** ({evidence.name}): it passes the gate (top-1 "
        f"{claims.changed(evidence.int8.comparison['test'].top1_drop_points)}, {evidence.size_ratio:.2f}x smaller) and "
        f"is faster than every model that is not int8 ({', '.join(floats)}) {where}."
    )


def _not_for_time_alone(evidence: Evidence, floats: Sequence[str]) -> str:
    """The fastest model that is not int8 is as fast or faster: it may be no version that anybody can load."""
    base = evidence.latency.baseline
    signs = [row.compared(base, evidence.name) for row in evidence.latency.rows]
    if min(signs) < 0 or not any(signs):
        return (
            "**int8 does not pay in time here**: at no batch size is it faster than the fastest model that is not "
            f"int8, beyond the noise. It saves size alone ({evidence.size_ratio:.2f}x). {_until_then(evidence)}"
        )
    best = ", ".join(dict.fromkeys(fastest(row, floats) for row in evidence.latency.rows))
    return (
        f"**Ship `{evidence.int8.version_uri}`** ({evidence.name}) **for its size**: it passes the gate, is "
        f"{evidence.size_ratio:.2f}x smaller than the fp32 version, and {speed.faster_where(evidence, base)} Yet "
        f"{best} of the same weights, which is no registered version, is as fast or faster at every batch size: if you "
        "can serve that, int8 does not pay in time."
    )


def _champion(evidence: Evidence) -> str | None:
    return evidence.now_uri or evidence.before_uri


def _until_then(evidence: Evidence) -> str:
    """What to ship instead of int8: the champion that beat it, or fp32; the baselines are no registered versions."""
    if evidence.is_worse:
        return f"Keep the champion, `{_champion(evidence)}`."
    return f"Ship the fp32 version, `{evidence.fp32.version_uri}`."


def _not_faster(evidence: Evidence, floats: Sequence[str], told: dict[int, int]) -> list[str]:
    """The batch sizes at which int8 brings no speed-up, and what is faster there."""
    sentences = []
    if slower := [row for row in evidence.latency.rows if told[row.batch_size] < 0]:
        better = ", ".join(dict.fromkeys(fastest(row, floats) for row in slower))
        sizes = _join([row.batch_size for row in slower])
        sentences.append(f"int8 does not pay in time at batch size {sizes}: {better} is faster there.")
    if unclear := [size for size, sign in told.items() if sign == 0]:
        sentences.append(f"At batch size {_join(unclear)} int8 is indistinguishable from the fastest of them.")
    return sentences


def float_models(evidence: Evidence) -> list[str]:
    """The names in the latency table that are not int8."""
    int8 = {name for names in evidence.measured.contenders.values() for name in names}
    return [name for name in evidence.latency.rows[0].stats if name not in int8]


def fastest(row: LatencyRow, names: Sequence[str]) -> str:
    """Of these models, the one with the smallest p50 in a row."""
    return min(names, key=lambda name: row.stats[name].p50_ms)


def _best_floats(evidence: Evidence, floats: Sequence[str]) -> str:
    ratios = [row.ratio(fastest(row, floats), evidence.name).median for row in evidence.latency.rows]
    ends = dict.fromkeys(f"{value:.2f}x" for value in (min(ratios), max(ratios)))
    best = ", ".join(dict.fromkeys(fastest(row, floats) for row in evidence.latency.rows))
    return f"Against the fastest model that is not int8 ({best}), int8 is {' to '.join(ends)} as fast."


def _bf16(evidence: Evidence) -> list[str]:
    """What the fastest model that is not int8 often costs in accuracy: the others compute what fp32 does."""
    if not (found := evidence.measured.bf16):
        return []
    low, high = found.top1_drop_low_points, found.top1_drop_high_points
    return [
        f"In bf16, top-1 on the test images {claims.changed(found.top1_drop_points)} (95 % interval of the drop "
        f"{low:+.2f} to {high:+.2f} points), and the file has {found.size_bytes / 1e6:.3f} MB."
    ]


def _about(evidence: Evidence, other: Judged) -> str:
    """How another int8 version compares with the chosen one."""
    rows = evidence.latency.rows
    signs = [row.compared(other.name, evidence.name) for row in rows]
    words = {1: "slower", -1: "faster", 0: "indistinguishable"}
    sizes = {sign: [row.batch_size for row, found in zip(rows, signs, strict=True) if found == sign] for sign in words}
    times = "; ".join(f"{word} at batch size {_join(sizes[sign])}" for sign, word in words.items() if sizes[sign])
    drop = other.int8.comparison["test"].top1_drop_points
    gate = "passes" if other.gate.passed else "does not pass"
    compared = " (it was not compared with the champion)" if evidence.succession else ""
    return (
        f"`{other.int8.version_uri}` ({other.name}): top-1 {claims.changed(drop)}, "
        f"{other.int8.size_bytes / 1e6:.3f} MB, {gate} the gate{compared}; compared with {evidence.name} it is {times}."
    )


def sensitivity(result: SensitivityResult) -> list[str]:
    """Which layer costs most in int8, and which of them change top-1 by more than chance does."""
    first = (
        f"On {result.images:,} validation images, top-1 is {result.fp32_top1_percent:.2f} % in fp32 and "
        f"{result.int8_top1_percent:.2f} % with all layers in int8 (simulated: {claims.ranges(result)} ranges, weights "
        f"{'per channel' if result.per_channel else 'per layer'}{_simulated_bits(result)})."
    )
    return [first, *_most_divergent(result), *_noisiest(result), *_top1_beyond_chance(result)]


def _simulated_bits(result: SensitivityResult) -> str:
    if not result.engines:
        return ""
    reduced = sum(layer.weight_bits == 7 for layer in result.layers)
    bits = {0: "of 8 bits", len(result.layers): "of 7 bits"}.get(
        reduced, f"of 8 bits, in {_count_layers(reduced)} of 7"
    )
    return f" {bits}, as with engine {' or '.join(result.engines)}"


def _count_layers(count: int) -> str:
    return f"{count} {'layer' if count == 1 else 'layers'}"


def _most_divergent(result: SensitivityResult) -> list[str]:
    measured = {layer.layer: layer.kl_only_int8_nats for layer in result.layers if layer.kl_only_int8_nats is not None}
    if not measured or result.int8_kl_nats is None:
        return []
    if not any(measured.values()):
        return ["No layer alone in int8 moves the class probabilities."]
    worst = max(measured, key=lambda name: measured[name])
    return [
        f"Quantizing only `{worst}` moves the class probabilities most: their mean Kullback-Leibler divergence from "
        f"fp32 is {measured[worst]:.2g} nats then, and {result.int8_kl_nats:.2g} with all layers in int8."
    ]


def _noisiest(result: SensitivityResult) -> list[str]:
    noisy = [layer for layer in result.layers if layer.sqnr_db is not None]
    if not noisy:
        return []
    lowest = min(noisy, key=lambda layer: layer.sqnr_db or 0.0)
    return [f"The output of `{lowest.layer}` has the lowest signal-to-noise ratio ({lowest.sqnr_db:.1f} dB)."]


def _top1_beyond_chance(result: SensitivityResult) -> list[str]:
    """Of top-1, what McNemar's test finds: the largest of many differences is often one image."""
    if not result.engines:  # of an earlier version, which did not count the images that flip
        return []
    layers = result.layers
    lost = [(layer.only_int8_lost_images, layer.only_int8_gained_images) for layer in layers]
    won = [(layer.only_fp32_gained_images, layer.only_fp32_lost_images) for layer in layers]
    worse, better = (
        [layer for layer, told in zip(layers, beyond_chance(flips), strict=True) if told] for flips in (lost, won)
    )
    test = f"McNemar's exact test, corrected for {len(layers)} layers"
    if not worse and not better:
        return [f"No layer, alone in int8 or alone in fp32, changes top-1 beyond chance on these images ({test})."]
    found = []
    if worse:
        names = ", ".join(f"`{layer.layer}` ({layer.top1_only_int8_percent:.2f} %)" for layer in worse)
        found.append(f"alone in int8 lowers top-1: {names}")
    if better:
        names = ", ".join(f"`{layer.layer}` ({layer.top1_only_fp32_percent:.2f} %)" for layer in better)
        found.append(f"alone in fp32 raises it above that of all layers in int8: {names}")
    return [f"Beyond chance ({test}), {'; '.join(found)}."]


def budget(evidence: Evidence) -> list[str]:
    """Which layers went back to fp32, and what that cost, for each int8 version."""
    several = len(evidence.versions) > 1
    return [
        f"Engine {judged.int8.quantize.engine}: {sentence}" if several else sentence
        for judged in evidence.versions
        for sentence in _budget_of(judged.int8)
    ]


def _budget_of(int8: Int8Evidence) -> list[str]:
    found, cost = int8.budget, int8.budget_cost
    if found is None:
        return []
    kept = int8.quantize.kept_layers
    met = "is met" if found.met else "**is not met**"
    tries = f"{len(found.tries)} {'try' if len(found.tries) == 1 else 'tries'}"
    first = (
        f"The budget of {found.max_top1_drop_points:g} points on validation images {met} after {tries}; "
        f"{len(kept)} {'layer stays' if len(kept) == 1 else 'layers stay'} fp32{': ' if kept else ''}{', '.join(kept)}."
    )
    few = (
        f"{found.images:,} validation images cannot show so small a drop: even where no image changes, the upper end "
        f"of the 95 % interval, which counts, is {found.least_high_points:.2f} points."
    )
    limits = [few] if found.too_few_images and not found.met else []
    if cost is None:  # the version is that of the first try: none after it was better
        others = "other layers" if kept else "layers"
        tried = found.tries[0]
        high = tried.validation_top1_drop_high_points
        end = "" if high is None else f" (upper end of the 95 % interval of the drop {high:+.2f})"
        return [
            first,
            *limits,
            f"With all {others} in int8, top-1 {claims.changed(tried.validation_top1_drop_points)} there{end}.",
        ]
    slower = ", ".join(
        f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}) at batch size {batch}"
        + ("" if batch in cost.told_apart else " (cannot tell apart)")
        for batch, ratio in cost.slowdown.items()
    )
    grown = (cost.size_bytes - cost.all_int8_bytes) / 1e6
    return [
        first,
        *limits,
        f"That costs {grown:.3f} MB, and time: {slower} as long as with all layers in int8 (both timed in turns in the "
        "process that quantized them).",
    ]


def _join(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
