"""The stages that end a job: all models timed side by side, and each int8 version held against the gate."""

import copy
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qexp.config import Config, GateConfig
from qexp.data.datasets import Dataset
from qexp.errors import first_line
from qexp.measurement.accuracy import compare, measure_accuracy, predict_logits, share_interval
from qexp.measurement.gate import UNMEASURED, GateResult, decide_gate
from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyResult
from qexp.measurement.sweep import SweepRequest, run_sweep
from qexp.measurement.sweep_models import BASELINE, BF16, SweepModel, freeze, in_bf16, int8_models
from qexp.models.classifier import Classifier
from qexp.pipeline.quantize_stage import Int8
from qexp.pipeline.stages import Fp32
from qexp.progress import say
from qexp.quantization import KERNELS
from qexp.report.results import Bf16Evidence, Evidence, Fp32Evidence, Int8Evidence, Judged, LatencyEvidence
from qexp.tracking import metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.integrity import copy_files
from qexp.tracking.outage import store_errors
from qexp.tracking.registry import Registered
from qexp.tracking.store import split_uri


def latency_stage(
    config: Config, host: Host, fp32: Registered, int8s: dict[Registered, str], bf16: Bf16Evidence | None = None
) -> LatencyEvidence:
    """Time registered versions in a clean subprocess; log it to the run, to the models and as tags.

    Args:
        int8s: the engine of each int8 version.
        bf16: what `measure_bf16` has found, to be logged with the times if that baseline is timed.
    """
    uris = ", ".join(f"`{version.uri}`" for version in (fp32, *int8s))
    with tracking.start_run(f"latency-{config.model}", f"Latency of {uris}.") as run_id:
        tracking.log_setup(config, host)
        tracking.log_models(version.model_id for version in (fp32, *int8s))
        baselines = baselines_for(config, host)
        with local_files(fp32.uri, *(version.uri for version in int8s)) as (weights, folders):
            timed = {version: _int8_models(config, folders[version.uri], engine) for version, engine in int8s.items()}
            models = [SweepModel(name, folders[fp32.uri]) for name in (BASELINE, *baselines)]
            models += [model for found in timed.values() for model in found]
            result = time_models(config, host, models, next(iter(timed.values()))[0].name, weights)
        for shortcoming in result.shortcomings:
            say(f"warning: no verdict rests on these times: {shortcoming}")
        ranked = {version: _fastest_first(config, result, found) for version, found in timed.items()}
        names = {version.uri: tuple(one.name for one in found) for version, found in ranked.items()}
        evidence = LatencyEvidence(fp32.uri, names, result, host, run_id, bf16 if BF16 in baselines else None)
        _log_latency(config, evidence, fp32, ranked)
    return evidence


def baselines_for(config: Config, host: Host) -> list[str]:
    """The baselines asked for that this CPU has instructions for."""
    able: list[str] = [name for name in config.latency.baselines if name != BF16 or host.has_bf16]
    if len(able) < len(config.latency.baselines):
        say(f"baseline bf16 is left out: {host.cpu} has no bf16 instructions")
    return able


def fair_floats(limits: GateConfig, latency: LatencyEvidence) -> tuple[str, ...]:
    """What int8 is compared with: every model that is not int8, bf16 only if it keeps the limits on accuracy."""
    found = latency.bf16
    accurate = found is not None and found.top1_drop_high_points <= limits.max_top1_drop
    if found and accurate and limits.min_top1 is not None:
        accurate = share_interval(found.accuracy.top1_percent, found.accuracy.images)[0] >= limits.min_top1
    return tuple(name for name in latency.floats if name != BF16 or accurate)


def measure_bf16(
    config: Config, host: Host, dataset: Dataset, model: Classifier, fp32_logits: Tensor
) -> Bf16Evidence | None:
    """Size and accuracy of the baseline bf16 on the test images; None where it is not timed, or does not run."""
    if BF16 not in config.latency.baselines or not host.has_bf16:
        return None
    test, saved = dataset.test, io.BytesIO()
    try:
        module = freeze(copy.deepcopy(model), config.data.image_size, torch.bfloat16)
        torch.jit.save(module, saved)
        logits = predict_logits(in_bf16(module), test.images, label="bf16 on test images")
    except Exception as error:  # whatever an operation without bf16 raises
        say(f"the accuracy of bf16 is not measured: {first_line(error)}")
        return None
    found = compare(fp32_logits, logits, test.labels)
    drop = found.top1_drop_points, found.top1_drop_low_points, found.top1_drop_high_points
    return Bf16Evidence(saved.tell(), measure_accuracy(logits, test.labels), *drop)


