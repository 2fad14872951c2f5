"""`qexp throughput`: what workers serve with a registered int8 version and with the fastest float, as a run of its own.

Which float is the fastest is known from the latest sweep on this CPU: of `qexp latency`, or of the version's own job.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qexp.config import Config
from qexp.errors import InputError
from qexp.foundation.text import opaque
from qexp.measurement.host import Host, free_memory_bytes, read_cpus
from qexp.measurement.load import LoadRequest, run_load
from qexp.measurement.sweep_models import COMPILED, SweepModel, backend_in, unfolded
from qexp.measurement.throughput import KINDS, Choice, Need, Served, Setting, ThroughputResult, settings
from qexp.models.names import short_name
from qexp.models.preprocessing import preprocessing_of
from qexp.models.stored import model_file
from qexp.pipeline.hosts import TABLE
from qexp.pipeline.job import Job
from qexp.pipeline.measure import LocalVersions
from qexp.pipeline.setup import prepare_for_version
from qexp.progress import say
from qexp.quantization import KERNELS
from qexp.report.results import LatencyEvidence, ThroughputEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.store import ModelVersion, uri_of
from qexp.tracking.sweeps import sweeps_of
from qexp.tracking.tags import tags_of

WORKER_BYTES, COPIES = 300_000_000, 2  # memory of a worker beside its models, and that of a model, by its file


def run_throughput(config: Config, model_uri: str) -> dict[str, Any]:
    """Measure what workers serve with the registered int8 version `model_uri` and with the fastest float.

    Raises:
        InputError: the version is not one of ours, was not timed on this CPU, or no setting fits on its cores.
        StageError: a worker failed.
    """
    config, host = prepare_for_version(config, model_uri)
    int8 = registry.find_version(model_uri, "int8")
    uri, fp32_uri = uri_of(int8), uri_of(registry.source_of(int8))
    known = _latest_sweep(int8, host)
    floats = [name for name in known.fair_floats(config.gate.of(int8.name)) if unfolded(name) not in COMPILED]
    wanted = {one: _fastest_float(known, floats, one) for one in _settings(config, host, known)}
    engine, name = tags_of(int8).engine, known.name_of(uri)
    job = Job(host, again=shlex.join(["qexp", "throughput", "--model-uri", uri]))

    def work(folder: Path) -> ThroughputEvidence:
        with job.files(fp32_uri, uri) as files:
            fitting, left_out = _that_fit_in_memory(list(wanted), files, uri)
            request = LoadRequest(
                int8=SweepModel(name, files.folders[uri], backend_in(name, engine) or KERNELS[engine][0]),
                models=tuple(SweepModel(one, files.fp32_folder) for one in dict.fromkeys(wanted.values())),
                settings=fitting,
                floats=tuple(wanted[one] for one in fitting),
                weights=str(files.weights),
                shape=preprocessing_of(config.data, config.preprocess).shape,
                cores=_cores(host),
                max_busy_percent=config.latency.max_busy_percent,
                options=config.throughput,
            )
            result = run_load(request, registry.child_environment(host.threads))
        asked = config.throughput.max_p99_ms, config.throughput.images_per_second
        return ThroughputEvidence(fp32_uri, uri, _with_left_out(result, left_out), host, "", *asked)

    evidence = job.stage(
        f"throughput-{short_name(config.model)}",
        f"Throughput of `{opaque(uri)}` beside the fastest float.",
        config,
        work,
        read=lambda run_id: tracking.read_result(ThroughputEvidence, run_id, "throughput"),
    )
    for shortcoming in evidence.result.shortcomings:
        say(f"warning: nothing may rest on these figures: {shortcoming}")
    return _summary(evidence)


def _latest_sweep(found: ModelVersion, host: Host) -> LatencyEvidence:
    for sweep in sweeps_of(found):
        if (sweep.evidence.host.cpu, sweep.evidence.host.features) == (host.cpu, host.features):
            return sweep.evidence
    uri = uri_of(found)
    why = f"was not timed on this CPU ({host.cpu}), so its fastest float is not known"
    raise InputError(f"--model-uri {uri}: {why}; run `qexp latency --model-uri {uri}` first")


def _settings(config: Config, host: Host, known: LatencyEvidence) -> tuple[Setting, ...]:
    """What is tried; InputError if nothing of what was asked for fits."""
    timed, options = [row.batch_size for row in known.latency.counted], config.throughput
    sizes = list[int](config.latency.batch_sizes)
    if config.latency.fits_batch_sizes:  # not chosen
        sizes = [size for size in timed if size in sizes] or timed
    sizes = list(config.latency.profile or sizes)
    found = settings(_cores(host), options.workers, options.threads_per_worker, sizes)
    if not found:
        asked = {"workers": options.workers, "threads-per-worker": options.threads_per_worker}
        given = " ".join(f"--{name} {','.join(map(str, value))}" for name, value in asked.items() if value)
        raise InputError(f"{given}: needs more cores than the {_cores(host)} that this machine has for workers")
    return found


def _cores(host: Host) -> int:
    """That workers may use: those of this machine, within its quota, and no more than `--threads` says."""
    return min(host.threads, read_cpus().threads)


def _fastest_float(known: LatencyEvidence, floats: Sequence[str], setting: Setting) -> str:
    """By the sweep on as many threads as a worker has, if there is one, at the same batch size, or else in the mean."""
    sweeps = (known.latency, *known.other_threads)
    result = next((one for one in sweeps if one.threads == setting.threads), known.latency)
    there = [name for name in floats if name in result.rows[0].stats]
    row = next((row for row in result.rows if row.batch_size == setting.batch_size), None)
    return row.fastest(there) if row else result.winner(there)


def _that_fit_in_memory(
    wanted: Sequence[Setting], files: LocalVersions, int8_uri: str
) -> tuple[tuple[Setting, ...], tuple[str, ...]]:
    """Settings whose workers have room for their models, and why the others are left out."""
    free = free_memory_bytes()
    models = files.weights.stat().st_size + model_file(Path(files.folders[int8_uri])).stat().st_size
    each = WORKER_BYTES + COPIES * models
    fitting = tuple(one for one in wanted if one.workers == 1 or free is None or one.workers * each <= free)
    gone = sorted({one.workers for one in wanted} - {one.workers for one in fitting})
    why = f"they take about {each / 1e9:.1f} GB each, and {(free or 0) / 1e9:.1f} GB are free"
    return fitting or tuple(wanted), tuple(f"{count} workers: {why}" for count in gone if fitting)


def _with_left_out(result: ThroughputResult, left_out: tuple[str, ...]) -> ThroughputResult:
    for reason in left_out:
        say(f"not tried: {reason}")
    return replace(result, left_out=left_out)


def _summary(evidence: ThroughputEvidence) -> dict[str, Any]:
    """As the last line shows it; on a terminal, the table."""
    result = evidence.result
    found: dict[str, Any] = {"command": "throughput", "run_id": evidence.run_id}
    found |= {"fp32": evidence.fp32_uri, "int8": evidence.int8_uri, "cores": result.cores}
    found |= {"max_p99_ms": evidence.max_p99_ms} if evidence.max_p99_ms else {}
    for kind in KINDS:
        found[f"best_{kind}"] = _of_choice(evidence.best(kind))
    if evidence.images_per_second:
        found["images_per_second"] = evidence.images_per_second
        for kind in KINDS:
            found[f"needed_{kind}"] = _of_need(evidence.needed(kind))
    found["settings"] = [
        {"workers": row.setting.workers, "threads": row.setting.threads, "batch_size": row.setting.batch_size}
        | {kind: _of_served(row.of(kind)) for kind in KINDS}
        | {"int8_over_float": row.speedup.median}
        | {"int8_over_float_low": row.speedup.low, "int8_over_float_high": row.speedup.high}
        for row in result.rows
    ]
    found |= {"shortcomings": list(result.shortcomings)} if result.shortcomings else {}
    found |= {"left_out": list(result.left_out)} if result.left_out else {}
    return found | {TABLE: result.tables()[0]}


def _of_choice(found: Choice | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found.setting) | {"cores": found.setting.cores} | _of_served(found.served)


def _of_served(served: Served) -> dict[str, Any]:
    rate = served.rate
    times = {"p50_ms": served.p50_ms, "p99_ms": served.p99_ms}
    rates = {"images_per_second": rate.median, "images_per_second_low": rate.low, "images_per_second_high": rate.high}
    return {"model": served.model, **rates, **times}


def _of_need(found: Need | None) -> dict[str, Any] | None:
    return None if found is None else {"cores": found.cores, "machines": found.machines} | asdict(found.each.setting)
