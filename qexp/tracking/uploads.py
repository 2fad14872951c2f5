"""What each result of a stage looks like in MLflow: metrics, tables, artifacts, tags, notes, and registered versions.

One function a kind of result. Each logs to the active run and can be repeated: what is there already stays as it is.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion
from torch import Tensor

from qexp.errors import InputError
from qexp.foundation.text import opaque
from qexp.measurement.agreement import LogitsAgreement
from qexp.measurement.gate import PASSED
from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyResult
from qexp.measurement.sweep_models import BASELINE, SweepModel, backend_in
from qexp.models.classifier import save_classifier
from qexp.models.names import RUNTIMES, short_name
from qexp.models.published import sha256_of
from qexp.models.taken import as_model, count_parameters, is_rebuilt
from qexp.quantization import KERNELS
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import sentences
from qexp.report.promotion import CANDIDATE, FORCED, Promotion
from qexp.report.results import Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence, ThroughputEvidence
from qexp.tracking import description, metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.registry import Registered
from qexp.tracking.results import Fp32, NewModel, WrittenReport
from qexp.tracking.store import logged_model_of, model_id_of, page_of_run, split_uri
from qexp.tracking.sweeps import RECORDED, write_recorded
from qexp.tracking.tags import tags_of
from qexp.tracking.training_log import log_curves

DIFFERING, NONE = "logits_differ", "none"  # tag of a version, and its value once that is no longer so
LAYER_TABLE = "model_summary.txt"  # artifact of the runs that train and quantize


@singledispatch
def upload(result: Any, folder: Path, at_ms: int) -> Any:
    """Log a result in the active run; what later stages take, which knows the run and the registered version.

    Args:
        folder: of the stage, with the files that belong to the result.
        at_ms: when the result was found; the time of all its metrics.

    Raises:
        StageError: the store fails, or the disk of its artifacts. Whatever is missing is uploaded the next time.
    """
    raise TypeError(type(result))


@upload.register
def _new_model(result: NewModel, folder: Path, at_ms: int) -> Fp32 | Int8Evidence:
    if isinstance(result.evidence, Fp32Evidence):
        return _fp32(result, result.evidence, at_ms)
    return _int8(result, result.evidence, at_ms)


def _fp32(new: NewModel, evidence: Fp32Evidence, at_ms: int) -> Fp32:
    run_id = _run_id()
    if evidence.train:
        log_curves(evidence.train.epochs, tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH))
    name = f"{short_name(evidence.model)}-{evidence.data.name}-fp32"
    tags = {"train_run_id": run_id} | _log_weights(new.stored, run_id) | new.tags
    version = _registered("fp32", new, name, tags)
    evidence = _with_version(evidence, version)
    tracking.log_result("fp32", evidence)
    tracking.log_text(new.layers, LAYER_TABLE)
    top1 = evidence.accuracy["test"].top1_percent
    of = f"with the weights of epoch {evidence.train.best_epoch}" if evidence.train else "as it was trained elsewhere"
    tracking.set_note(
        f"{opaque(evidence.model)} on {opaque(evidence.data.name)}: test top-1 **{top1:.2f} %** {of}; registered as "
        f"`{opaque(version.uri)}`."
    )
    values = metrics.of_model(evidence.accuracy, version.size_bytes, count_parameters(new.stored))
    tracking.log_metrics(values, owner=version.owner, at_ms=at_ms)
    registry.make_challenger(version)  # last: a stage that fails on its way moves no alias
    return Fp32(as_model(new.stored, new.spec), version, evidence, new.logits)


def _int8(new: NewModel, evidence: Int8Evidence, at_ms: int) -> Int8Evidence:
    fp32_version = registry.from_entity(registry.find_version(new.tags["fp32_uri"], "fp32"))
    fp32 = tracking.read_result(Fp32Evidence, new.tags["train_run_id"], "fp32")
    name = fp32_version.name.removesuffix("-fp32") + "-int8"
    tracking.log_models([fp32_version.model_id])
    tags = {"quantize_run_id": _run_id()} | new.tags
    version = _registered("int8", new, name, tags)
    evidence = _with_version(evidence, version)
    accuracy, test, cost = evidence.accuracy, evidence.comparison["test"], evidence.cost
    values = metrics.of_model(accuracy, version.size_bytes, cost.parameters)
    values |= metrics.of_comparison(test) | {"int8_macs_percent": cost.int8_percent}
    for runtime, found in evidence.runtimes.items():
        values |= metrics.of_runtime(runtime, found.accuracy["test"], found.comparison["test"])
    tracking.log_metrics(values, owner=version.owner, at_ms=at_ms)
    for model_id, counted in ((fp32_version.model_id, evidence.fp32_cost), (version.model_id, cost)):
        for batch_size, count in counted.macs.items():
            tracking.log_metrics({"macs": count}, batch_size, (_run_id(), model_id), at_ms)
    others = {f"int8 {runtime}": found.accuracy for runtime, found in evidence.runtimes.items()}
    tracking.log_table(metrics.accuracy_table({"fp32": fp32.accuracy, "int8": accuracy} | others), "accuracy")
    if new.recorded:
        with TemporaryDirectory() as folder:
            write_recorded(new.recorded, Path(folder))
            tracking.log_folder(Path(folder), RECORDED)
    tracking.log_result("int8", evidence)
    tracking.set_note(
        f"`{opaque(fp32_version.uri)}` as int8: test top-1 **{accuracy['test'].top1_percent:.2f} %**, drop "
        f"{test.top1_drop_points:.2f} points; registered as `{opaque(version.uri)}`."
    )
    tracking.log_text(new.layers, LAYER_TABLE)
    return evidence


def _registered(kind: str, new: NewModel, name: str, tags: dict[str, Any]) -> Registered:
    def model(images: Tensor) -> Tensor:
        return new.expected

    return registry.register(kind, model, name, new.spec, new.sample, tags, new.stored, once=True)


def _with_version(evidence: Any, version: Registered) -> Any:
    size, contents, verified = version.size_bytes, version.contents, version.verified
    return replace(evidence, version_uri=version.uri, size_bytes=size, contents=contents, verified=verified)


def _log_weights(model: Any, run_id: str) -> dict[str, str]:
    """The file from which a classifier is built again, and the tags that name it; of other models there is none."""
    if not is_rebuilt(model):
        return {}
    with TemporaryDirectory() as folder:
        save_classifier(model, file := Path(folder, "model.safetensors"))
        digest = sha256_of(file)
        tracking.log_folder(Path(folder), "weights", run_id)
    return {"weights_uri": f"runs:/{run_id}/weights/model.safetensors", "weights_sha256": digest}


@upload.register
def _sensitivity(result: SensitivityResult, folder: Path, at_ms: int) -> SensitivityResult:
    tracking.log_table(metrics.columns([asdict(layer) for layer in result.layers]), "sensitivity")
    tracking.log_result("sensitivity", result)
    return result


@upload.register
def _latency(result: LatencyEvidence, folder: Path, at_ms: int) -> LatencyEvidence:
    """To the run, to the models, and as tags of the versions."""
    evidence, found = replace(result, run_id=_run_id()), result.latency
    limits = tracking.read_config(evidence.run_id).gate
    fp32 = registry.from_entity(registry.find_version(evidence.fp32_uri, "fp32"))
    versions = {uri: registry.find_version(uri, "int8") for uri in evidence.names}
    # In this run: those that made the models may be gone, or belong to others.
    models = {evidence.name_of(uri): logged_model_of(version) for uri, version in versions.items()}
    tracking.log_models((fp32.model_id, *models.values()))
    fastest = found.winner(list(models))
    floats = evidence.fair_floats(limits.of(split_uri(next(iter(versions)))[0]))
    _log_times(found, fastest, floats, {found.baseline: fp32.model_id} | models, at_ms)
    if by_threads := evidence.best_threads(fastest, floats):
        for step, values in metrics.of_threads(by_threads):
            tracking.log_metrics(values, step, at_ms=at_ms)
        tracking.log_table(metrics.threads_table(by_threads), "threads")
    for name, rounded in evidence.rounded.items():
        tracking.log_metrics(metrics.of_bf16(name, rounded.accuracy, rounded.top1_drop_points), at_ms=at_ms)
    tracking.log_result("latency", evidence)
    for uri, version in versions.items():
        kernels = _with_kernels(tags_of(version).engine, evidence.names[uri])
        tags = {"latency_run_id": evidence.run_id} | _speedup_tags(found, kernels[0].name, floats)
        tags |= _latency_tags(found, kernels[0].name)
        if backend := kernels[0].backend:
            tags |= _tags_of_runtime(version, backend) if backend in RUNTIMES else {"backend": backend}
            registry.describe_kernels(uri, description.about_kernels(found, kernels))
        if compared := evidence.logits.get(uri):
            tags |= _differing_tag(version.tags.get(DIFFERING, NONE), compared, evidence.host)
        registry.tag_version(uri, tags)
    with registry.others_left_alone(fp32.uri):
        registry.tag_version(fp32.uri, {"latency_run_id": evidence.run_id} | _latency_tags(found, BASELINE))
    least = found.least_speedup(fastest, floats)
    tracking.set_note(
        f"{fastest} over the fastest float: **{found.mean_ratio(floats, fastest).median:.2f}x** in the mean, "
        f"{least.ratio.median:.2f}x over {least.over} at batch size {least.batch_size}, where it is least sure."
    )
    return evidence


def _differing_tag(known: str, compared: LogitsAgreement, host: Host) -> dict[str, str]:
    """The CPUs on which the logits of a version are not those that were recorded: `known` ones, and this one if so.
    CPUs of one name may have different instructions."""
    cpu = f"{host.cpu} ({', '.join(host.features) or 'instructions unknown'})"
    others = [text for text in known.split("; ") if text != NONE and not text.endswith(f" on {cpu}")]
    here = [] if compared.within_one_step else [f"{compared.text} on {cpu}"]
    told = "; ".join([*others, *here]) or NONE
    return {} if told == known else {DIFFERING: told}


def _log_times(result: LatencyResult, chosen: str, floats: Sequence[str], models: dict[str, str], at_ms: int) -> None:
    """To the active run; `models` has the ids of logged models by the names under which they were timed."""
    for whose, step, values in metrics.of_latency(result, chosen, floats):
        if whose is None or whose in models:
            tracking.log_metrics(values, step, (_run_id(), models[whose]) if whose else None, at_ms)
    tracking.log_table(metrics.latency_table(result), "latency")


def _tags_of_runtime(version: ModelVersion, runtime: str) -> dict[str, Any]:
    """The runtime of an ONNX file as a tag of its version, and with it the accuracy that was measured in it."""
    try:
        found: Int8Evidence = tracking.read_result(Int8Evidence, tags_of(version).quantize_run_id, "int8")
    except InputError:  # its run is gone: the tags stay those of ONNX Runtime, which alone was timed then
        return {"runtime": runtime}
    found = found.in_runtime(runtime)
    if found.runtime is None:  # of an earlier version of qexp, which knew of one runtime
        return {"runtime": runtime}
    accuracy, drop = found.accuracy["test"], found.comparison["test"]
    return {"runtime": runtime} | metrics.tags_of_accuracy(accuracy) | metrics.tags_of_drop(drop)


def _with_kernels(engine: str, names: Sequence[str]) -> list[SweepModel]:
    return [SweepModel(name, "", backend_in(name, engine) or KERNELS[engine][0]) for name in names]


def _speedup_tags(result: LatencyResult, name: str, floats: Sequence[str]) -> dict[str, str]:
    """The speed-ups of an int8 model over the fastest of `floats`, as tags of its version: the mean, the smallest."""
    mean, least = result.mean_ratio(floats, name), result.smallest_speedup(name, floats)
    return {"mean_speedup": f"{mean.median:.3f}", "smallest_speedup": f"{least:.3f}"}


def _latency_tags(result: LatencyResult, name: str) -> dict[str, str]:
    """The time of one model at the smallest batch size, as tags of its version."""
    row = min(result.rows, key=lambda row: row.batch_size)
    p50_ms = f"{row.stats[name].p50_ms:.4g}"
    return {"p50_ms": p50_ms, "p50_batch_size": str(row.batch_size), "p50_threads": str(result.threads)}


@upload.register
def _throughput(result: ThroughputEvidence, folder: Path, at_ms: int) -> ThroughputEvidence:
    """To the run, and as a tag of the version, by which the report finds it."""
    found = replace(result, run_id=_run_id())
    tracking.log_models(map(model_id_of, (found.fp32_uri, found.int8_uri)))
    for step, values in metrics.of_throughput(found):
        tracking.log_metrics(values, step, at_ms=at_ms)
    tracking.log_table(metrics.throughput_table(found), "throughput")
    tracking.log_result("throughput", found)
    registry.tag_version(found.int8_uri, {"throughput_run_id": found.run_id})
    tracking.set_note(" ".join(sentences.throughput(opaque(found))))
    return found


@upload.register
def _promotion(result: Promotion, folder: Path, at_ms: int) -> Promotion:
    """In the run and in the version's tags: what was decided, why, when and at whose word."""
    run_id = _run_id()
    tracking.log_models(map(model_id_of, filter(None, (result.uri, result.champion_uri))))
    found = replace(result, measured=replace(result.measured, run_id=run_id))
    _log_times(found.measured.latency, CANDIDATE, found.floats, {}, at_ms)
    tracking.log_result("latency", found.measured)
    tracking.log_result("promotion", found)
    tracking.log_metrics(found.figures, at_ms=at_ms)
    tags = _promotion_tags(found, run_id, at_ms)
    if registry.look_up(found.uri).tags.get("promotion_at", "") <= tags["promotion_at"]:  # no later one has decided
        registry.tag_version(found.uri, tags)
    tracking.set_tag("qexp.promotion", found.word)
    tracking.set_note("`{0.uri}` {0.summary}.".format(opaque(found)))
    return found


