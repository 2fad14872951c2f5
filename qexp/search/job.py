"""The job of `qexp search`, as each worker of a study does it: set up, do trials until all are done, conclude.

Fed by the options; calls setup.py, trials.py, conclusion.py and findings.py in this order, and pipeline/ where the
winner is to be registered. It gives the command its last lines.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from qexp.config import Config, QuantizeConfig
from qexp.errors import InputError, StageError
from qexp.foundation.text import hide_secrets, opaque
from qexp.pipeline import loading
from qexp.pipeline.job import Job
from qexp.pipeline.jobs import quantize_to_report
from qexp.pipeline.report import copy_report
from qexp.pipeline.setup import Setup
from qexp.pipeline.take import with_answers
from qexp.progress import say
from qexp.search.conclusion import conclude
from qexp.search.findings import log_findings, quantize_command, summary
from qexp.search.queue import failures
from qexp.search.results import SearchResult
from qexp.search.setup import look_up, set_up
from qexp.search.storage import open_place
from qexp.search.study import Study, points_of
from qexp.search.trials import Bench, do_trials, options_for
from qexp.tracking import registry, search_runs
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
    with open_place(config.search) as place, ExitStack() as joining:
        config = _without_password(config)
        joining.enter_context(place.exclusive("join", "another worker prepares the study; waiting for it"))
        ready = look_up(config, place, model_uri)
        asked = f"Search for {ready.config.model} on {opaque(ready.dataset.name)}: {config.search.objective}."
        note = ready.study.note("concluded") if ready.study else None
        with search_runs.study_run(note or asked, ready.parent_run_id, place.leave) as run_id:
            study, bench = set_up(ready, place, run_id)
            joining.close()
            do_trials(study, bench)
            result = _conclude(study, bench)
            _log_once(study, result, run_id)
            done = {"command": "search", "run_id": run_id, "fp32": bench.model_uri} | summary(result)
            done |= _register_once(study, bench, result, run_id) if config.search.register_best else {}
        command = quantize_command(bench.config, bench.model_uri, _options_of(study, bench, result))
        address = place.address(study.name)
    return done | {"study_storage": address, "quantize_command": command}


def _without_password(config: Config) -> Config:
    """What goes into logs and artifacts from here on."""
    url = config.search.storage
    return config.model_copy(
        update={"search": config.search.model_copy(update={"storage": hide_secrets(url) if url else None})}
    )


def _conclude(study: Study, bench: Bench) -> SearchResult:
    """The result of all trials, the same for every worker.

    Raises:
        StageError: all trials have failed.
    """
    search, images = bench.config.search, len(bench.dataset.validation)
    points, failed = points_of(study), failures(study)
    if not points:
        first = f"{failed[0]}; another --study begins anew"
        raise StageError(f"study {study.name}: all {len(failed)} trials failed, the first with {first}")
    say(f"study {study.name}: all trials are done, {len(points)} completed, {len(failed)} failed")
    result = conclude(study.name, search.objective, points, bench.fp32_top1_percent, images)
    if search.objective == "top1+latency":
        result = replace(result, latency_batch_size=search.latency_batch_size, fp32_cost=bench.fp32_p50_ms)
    elif search.objective == "top1+size":
        result = replace(result, fp32_cost=float(bench.model_bytes))
    return replace(result, failed_trials=len(failed))


def _log_once(study: Study, result: SearchResult, run_id: str) -> None:
    """The first worker that comes here logs the result."""
    with study.place.exclusive("conclude"):
        if study.note("concluded") is None:
            search_runs.end_left_open(run_id, ("trial",))
            study.remember("concluded", log_findings(result))


def _options_of(study: Study, bench: Bench, result: SearchResult) -> QuantizeConfig:
    """How the winner was quantized."""
    params = {name: getattr(result.winner, name) for name in study.space}
    return options_for(bench.config.quantize, bench.order, params)


def _register_once(study: Study, bench: Bench, result: SearchResult, run_id: str) -> dict[str, Any]:
    """Quantize with the winner, then measure, gate and report as `run` does; only now are test images looked at.

    Once for a study and these options: of several workers, the first does it, and the others take what it has found.
    """
    made_with = bench.config.model_dump(mode="json", include={"gate", "latency", "quantize"})
    with study.place.exclusive("register", "another worker registers the winner; waiting for it"):
        earlier = study.note("registered")
        if earlier and earlier["made_with"] == made_with and registry.exists(earlier["done"]["int8"]):
            copy_report(earlier["done"]["report"], bench.config.output_dir)
            return dict(earlier["done"])
        search_runs.end_left_open(run_id, ("sensitivity", "quantize", "latency", "report"))
        config = bench.config.model_copy(update={"quantize": _options_of(study, bench, result)})
        fp32 = loading.fp32_from_registry(bench.model_uri, bench.dataset)
        dataset = with_answers(bench.dataset, fp32.model.spec, fp32.logits)
        found = quantize_to_report(Job(bench.host, run_id), Setup(config, bench.host, dataset), fp32)
        evidence = found.evidence
        uris = {"int8": evidence.int8.version_uri, "report": found.report_uri}
        done = uris | evidence.decision | evidence.headline
        study.remember("registered", {"made_with": made_with, "done": done})
    return done
