"""The commands of qexp: each calls the stages in order and returns what the last line on standard output shows."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qexp.config import Config
from qexp.errors import InputError, StageError, StoreError
from qexp.foundation.extras import why_missing
from qexp.foundation.tables import Table
from qexp.foundation.text import opaque
from qexp.measurement.gate import UNMEASURED
from qexp.measurement.threads import ThreadsRow
from qexp.models.names import short_name
from qexp.models.taken import is_onnx
from qexp.pipeline import loading
from qexp.pipeline.checked import answer_table
from qexp.pipeline.decide import decide
from qexp.pipeline.hosts import TABLE, known_hosts, logits_here
from qexp.pipeline.job import Inputs, Job, open_job, run_at_the_top
from qexp.pipeline.measure import ToTime, measure_bf16, time_versions
from qexp.pipeline.promote import hold_against_champion
from qexp.pipeline.quantize import calibration, find_sensitivity, foldings, quantize, sensitivity_images
from qexp.pipeline.report import report
from qexp.pipeline.resume import Overrides, config_of_run, has_stage, model_of_run
from qexp.pipeline.setup import (
    Setup,
    check_kept,
    engines_of,
    prepare,
    prepare_for_version,
    try_engines,
    with_quantization_checked,
)
from qexp.pipeline.shares import follow as follow_evaluation
from qexp.pipeline.shares import leading
from qexp.pipeline.take import take, take_model, with_answers
from qexp.pipeline.train import follow, train
from qexp.progress import say
from qexp.quantization import KERNELS
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import tables
from qexp.report.results import Bf16Evidence, Evidence, Int8Evidence, LatencyEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import succeed
from qexp.tracking.job_folder import LAUNCHER_LOCK
from qexp.tracking.results import Fp32
from qexp.tracking.store import uri_of, use_store
from qexp.tracking.training_log import TrainingLog
from qexp.tracking.uploads import upload_answer, upload_decision
from qexp.training import launch
from qexp.training.distributed import read_group

Summary = dict[str, Any]


def run_main(
    config: Config,
    model_uri: str | None = None,
    resume: str | None = None,
    overrides: Overrides | None = None,
    command: Sequence[str] = (),
) -> Summary | None:
    """What `whole_job` has found, as the last line of `qexp run`."""
    done = whole_job(config, model_uri, resume, overrides, command)
    return summary_of("run", done) if done else None


def whole_job(
    config: Config,
    model_uri: str | None = None,
    resume: str | None = None,
    overrides: Overrides | None = None,
    command: Sequence[str] = (),
    module: nn.Module | None = None,
) -> "Reported | None":
    """Train (or take a model that was trained elsewhere, which may be `module`, or the registered fp32 version
    `model_uri`), quantize, measure, gate, report.

    With `resume`, that run of this function is resumed, as it was started but for the options in `overrides` (section,
    key, text) that may change. `command` is what Python is to run for several training processes. Returns None where
    other processes have done the work.
    """
    if resume:
        use_store()
        model_uri = model_of_run(resume, model_uri)
        config = config_of_run(overrides or {}, resume, "run")
    given = () if resume else ("data", "preprocess", "train")
    setup = prepare(config, model_uri, given, resume, named=module is None)
    config, host, dataset = setup = setup._replace(config=with_quantization_checked(setup.config, setup.dataset))
    only_evaluated = config.trained_elsewhere or bool(model_uri)
    if only_evaluated and not read_group().leads:
        follow_evaluation(dataset)
        return None
    taken = None
    if not model_uri and config.trained_elsewhere:
        if not (resume and has_stage(resume, _name_of_taking(config))):
            taken = take(config, dataset, module)
            check_kept(config, taken)
    elif not (model_uri or resume or launch.is_worker()):
        try_engines(config, dataset)
    name, note = (
        f"{short_name(config.model)}-{dataset.name}",
        f"Can {config.model} on {opaque(dataset.name)} ship as int8 on this CPU?",
    )
    if not only_evaluated:
        if resume and has_stage(resume, f"train-{short_name(config.model)}"):
            if not read_group().leads:  # of torchrun's processes, when nothing is left that they could share
                return None
        elif _trained_by_others(setup, "main", name, note, resume, command):
            return None
    with leading() if only_evaluated else nullcontext(), open_job(host, config, name, note, resume) as job:
        tracking.log_datasets(dataset, dataset.parts)  # which a resumed run must be given again
        if model_uri:
            model_uri = uri_of(registry.find_version(model_uri, "fp32"))
            tracking.set_tag("qexp.model_uri", model_uri)  # an alias may have moved when the run is resumed
            fp32 = loading.fp32_from_registry(model_uri, dataset)
            setup = setup._replace(dataset=with_answers(dataset, fp32.model.spec, fp32.logits))
        elif config.trained_elsewhere:
            fp32 = take_stage(job, setup, taken)
            setup = setup._replace(dataset=with_answers(dataset, fp32.model.spec, fp32.logits))
        else:
            fp32 = train_stage(job, setup)
            assert fp32.evidence.train is not None
            setup = setup._replace(config=config.with_training(fp32.evidence.train.execution))
            tracking.log_setup(setup.config, host)  # which now says how the model was trained
        done = quantize_to_report(job, setup, fp32)
        upload_answer(done.evidence)
    return done


def _trained_by_others(
    setup: Setup, stage: str, name: str, note: str, resume: str | None, command: Sequence[str]
) -> bool:
    """Whether this process has nothing else to do: other processes do the work, or it only follows their leader."""
    config = setup.config
    if launch.is_worker():
        if read_group().leads:
            return False
        follow(config, setup.dataset)
        return True
    if config.train.processes == 1:
        return False
    if not command:
        raise InputError(f"--processes {config.train.processes}: only the command line starts several processes")
    with run_at_the_top(name, note, resume, LAUNCHER_LOCK, stage) as run_id:
        tracking.log_setup(config, setup.host)
        again = ["--resume", resume] if resume else None
        if again and stage == "main" and config.output_dir:
            again += ["--output-dir", config.output_dir]
        try:
            launch.run_workers(command, config, {"MLFLOW_RUN_ID": run_id}, again)
        finally:  # a process that was killed could not
            tracking.end_open_runs(tracking.children_of(run_id), "FAILED")
    return True


def train_stage(job: Job, setup: Setup, resume: str | None = None) -> Fp32:
    """An fp32 version of the registry, trained now or before the job was stopped. `resume` is the run of a training to
    resume where the job has no run of its own."""
    config, host, dataset = setup
    log = TrainingLog(config, host)
    name = f"train-{short_name(config.model)}"
    return job.stage(
        name,
        f"Training of {config.model} on {opaque(dataset.name)}.",
        config,
        lambda folder: train(config, host, dataset, folder, log.settled, log.epoch),
        read=lambda run_id: loading.fp32_of_run(run_id, dataset),
        inputs=Inputs(dataset),
        resume=resume or job.unfinished(name),
    )


def take_stage(job: Job, setup: Setup, taken: Any) -> Fp32:
    """An fp32 version of the registry of a model that was trained elsewhere, as `take` gives it; None where this job
    has registered it before it was stopped."""
    config, host, dataset = setup
    return job.stage(
        _name_of_taking(config),
        f"{opaque(config.model)}, trained elsewhere, on {opaque(dataset.name)}.",
        config,
        lambda folder: take_model(config, host, dataset, taken),
        read=lambda run_id: loading.fp32_of_run(run_id, dataset),
        inputs=Inputs(dataset, splits=tuple(name for name in ("validation", "test") if len(getattr(dataset, name)))),
    )


def _name_of_taking(config: Config) -> str:
    return f"import-{short_name(config.model)}"


@dataclass(frozen=True)
class Reported:
    """The answer of a job, its run, and the URI of the page that gives it; both are empty where nothing is logged."""

    evidence: Evidence
    run_id: str
    report_uri: str


def quantize_to_report(job: Job, setup: Setup, fp32: Fp32) -> Reported:
    """Everything that follows an fp32 model: quantize, measure, decide, report, and last of all the alias."""
    quantized = quantize_all(job, setup, fp32)
    config, host, dataset = setup
    to_time = {int8.version_uri: ToTime.of(int8) for int8 in quantized.int8s}
    folded = any(one.folded for one in to_time.values())
    latency = latency_stage(
        job,
        setup.config,
        fp32.version.uri,
        to_time,
        lambda: measure_bf16(config, host, dataset, fp32.model, fp32.logits["test"], folded),
    )
    evidence = decide(config, fp32.evidence, quantized.int8s, latency, quantized.failed)
    upload_decision(evidence)
    while True:
        judged = hold_against_champion(job, setup, evidence)
        report_uri = report_stage(job, config, judged)
        # Aliases move last: a job that fails on its way moves none.
        if judged.gate.word != UNMEASURED:
            registry.make_challenger(registry.from_entity(registry.find_version(judged.int8.version_uri, "int8")))
        if not judged.champion or succeed(judged.int8.version_uri, judged.before_uri):
            return Reported(judged, str(job.run_id), report_uri)
        say("another version has become champion meanwhile: comparing with that one")


@dataclass(frozen=True)
class Quantized:
    """An int8 version with each engine that could quantize the model, and why the others could not."""

    int8s: list[Int8Evidence]
    failed: dict[str, str]


def quantize_all(job: Job, setup: Setup, fp32: Fp32) -> Quantized:
    """Quantize with each engine of the configuration; with `quick`, where none was named, with the first that takes it.

    Raises:
        StageError: no engine could quantize the model.
    """
    int8s, failed = list[Int8Evidence](), dict[str, str]()
    any_will_do = setup.config.quick and not setup.config.quantize.engine
    engines, folds = engines_of(setup.config, is_onnx(fp32.model)), foldings(setup.config, fp32)
    if not (setup.config.quantize.engine or any_will_do or is_onnx(fp32.model)):
        failed = why_missing(KERNELS)
    setup = setup._replace(config=setup.config.with_engines(*engines))
    sensitivity = sensitivity_stage(job, setup, fp32)
    for engine in engines:
        if any_will_do and int8s:
            break
        for fold in folds:
            name = _name_of(engine, fold)
            try:
                int8s.append(quantize_stage(job, setup, fp32, engine, sensitivity, fold))
            except StoreError:
                raise
            except StageError as error:
                if engine == engines[-1] and not int8s:
                    raise
                say(f"continuing without engine {name}: {error}")
                failed[name] = str(error)
                break
    return Quantized(int8s, failed)


def _name_of(engine: str, fold: bool) -> str:
    return f"{engine} with a pool folded away" if fold else engine


def sensitivity_stage(job: Job, setup: Setup, fp32: Fp32) -> SensitivityResult | None:
    """What each layer costs in int8; None where nobody asks for it."""
    config, host, dataset = setup
    if not (sensitivity_images(config) and len(dataset.validation)) or is_onnx(fp32.model):
        return None
    return job.stage(
        f"sensitivity-{short_name(config.model)}",
        f"Layer by layer: `{opaque(fp32.version.uri)}` in int8.",
        config,
        lambda folder: find_sensitivity(config, host, dataset, fp32),
        read=lambda run_id: tracking.read_result(SensitivityResult, run_id, "sensitivity"),
    )


def quantize_stage(
    job: Job, setup: Setup, fp32: Fp32, engine: str, sensitivity: SensitivityResult | None, fold: bool
) -> Int8Evidence:
    """An int8 version of the registry, made with one engine, with or without a pool folded away."""
    must_fold = fold and setup.config.quantize.fold_pool is None  # or it would be the same version twice
    options = setup.config.quantize.only(engine).with_folding(fold)
    config = setup.config.model_copy(update={"quantize": options})
    subset, digest = calibration(config, setup.dataset)
    return job.stage(
        f"quantize-{engine}{'-folded' if must_fold else ''}-{len(subset)}",
        f"Quantization of `{opaque(fp32.version.uri)}`.",
        config,
        lambda folder: quantize(config, setup.host, setup.dataset, fp32, sensitivity, must_fold),
        read=loading.int8_of_run,
        inputs=Inputs(setup.dataset, calibration=(subset, digest)),
    )


def latency_stage(
    job: Job, config: Config, fp32_uri: str, int8s: dict[str, ToTime], bf16: Any, compare: bool = False
) -> LatencyEvidence:
    """The times of registered versions; `int8s` are by URI. With `compare`, their logits on this machine too, beside
    those that were recorded where they were made."""

    def work(folder: Path) -> LatencyEvidence:
        found: dict[str, Bf16Evidence] = bf16()
        with job.files(fp32_uri, *int8s) as files:
            environment = registry.child_environment(job.host.threads)
            evidence = time_versions(config, job.host, files, int8s, found, environment)
            return replace(evidence, logits=logits_here(evidence, files)) if compare else evidence

    uris = ", ".join(f"`{opaque(uri)}`" for uri in (fp32_uri, *int8s))
    return job.stage(
        f"latency-{short_name(config.model)}",
        f"Latency of {uris}.",
        config,
        work,
        read=lambda run_id: tracking.read_result(LatencyEvidence, run_id, "latency"),
        holds=lambda found: set(found.names) == set(int8s),
    )


def report_stage(job: Job, config: Config, evidence: Evidence) -> str:
    """The URI of the report's page. It is always written anew: what it says of the champion may have changed."""
    return job.stage(
        "report",
        f"Report on `{opaque(evidence.int8.version_uri)}`: see the artifacts.",
        config,
        lambda folder: report(evidence, folder, config.output_dir, job.run_id),
        read=str,
        holds=None,
    )


