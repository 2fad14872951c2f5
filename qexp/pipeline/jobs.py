"""The commands of qexp: each calls the stages in order and returns what the last line on standard output shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.config import Config
from qexp.data.datasets import Dataset
from qexp.errors import StageError, StoreError
from qexp.measurement.host import Host
from qexp.pipeline import latency_stage as deciding
from qexp.pipeline import loading as registered
from qexp.pipeline import promotion, resumed, stages
from qexp.pipeline import quantize_stage as quantizing
from qexp.pipeline.quantize_stage import Int8
from qexp.pipeline.setup import prepare, prepare_for_version, with_quantization_checked
from qexp.progress import say
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import sentences
from qexp.report.results import Evidence, Fp32Evidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.store import use_store
from qexp.training import launch
from qexp.training.checkpoint import LAUNCHER_LOCK, lock_of, remove_checkpoints
from qexp.training.distributed import read_group
from qexp.training.train import train_model

Summary = dict[str, Any]
Overrides = dict[str, dict[str, Any]]


def run_main(
    config: Config, model_uri: str | None = None, resume: str | None = None, overrides: Overrides | None = None
) -> Summary | None:
    """Train (or take the registered fp32 version `model_uri`), quantize, measure, gate, report.

    With `resume`, go on with that run of this function, as it was started but for the options in `overrides` (section,
    key, text) that may change. None where other processes have done the work (`processes`).
    """
    if resume:
        use_store()
        model_uri = model_uri or tracking.find_run(resume).data.tags.get("qexp.model_uri")
        config = resumed.config_of_run(overrides or {}, resume, "run")
    config, host, dataset = prepare(config, model_uri, given=() if resume else ("data", "train"), resume=resume)
    config = with_quantization_checked(config, dataset)
    name, note = "main", f"Can {config.model} on {dataset.name} ship as int8 on this CPU?"
    trained = resume is not None and resumed.has_trained(resume)
    if model_uri or trained:
        if not read_group().leads:  # of torchrun's processes, when nothing is left that they could share
            return None
    elif _hand_over("main", config, host, dataset, name, note, resume):
        return None
    with lock_of(resume), tracking.start_run(name, note, resume) as run_id, lock_of(None if resume else run_id):
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, stages.SPLITS)
        fp32 = _fp32_of_main(config, host, dataset, model_uri, run_id)
        if not model_uri:  # of which config.yaml says how it was trained
            config = stages.with_execution(config, fp32.evidence.train.execution)
            tracking.log_setup(config, host)
        evidence, report_uri = quantize_to_report(config, host, dataset, fp32, run_id)
        tracking.log_metrics({f"headline/{name}": value for name, value in evidence.headline.items()})
        found: dict[str, str] = {"verdict": evidence.verdict.word, "gate": evidence.gate.word}
        found |= {"fp32": evidence.fp32.version_uri, "int8": evidence.int8.version_uri}
        for name, value in found.items():
            tracking.set_tag(f"qexp.{name}", value)
        tracking.set_note(f"{sentences.answer(evidence)}\n\nThe whole report: artifact `report/report.html`.")
    remove_checkpoints(run_id)
    return _summary("run", run_id, evidence, report_uri)


def _fp32_of_main(config: Config, host: Host, dataset: Dataset, model_uri: str | None, run_id: str) -> stages.Fp32:
    """The version given, the one that this run has trained before it was stopped, or a new one."""
    training = resumed.training_below(run_id)
    if model_uri:
        fp32 = registered.fp32_from_registry(model_uri, dataset)
        tracking.set_tag("qexp.model_uri", fp32.version.uri)  # an alias may have moved when the run goes on
        return fp32
    if training and training.info.status == "FINISHED":
        evidence = tracking.read_result(Fp32Evidence, training.info.run_id, "fp32")
        return registered.fp32_from_registry(evidence.version_uri, dataset)
    return stages.train_stage(config, host, dataset, training.info.run_id if training else None)


def _hand_over(
    command: str, config: Config, host: Host, dataset: Dataset, name: str, note: str, resume: str | None
) -> bool:
    """Whether this process has nothing else to do: other processes did the work, or it only follows their leader."""
    if not launch.is_worker():
        if config.train.processes == 1:
            return False
        with lock_of(resume, LAUNCHER_LOCK), tracking.start_run(name, note, resume) as run_id:
            tracking.log_setup(config, host)
            try:
                launch.run_workers(command, config, run_id, resume)
            finally:  # a process that was killed could not
                tracking.end_open_runs(tracking.children_of(run_id), "FAILED")
        return True
    if read_group().leads:
        return False
    model = stages.fresh_classifier(config, dataset)
    train_model(model, dataset, config.train, config.seed, lambda epoch: None, Path("checkpoints"))
    return True


def quantize_to_report(
    config: Config, host: Host, dataset: Dataset, fp32: stages.Fp32, parent_run_id: str | None = None
) -> tuple[Evidence, str]:
    """Everything that follows an fp32 model; the evidence and the URI of the report."""
    done = [registered.int8_of_run(run) for run in resumed.quantized_below(parent_run_id)] if parent_run_id else []
    sensitivity = resumed.sensitivity_below(parent_run_id) if parent_run_id else None
    int8s, failed = quantize_all(config, host, dataset, fp32, done, sensitivity)
    engines = {int8.version: int8.evidence.quantize.engine for int8 in int8s}
    bf16 = deciding.measure_bf16(config, host, dataset, fp32.model, fp32.logits["test"])
    latency = deciding.latency_stage(config, host, fp32.version, engines, bf16)
    evidence = deciding.gate_stage(config, fp32, int8s, latency, failed)
    while True:
        judged, champion = promotion.hold_against_champion(config, host, dataset, evidence)
        report_uri = stages.report_stage(config, host, judged, parent_run_id)
        # The alias moves last: a job that fails on its way moves none.
        if not judged.champion or promotion.succeed(judged.int8.version_uri, champion):
            return judged, report_uri
        say("another version has become champion meanwhile: comparing with that one")


def quantize_all(
    config: Config,
    host: Host,
    dataset: Dataset,
    fp32: stages.Fp32,
    done: Sequence[Int8] = (),
    sensitivity: SensitivityResult | None = None,
) -> tuple[list[Int8], dict[str, str]]:
    """An int8 version with each engine of `config`, those of `done` included, and why engines have failed, if others
    have not.

    `sensitivity` is what was measured before this run was stopped.

    Raises:
        StageError: no engine could quantize the model.
    """
    int8s, failed = {int8.evidence.quantize.engine: int8 for int8 in done}, dict[str, str]()
    left = [engine for engine in config.quantize.engine if engine not in int8s]
    if left and sensitivity is None:
        sensitivity = quantizing.sensitivity_stage(config, host, dataset, fp32)
    for engine in left:
        options = config.model_copy(update={"quantize": config.quantize.only(engine)})
        try:
            int8s[engine] = quantizing.quantize_stage(options, host, dataset, fp32, sensitivity)
        except StoreError:
            raise
        except StageError as error:
            if engine == config.quantize.engine[-1] and not int8s:
                raise
            say(f"continuing without engine {engine}: {error}")
            failed[engine] = str(error)
    return [int8s[engine] for engine in config.quantize.engine if engine in int8s], failed


def run_train(config: Config, resume: str | None = None, overrides: Overrides | None = None) -> Summary | None:
    """Train and register an fp32 version. `resume`, `overrides` and None are as in `run_main`."""
    if resume:
        use_store()
        config = resumed.config_of_run(overrides or {}, resume, "train")
    config, host, dataset = prepare(config, None, resume=resume)
    name, note = f"train-{config.model}", f"Training of {config.model} on {dataset.name}."
    if _hand_over("train", config, host, dataset, name, note, resume):
        return None
    fp32 = stages.train_stage(config, host, dataset, resume)
    top1 = fp32.evidence.accuracy["test"].top1_percent
    uri, seen = fp32.version.uri, dataset.duplicates.test_images_seen
    found = {"fp32": uri, "fp32_top1_percent": top1, "test_images_also_in_training": seen}
    return {"command": "train", "run_id": fp32.version.run_id, **found}


def run_quantize(config: Config, model_uri: str) -> Summary:
    """Quantize the registered fp32 version `model_uri` and register the int8 version."""
    config, host, dataset = prepare(config, model_uri)
    config = with_quantization_checked(config, dataset)
    fp32 = registered.fp32_from_registry(model_uri, dataset)
    int8s, failed = quantize_all(config, host, dataset, fp32)
    for int8 in int8s:
        registry.make_challenger(int8.version)
    found = [_figures_of(fp32, int8) for int8 in int8s]
    more: Summary = {"versions": found} if len(found) > 1 else {}
    more |= {"failed_engines": failed} if failed else {}
    more["test_images_also_in_training"] = dataset.duplicates.test_images_seen
    return {"command": "quantize", "run_id": int8s[0].version.run_id, "fp32": fp32.version.uri, **found[0], **more}


def _figures_of(fp32: stages.Fp32, int8: Int8) -> Summary:
    return {
        "int8": int8.version.uri,
        "engine": int8.evidence.quantize.engine,
        "int8_top1_percent": int8.evidence.accuracy["test"].top1_percent,
        "top1_drop_points": int8.evidence.comparison["test"].top1_drop_points,
        "size_ratio": fp32.version.size_bytes / int8.version.size_bytes,
    }


def run_latency(config: Config, model_uri: str) -> Summary:
    """Time the registered int8 version `model_uri` against the fp32 version that it came from."""
    config, host = prepare_for_version(config, model_uri)
    int8 = registry.find_version(model_uri, "int8")
    fp32 = registry.find_version(int8.tags["fp32_uri"], "fp32")
    version = registry.from_entity(int8)
    bf16 = registered.bf16_of(int8.tags)  # timing does not change its accuracy
    evidence = deciding.latency_stage(config, host, registry.from_entity(fp32), {version: int8.tags["engine"]}, bf16)
    name = evidence.name_of(version.uri)
    result, floats = evidence.latency, deciding.fair_floats(config.gate.of(version.name), evidence)
    over_fp32 = {str(row.batch_size): row.speedups[name].median for row in result.rows}
    over_floats = {str(found.batch_size): found.ratio.median for found in result.speedups(name, floats)}
    uris = {"fp32": evidence.fp32_uri, "int8": version.uri}
    times = {"speedup_by_batch_size": over_floats, "speedup_over_fp32_by_batch_size": over_fp32}
    good_enough = {"shortcomings": list(result.shortcomings)} if result.shortcomings else {}
    return {"command": "latency", "run_id": evidence.run_id, **uris, **times, **good_enough}


def run_report(config: Config, model_uri: str) -> Summary:
    """Write the report on the registered int8 version `model_uri` from what its runs have logged."""
    config, host = prepare_for_version(config, model_uri)
    evidence = registered.evidence_of_version(config, model_uri)
    report_uri = stages.report_stage(config, host, evidence)
    return _summary("report", report_uri.split("/")[1], evidence, report_uri)


def _summary(command: str, run_id: str, evidence: Evidence, report_uri: str) -> Summary:
    uris = {"fp32": evidence.fp32.version_uri, "int8": evidence.int8.version_uri, "report": report_uri}
    engine = {"engine": evidence.int8.quantize.engine}
    found = evidence.decision | evidence.headline | evidence.images_seen_before
    return {"command": command, "run_id": run_id, **uris, **engine, **found}