def _promotion_tags(found: Promotion, run_id: str, at_ms: int) -> dict[str, str]:
    by = tracking.find_run(run_id).data.tags.get("mlflow.user", "unknown")
    at = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
    stays = found.succession if found.succession and not found.succession.replaces else None
    tags = {
        "promotion": found.word,
        "promotion_reason": found.summary,
        "promotion_run_id": run_id,
        "promotion_by": by,
        "promotion_at": at,
        "champion_kept": str(found.champion_uri) if stays else "none",
        "champion_compared": str(found.succession is not None and found.succession.compared).lower(),
        "champion_kept_reason": "; ".join(stays.reasons) if stays else "none",
    }
    has = registry.look_up(found.uri).tags
    # What its own job has found stays, by limits that those of this one need not be, unless this is better news.
    outdated = found.word == "passed" and has.get("gate") != PASSED
    if outdated or "gate" not in has:
        tags |= {"gate": found.gate.word, "gate_reason": found.gate.summary}
        tags |= {"verdict": found.verdict.word, "verdict_reason": found.verdict.reason}
    if found.word == FORCED:
        tags |= {"forced_reason": "; ".join(found.reasons), "forced_by": by, "forced_at": at}
    timed = has.get("latency_run_id")
    if outdated or timed in (None, has.get("promotion_run_id")):  # by no job, or by a promotion before
        result = found.measured.latency
        tags |= {"latency_run_id": run_id} | _speedup_tags(result, CANDIDATE, found.floats)
        tags |= _latency_tags(result, CANDIDATE)
    return tags