def run_import(config: Config, module: nn.Module | None = None) -> Summary | None:
    """Register a model that was trained elsewhere as an fp32 version, evaluated on the test images. None in a process
    that only helps another one."""
    setup = prepare(config, None, named=module is None)
    if not read_group().leads:
        follow_evaluation(setup.dataset)
        return None
    with leading():
        fp32 = take_stage(Job(setup.host), setup, take(setup.config, setup.dataset, module))
    top1 = fp32.evidence.accuracy["test"].top1_percent
    found = {"fp32": fp32.version.uri, "fp32_top1_percent": top1}
    return {"command": "import", "run_id": fp32.version.run_id, **found}


def run_train(
    config: Config, resume: str | None = None, overrides: Overrides | None = None, command: Sequence[str] = ()
) -> Summary | None:
    """Train and register an fp32 version. `resume`, `overrides`, `command` and None are as in `run_main`."""
    if resume:
        use_store()
        config = config_of_run(overrides or {}, resume, "train")
    if config.trained_elsewhere and config.has_weights:
        raise InputError("--epochs: must be given to train from these weights on; `qexp import` takes a model as it is")
    setup = prepare(config, None, resume=resume)
    if not (resume or launch.is_worker()):
        try_engines(setup.config, setup.dataset, needed=False)
    model = setup.config.model
    name, note = f"train-{short_name(model)}", f"Training of {model} on {opaque(setup.dataset.name)}."
    if _trained_by_others(setup, "train", name, note, resume, command):
        return None
    fp32 = train_stage(Job(setup.host), setup, resume)
    top1 = fp32.evidence.accuracy["test"].top1_percent
    uri, seen = fp32.version.uri, setup.dataset.duplicates.test_images_seen
    found = {"fp32": uri, "fp32_top1_percent": top1, "test_images_also_in_training": seen}
    return {"command": "train", "run_id": fp32.version.run_id, **found}


