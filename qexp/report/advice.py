"""What to ship, from accuracy, size and latency together, and what each choice cost; sentences for the report."""

from qexp.measurement.latency import Ratio
from qexp.measurement.sweep_models import BF16
from qexp.measurement.verdict import SIZE_ONLY
from qexp.quantization.sensitivity import SensitivityResult, beyond_chance
from qexp.report import claims
from qexp.report.results import Evidence, Int8Evidence, Judged


def recommendation(evidence: Evidence) -> list[str]:
    """The verdict, the floats that int8 was held against, and the versions beside the chosen one."""
    failed = [f"Engine {engine} could not quantize it: {why}." for engine, why in evidence.failed_engines.items()]
    others = [_about(evidence, judged) for judged in evidence.versions[1:]]
    return [claims.verdict(evidence), *_instead(evidence), *_bf16(evidence), *others, *failed]


def _instead(evidence: Evidence) -> list[str]:
    """Where int8 is shipped for its size only: what is as fast or faster."""
    if evidence.verdict.word != SIZE_ONLY:
        return []
    best = evidence.latency.winner(evidence.floats)
    made = "the registered version" if best == evidence.latency.baseline else "made of the same weights, not registered"
    alias = ""
    if not evidence.gate.passed:
        alias = (
            " The gate's limit on speed keeps int8 from being `champion`; `--min-speedup 0` lets it pass for its size."
        )
    return [f"If time matters more than size, `{best}` ({made}) is the fastest float.{alias}"]


def _bf16(evidence: Evidence) -> list[str]:
    """What the only float that rounds costs in accuracy, and whether int8 was held against it."""
    if BF16 not in evidence.measured.floats:
        return []
    if not (found := evidence.measured.bf16):
        return ["bf16 was timed, but its accuracy is not known: int8 is not held against it."]
    low, high = found.top1_drop_low_points, found.top1_drop_high_points
    counts = "keeps the gate's limits on accuracy, so int8 is held against it"
    if BF16 not in evidence.floats:
        counts = "does not keep the gate's limits on accuracy, so int8 is not held against it"
    return [
        f"In bf16, top-1 on the test images {claims.changed(found.top1_drop_points)} (95 % interval of the drop "
        f"{low:+.2f} to {high:+.2f} points), and the file has {found.size_bytes / 1e6:.3f} MB: it {counts}."
    ]


def _about(evidence: Evidence, other: Judged) -> str:
    """How another int8 version compares with the chosen one."""
    ratio = evidence.latency.mean_ratio([evidence.name], other.name)
    drop = other.int8.comparison["test"].top1_drop_points
    compared = " (it was not compared with the champion)" if evidence.succession else ""
    return (
        f"`{other.int8.version_uri}` ({other.name}): top-1 {claims.changed(drop)}, "
        f"{other.int8.size_bytes / 1e6:.3f} MB, {_gate_word(other)}{compared}; {_as_fast(ratio)} as {evidence.name}."
    )


def _gate_word(judged: Judged) -> str:
    return {"passed": "passes the gate", "failed": "does not pass the gate"}.get(judged.gate.word, judged.gate.word)


def _as_fast(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}) as fast"


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