@contextmanager
def local_files(fp32_uri: str, *int8_uris: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """The weights file of a registered fp32 version, and by URI the folders of its files and those of int8 versions:
    copies, for as long as the block lasts, so that loading them asks no store."""
    weights_uri = registry.find_version(fp32_uri, "fp32").tags["weights_uri"]
    with tempfile.TemporaryDirectory() as name, tracking.downloaded(weights_uri) as weights:
        with store_errors():
            folders = {uri: str(copy_files(uri, Path(name))) for uri in (fp32_uri, *int8_uris)}
        yield weights, folders


def time_models(
    config: Config, host: Host, models: Sequence[SweepModel], repeated: str, weights: Path
) -> LatencyResult:
    """Time `models` in a clean subprocess, the one named `repeated` twice; `weights` is the fp32 weights file."""
    size, options = config.data.image_size, config.latency
    request = SweepRequest(tuple(models), repeated, str(weights), size, host.threads, options)
    return run_sweep(request, registry.child_environment(host.threads))


def _int8_models(config: Config, folder: str, engine: str) -> tuple[SweepModel, ...]:
    """The kernels of a plain load, and beside them the others, or the one of them that was asked for."""
    plain, *others = KERNELS[engine]
    asked = config.quantize.backend
    return int8_models(folder, engine, (plain, *(one for one in others if asked in (None, one))))


def _fastest_first(config: Config, result: LatencyResult, found: Sequence[SweepModel]) -> list[SweepModel]:
    """The kernels that were asked for first, or else those that won; those of a plain load unless others are faster."""
    asked = config.quantize.backend
    names = [one.name for one in found if asked in (None, one.backend)] or [one.name for one in found]
    first = result.winner(names)
    return sorted(found, key=lambda one: one.name != first)


def _log_latency(
    config: Config, evidence: LatencyEvidence, fp32: Registered, ranked: dict[Registered, list[SweepModel]]
) -> None:
    result = evidence.latency
    owners = {BASELINE: fp32.owner} | {found[0].name: version.owner for version, found in ranked.items()}
    fastest = result.winner([found[0].name for found in ranked.values()])
    floats = fair_floats(config.gate.of(next(iter(ranked)).name), evidence)
    for whose, step, values in metrics.of_latency(result, fastest, floats):
        if whose is None or whose in owners:
            tracking.log_metrics(values, step, owners[whose] if whose else None)
    if evidence.bf16:
        tracking.log_metrics(metrics.of_bf16(evidence.bf16.accuracy, evidence.bf16.top1_drop_points))
    tracking.log_table(metrics.latency_table(result), "latency")
    tracking.log_result("latency", evidence)
    for version, found in ranked.items():
        tags = {"latency_run_id": evidence.run_id} | speedup_tags(evidence, found[0].name, floats)
        tags |= latency_tags(result, found[0].name)
        if found[0].backend:
            tags["backend"] = found[0].backend
            registry.describe_kernels(version.uri, _about_kernels(result, found))
        registry.tag_version(version.uri, tags)
    registry.tag_version(fp32.uri, {"latency_run_id": evidence.run_id} | latency_tags(result, BASELINE))
    least = result.least_speedup(fastest, floats)
    tracking.set_note(
        f"{fastest} over the fastest float: **{result.mean_ratio(floats, fastest).median:.2f}x** in the mean, "
        f"{least.ratio.median:.2f}x over {least.over} at batch size {least.batch_size}, where it is least sure."
    )


def speedup_tags(evidence: LatencyEvidence, name: str, floats: Sequence[str]) -> dict[str, str]:
    """The speed-ups of an int8 model over the fastest of `floats`, as tags of its version: the mean, the smallest."""
    mean, least = evidence.latency.mean_ratio(floats, name), evidence.latency.smallest_speedup(name, floats)
    return {"mean_speedup": f"{mean.median:.3f}", "smallest_speedup": f"{least:.3f}"}


def latency_tags(result: LatencyResult, name: str) -> dict[str, str]:
    """The time of one model at the smallest batch size, as tags of its version."""
    row = min(result.rows, key=lambda row: row.batch_size)
    p50_ms = f"{row.stats[name].p50_ms:.4g}"
    return {"p50_ms": p50_ms, "p50_batch_size": str(row.batch_size), "p50_threads": str(result.threads)}


def _about_kernels(result: LatencyResult, found: list[SweepModel]) -> str:
    first = found[0]
    means = ", ".join(f"{one.backend} {result.mean_speedup(one.name):.2f}x" for one in found)
    text = f"`{first.backend}` is used by `qexp.load(uri)`; mean speed-up over fp32 as measured: {means}."
    if first.backend == "x86":
        return f"{text} It is what a plain load uses too."
    return (
        f"{text} TorchScript packs int8 weights at load for the engine of the process, `x86` unless it was set: for "
        f"the same speed without qexp, set `torch.backends.quantized.engine = {first.backend!r}` before loading. "
        "Outputs are the same either way."
    )


def gate_stage(
    config: Config, fp32: Fp32, int8s: Sequence[Int8], latency: LatencyEvidence, failed: dict[str, str]
) -> Evidence:
    """Hold each int8 version against the gate and tag it with the decision; the pipeline acts on it.

    The version chosen is the fastest of those that passed, or, if none did, of those that are accurate enough; of two
    that cannot be told apart, that of the engine named first. No alias moves where the times are not good enough for a
    verdict. `failed` says why other engines could not quantize the model.
    """
    judged = []
    for int8 in int8s:
        verified = fp32.version.verified and int8.version.verified
        gate = decide(config, fp32.evidence, int8.evidence, latency, verified)
        registry.tag_version(int8.version.uri, {"gate": gate.word, "gate_reason": gate.summary})
        judged.append(Judged(int8.evidence, latency.name_of(int8.version.uri), gate))
    best = latency.latency.winner([one.name for one in _able(config, judged)])
    judged.sort(key=lambda one: one.name != best)
    chosen = next(int8 for int8 in int8s if int8.evidence is judged[0].int8)
    floats = fair_floats(config.gate.of(chosen.version.name), latency)
    evidence = Evidence(fp32.evidence, tuple(judged), latency, judged[0].gate.passed, floats, failed)
    registry.tag_version(chosen.version.uri, verdict_tags(evidence))
    if evidence.gate.word != UNMEASURED:
        registry.make_challenger(chosen.version)
    return evidence


def verdict_tags(evidence: Evidence) -> dict[str, str]:
    """The verdict as tags of the version chosen."""
    return {"verdict": evidence.verdict.word, "verdict_reason": evidence.verdict.reason}


def _able(config: Config, judged: Sequence[Judged]) -> Sequence[Judged]:
    """Those that passed the gate, or else lose no more accuracy than it allows, or else the one that loses least."""
    drops = {one.name: one.int8.comparison["test"] for one in judged}
    limits = {one.name: config.gate.of(split_uri(one.int8.version_uri)[0]).max_top1_drop for one in judged}
    passed = [one for one in judged if one.gate.passed]
    accurate = [one for one in judged if drops[one.name].top1_drop_high_points <= limits[one.name]]
    return passed or accurate or [min(judged, key=lambda one: drops[one.name].top1_drop_points)]


def decide(
    config: Config, fp32: Fp32Evidence, int8: Int8Evidence, latency: LatencyEvidence, verified: bool
) -> GateResult:
    """The gate's decision on an int8 version from what was measured."""
    limits, result = config.gate.of(split_uri(int8.version_uri)[0]), latency.latency
    speedup = result.least_speedup(latency.name_of(int8.version_uri), fair_floats(limits, latency))
    return decide_gate(
        limits,
        fp32.accuracy["test"],
        int8.accuracy["test"],
        fp32.data.guess,
        int8.comparison["test"],
        fp32.size_bytes / int8.size_bytes,
        speedup,
        result.shortcomings,
        verified,
    )