def run_quantize(config: Config, model_uri: str) -> Summary | None:
    """Quantize the registered fp32 version `model_uri` and register the int8 version. None in a process that only helps
    another one."""
    setup = prepare(config, model_uri)
    setup = setup._replace(config=with_quantization_checked(setup.config, setup.dataset))
    if not read_group().leads:
        follow_evaluation(setup.dataset)
        return None
    with leading():
        return _quantized(setup, model_uri)


def _quantized(setup: Setup, model_uri: str) -> Summary:
    fp32 = loading.fp32_from_registry(model_uri, setup.dataset)
    check_kept(setup.config, fp32.model)
    setup = setup._replace(dataset=with_answers(setup.dataset, fp32.model.spec, fp32.logits))
    again = shlex.join(["qexp", "quantize", "--model-uri", fp32.version.uri])
    quantized = quantize_all(Job(setup.host, again=again), setup, fp32)
    first = registry.from_entity(registry.find_version(quantized.int8s[0].version_uri, "int8"))
    found = [_figures_of(fp32, int8) for int8 in quantized.int8s]
    more: Summary = {"versions": found} if len(found) > 1 else {}
    more |= {"failed_engines": quantized.failed} if quantized.failed else {}
    if counted := fp32.evidence.data.duplicates:
        more["test_images_also_in_training"] = counted.test_images_seen
    return {"command": "quantize", "run_id": first.run_id, "fp32": fp32.version.uri, **found[0], **more}