@upload.register
def _report(result: WrittenReport, folder: Path, at_ms: int) -> str:
    """To its run, and to that of the job above it; the URI of the page."""
    run_id = _run_id()
    parent = tracking.find_run(run_id).data.tags.get("mlflow.parentRunId")
    for owner in filter(None, (run_id, parent)):
        tracking.log_folder(folder / "report", "report", owner)
    tracking.log_models([model_id_of(result.int8_uri)])
    tracking.log_result("report", result)
    registry.tag_version(result.int8_uri, {"report_run_id": run_id})
    return f"runs:/{run_id}/report/report.html"


def upload_decision(evidence: Evidence) -> None:
    """The gate's decision as tags of each int8 version, the verdict as those of the version chosen."""
    for judged in evidence.versions:
        tags = {"gate": judged.gate.word, "gate_reason": judged.gate.summary}
        registry.tag_version(judged.int8.version_uri, tags)
    chosen = evidence.int8.version_uri
    registry.tag_version(chosen, {"verdict": evidence.verdict.word, "verdict_reason": evidence.verdict.reason})


def upload_answer(evidence: Evidence) -> None:
    """The answer of a whole job, in its run: the verdict and what it rests on, as metrics and tags that the table of
    runs shows, and as a note; and the models that it has read and made."""
    run_id = _run_id()
    tracking.log_metrics({f"headline/{name}": evidence.headline[name] for name in metrics.HEADLINE})
    tags = {"verdict": evidence.verdict.word, "engine": evidence.int8.quantize.engine, "gate": evidence.gate.word}
    tags |= {"fp32": evidence.fp32.version_uri, "int8": evidence.int8.version_uri}
    for name, value in tags.items():
        tracking.set_tag(f"qexp.{name}", value)
    fp32 = model_id_of(evidence.fp32.version_uri)
    int8s = [model_id_of(judged.int8.version_uri) for judged in evidence.versions]
    given = "qexp.model_uri" in tracking.find_run(run_id).data.tags  # then fp32 was there before
    tracking.log_models([fp32] if given else [], int8s if given else [fp32, *int8s])
    report = page_of_run(run_id, "artifacts/report/report.html")
    tracking.set_note(f"{sentences.answer(opaque(evidence))}\n\n[The whole report]({report})")


def _run_id() -> str:
    active = mlflow.active_run()
    assert active is not None
    return str(active.info.run_id)
