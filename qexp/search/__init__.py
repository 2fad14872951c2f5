"""`qexp search`: one worker of a study joins it, does trials until all are done, and sees to the result."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from qexp.config import Config
from qexp.errors import InputError, StageError, hide_passwords
from qexp.measurement.accuracy import measure_accuracy
from qexp.pipeline import loading as registered
from qexp.pipeline.job import Job
from qexp.pipeline.jobs import quantize_to_report
from qexp.pipeline.report import copy_report
from qexp.pipeline.setup import Setup
from qexp.progress import say
from qexp.report.results import SearchResult
from qexp.search import runs
from qexp.search.conclusion import conclude
from qexp.search.findings import log_findings, summary
from qexp.search.joining import get_ready, set_up
from qexp.search.storage import open_place, storages_of
from qexp.search.study import Study, failures, points_of
from qexp.search.trials import Bench, options_for
from qexp.search.worker import do_trials
from qexp.tracking import registry
from qexp.tracking.store import use_store


def run_search(config: Config, model_uri: str | None) -> dict[str, Any]:
    """Search with the fp32 version `model_uri`; without it, that of the study, the newest of this model and data, or a
    new one. With `search.storage`, as one worker of several; each returns when all trials are done."""
    if config.train.processes > 1:
        raise InputError(
            f"--processes {config.train.processes}: a search trains in one process; "
            "give it to `qexp train` first, and the search takes that version"
        )
    use_store()
    with (
        open_place(config.search) as place,
        storages_of(place, config.search.heartbeat_seconds) as open_storage,
        ExitStack() as joining,
    ):
        config = _without_password(config)
        joining.enter_context(place.exclusive("join", "another worker prepares the study; waiting for it"))
        ready = get_ready(config, place, open_storage, model_uri)
        asked = f"Search for {ready.config.model} on {ready.dataset.name}: {config.search.objective}."
        note = ready.study.note("concluded") if ready.study else None
        with runs.study_run(note or asked, ready.parent_run_id, place.leave) as run_id:
            study, bench = set_up(ready, place, open_storage, run_id)
            joining.close()
            do_trials(study, bench)
            result = _conclude(study, bench, run_id)
            done = {"command": "search", "run_id": run_id, "fp32": bench.fp32.version.uri} | summary(result)
            return done | (_register(study, bench, result, run_id) if config.search.register_best else {})


def _without_password(config: Config) -> Config:
    """What goes into logs and artifacts from here on."""
    url = config.search.storage
    return config.model_copy(
        update={"search": config.search.model_copy(update={"storage": hide_passwords(url) if url else None})}
    )


def _conclude(study: Study, bench: Bench, run_id: str) -> SearchResult:
    """The result, from all trials; logged by the first worker that comes here."""
    search, validation = bench.config.search, bench.dataset.validation
    points, failed = points_of(study), failures(study)
    if not points:
        first = f"{failed[0]}; another --study begins anew"
        raise StageError(f"study {study.name}: all {len(failed)} trials failed, the first with {first}")
    say(f"study {study.name}: all trials are done, {len(points)} completed, {len(failed)} failed")
    fp32_top1 = measure_accuracy(bench.fp32.logits["validation"], validation.labels).top1_percent
    result = conclude(study.name, search.objective, points, fp32_top1, len(validation))
    timed = search.objective == "top1+latency"
    result = replace(
        result,
        failed_trials=len(failed),
        latency_batch_size=search.latency_batch_size if timed else None,
        fp32_cost=bench.fp32_p50_ms if timed else _fp32_bytes(bench),
    )
    with study.place.exclusive("conclude"):
        if study.note("concluded") is None:
            runs.end_left_open(run_id, ("trial",))
            study.remember("concluded", log_findings(result))
    return result


def _fp32_bytes(bench: Bench) -> float | None:
    return float(bench.fp32.version.size_bytes) if bench.config.search.objective == "top1+size" else None


def _register(study: Study, bench: Bench, result: SearchResult, run_id: str) -> dict[str, Any]:
    """Quantize with the winner, then measure, gate and report as `run` does; only now are test images looked at.

    Once for a study and these options: of several workers, the first does it, and the others take what it has found.
    """
    winner = result.winner
    made_with = bench.config.model_dump(mode="json", include={"gate", "latency", "quantize"})
    params = {name: getattr(winner, name) for name in study.space}
    with study.place.exclusive("register", "another worker registers the winner; waiting for it"):
        earlier = study.note("registered")
        if earlier and earlier["made_with"] == made_with and registry.exists(earlier["done"]["int8"]):
            copy_report(earlier["done"]["report"], bench.config.output_dir)
            return dict(earlier["done"])
        runs.end_left_open(run_id, ("sensitivity", "quantize", "latency", "report"))
        quantize = options_for(bench.config.quantize, bench.order, params)
        config = bench.config.model_copy(update={"quantize": quantize})
        fp32 = registered.fp32_from_registry(bench.fp32.version.uri, bench.dataset)
        reported = quantize_to_report(Job(bench.host, run_id), Setup(config, bench.host, bench.dataset), fp32)
        evidence = reported.evidence
        uris = {"int8": evidence.int8.version_uri, "report": reported.report_uri}
        done = uris | evidence.decision | evidence.headline
        study.remember("registered", {"made_with": made_with, "done": done})
    return done