def _figures_of(fp32: Fp32, int8: Int8Evidence) -> Summary:
    return {
        "int8": int8.version_uri,
        "engine": int8.quantize.engine,
        **({"folded": True} if int8.quantize.folded else {}),
        "int8_top1_percent": int8.accuracy["test"].top1_percent,
        "top1_drop_points": int8.comparison["test"].top1_drop_points,
        "size_ratio": fp32.version.size_bytes / int8.size_bytes,
    }


def run_latency(config: Config, model_uri: str) -> Summary:
    """Time the registered int8 version `model_uri` against the fp32 version that it came from."""
    config, host = prepare_for_version(config, model_uri)
    int8 = registry.find_version(model_uri, "int8")
    uri = registry.from_entity(int8).uri
    fp32_uri, to_time = uri_of(registry.source_of(int8)), loading.to_time(int8)
    again = shlex.join(["qexp", "latency", "--model-uri", uri])
    # Timing does not change the accuracy of bf16.
    bf16 = partial(loading.bf16_of, int8)
    evidence = latency_stage(Job(host, again=again), config, fp32_uri, {uri: to_time}, bf16, compare=True)
    name = evidence.name_of(uri)
    result, floats = evidence.latency, evidence.fair_floats(config.gate.of(int8.name))
    over_fp32 = {str(row.batch_size): row.speedups[name].median for row in result.rows}
    over_floats = {str(found.batch_size): found.ratio.median for found in result.speedups(name, floats)}
    uris = {"fp32": evidence.fp32_uri, "int8": uri}
    times = {"speedup_by_batch_size": over_floats, "speedup_over_fp32_by_batch_size": over_fp32}
    more: Summary = {"shortcomings": list(result.shortcomings)} if result.shortcomings else {}
    if compared := evidence.logits.get(uri):
        more |= {"logits": compared.text, "logits_same_class_percent": compared.same_class_percent}
        more |= {"logits_largest_difference_steps": compared.largest_difference_steps}
    if by_threads := evidence.best_threads(name, floats):
        cells = tuple(tuple(tables.threads_cells(row)) for row in by_threads)
        more |= _threads_of(by_threads)
        more |= {TABLE: Table("The best number of threads at each batch size", tables.THREADS_COLUMNS, cells)}
    return {"command": "latency", "run_id": evidence.run_id, **uris, **times, **more}


def _threads_of(rows: Sequence[ThreadsRow]) -> Summary:
    """The best number of threads by batch size; nothing where one number was timed."""
    return {"best_threads_by_batch_size": {str(row.batch_size): _best_of(row) for row in rows}} if rows else {}


def _best_of(row: ThreadsRow) -> dict[str, Any]:
    best = {f"{kind}_threads": found.threads for kind, found in (("float", row.float), ("int8", row.int8))}
    shown = {"float_shown": row.float.shown, "int8_shown": row.int8.shown}
    ratio = row.speedup
    return {**best, **shown, "speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}


def run_report(config: Config, model_uri: str) -> Summary:
    """Write the report on the registered int8 version `model_uri` from what its runs have logged."""
    config, host = prepare_for_version(config, model_uri)
    evidence = loading.evidence_of_version(config, model_uri)
    hosts = known_hosts(config, registry.find_version(evidence.int8.version_uri, "int8"))
    throughput = loading.throughput_of(registry.find_version(evidence.int8.version_uri, "int8"))
    evidence = replace(evidence, hosts=hosts, throughput=throughput)
    again = shlex.join(["qexp", "report", "--model-uri", evidence.int8.version_uri])
    page = report_stage(Job(host, again=again), config, evidence)
    return summary_of("report", Reported(evidence, page.split("/")[1], page))


def summary_of(command: str, done: Reported) -> Summary:
    """What the last line of a command that has made a report shows; on a terminal, the report's first table."""
    evidence = done.evidence
    uris = {"fp32": evidence.fp32.version_uri, "int8": evidence.int8.version_uri, "report": done.report_uri}
    engine: Summary = {"engine": evidence.int8.quantize.engine}
    engine |= {"folded": True} if evidence.int8.quantize.folded else {}
    found = evidence.decision | evidence.headline | evidence.images_seen_before
    found |= _threads_of(evidence.measured.best_threads(evidence.name, evidence.floats))
    return {"command": command, "run_id": done.run_id, **uris, **engine, **found, TABLE: answer_table(evidence)}
