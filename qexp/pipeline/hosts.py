"""`qexp hosts`: what is known of int8 versions on each kind of machine, from the sweeps that the store has of them.

`qexp latency` on any machine with the same store adds a sweep; `logits_here` is what it compares beside its times.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qexp.config import Config
from qexp.errors import InputError, first_line
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.agreement import LogitsAgreement, compare_logits
from qexp.measurement.sweep_models import backend_in
from qexp.measurement.verdict import decide_verdict
from qexp.models.names import parse_version_uri
from qexp.models.stored import load_stored
from qexp.pipeline.decide import judge
from qexp.pipeline.loading import fp32_result, int8_of_run
from qexp.pipeline.measure import LocalVersions
from qexp.progress import say
from qexp.quantization import KERNELS
from qexp.report.hosts import KnownHost, KnownHosts
from qexp.report.results import Fp32Evidence, Int8Evidence, LatencyEvidence
from qexp.tracking import registry
from qexp.tracking.catalog import list_models
from qexp.tracking.store import ModelVersion, uri_of, use_store
from qexp.tracking.sweeps import Sweep, read_recorded, sweeps_of
from qexp.tracking.tags import tags_of

TABLE = "table"  # of a summary: shown on a terminal in the place of what it holds


def run_hosts(config: Config, name: str) -> dict[str, Any]:
    """What is known of the int8 model `name`, all of its versions, or of the one version that it is the URI of.

    Raises:
        InputError: there is no such model or version, or none of its versions was timed anywhere.
    """
    if name.startswith("models:/"):
        parse_version_uri(name, "NAME")
    use_store()
    versions = _versions(name)
    hosts = tuple(one for found in versions for one in known_hosts(config, found))
    if not hosts:
        first = uri_of(versions[0])
        raise InputError(f"NAME {name}: was timed on no machine yet; `qexp latency --model-uri {first}` does so")
    found = KnownHosts(name, hosts)
    return {"command": "hosts", "name": name, "hosts": [one.summary for one in hosts], TABLE: found.tables()[0]}


def _versions(name: str) -> list[ModelVersion]:
    if name.startswith("models:/"):
        return [registry.find_version(name, "int8", option="NAME")]
    names = sorted({row["name"] for row in list_models() if row["kind"] == "int8"})
    if name not in names:
        raise InputError(f"NAME {name}: no registered int8 model; there are: {', '.join(names) or 'none'}")
    uris = (f"models:/{name}/{number}" for number in registry.version_numbers(name))
    return [registry.find_version(uri, "int8", option="NAME") for uri in uris]


def known_hosts(config: Config, found: ModelVersion) -> tuple[KnownHost, ...]:
    """What is known of an int8 version by kind of machine, the one that was timed last first."""
    by_kind: dict[tuple[Any, ...], list[Sweep]] = {}
    for sweep in sweeps_of(found):
        evidence, host = sweep.evidence, sweep.evidence.host
        kind = host.cpu, host.features, host.physical_cores or host.cores, host.cpu_quota
        for latency in (evidence.latency, *evidence.other_threads):
            one = replace(sweep, evidence=replace(evidence, latency=latency))
            by_kind.setdefault((*kind, latency.threads), []).append(one)
    if not by_kind:
        return ()
    tags = tags_of(found)
    fp32 = fp32_result(registry.source_of(found))
    with tags.followed("quantize_run_id") as run_id:
        int8 = int8_of_run(run_id)
    made_on = found.tags.get("cpu"), found.tags.get("cpu_features")
    return tuple(_known(config, fp32, int8, sweeps, made_on) for sweeps in by_kind.values())


def _known(
    config: Config,
    fp32: Fp32Evidence,
    int8: Int8Evidence,
    sweeps: list[Sweep],
    made_on: tuple[str | None, str | None],
) -> KnownHost:
    newest, uri = sweeps[0].evidence, int8.version_uri
    judged, host = judge(config, fp32, int8, newest), newest.host
    floats = newest.fair_floats(config.gate.of(uri.split("/")[1]))
    over_floats = newest.latency.mean_ratio(floats, judged.name)
    compared = (one.evidence.logits[uri] for one in sweeps if uri in one.evidence.logits)
    return KnownHost(
        version_uri=uri,
        host=host,
        threads=newest.latency.threads,
        model=judged.name,
        over_floats=over_floats,
        speedups=newest.latency.speedups(judged.name, floats),
        gate=judged.gate,
        verdict=decide_verdict(judged.gate, over_floats, uri, newest.latency.winner(floats)).word,
        logits=next(compared, None),
        recorded_here=made_on == (host.cpu, ",".join(host.features)),
        sweeps=len(sweeps),
        date=sweeps[0].date,
        run_id=newest.run_id,
    )


def logits_here(evidence: LatencyEvidence, files: LocalVersions) -> dict[str, LogitsAgreement]:
    """The logits of int8 versions on this machine, with the kernels that were fastest, beside the recorded ones, by
    URI. A version that has none is left out, and so is one that does not run here; both are said."""
    found = dict[str, LogitsAgreement]()
    for uri in evidence.names:
        version = registry.find_version(uri, "int8")
        if (recorded := read_recorded(version)) is None:
            continue
        engine = tags_of(version).engine
        backend = backend_in(evidence.name_of(uri), engine) or KERNELS[engine][0]
        before = torch.backends.quantized.engine
        try:
            model = load_stored(Path(files.folders[uri]), backend)
            compared = compare_logits(recorded["logits"], predict_logits(model, recorded["images"]))
        except Exception as error:  # of a library, of images that were changed
            say(f"{uri}: its logits are not compared with those recorded: {first_line(error)}")
            continue
        finally:
            torch.backends.quantized.engine = before
        found[uri] = compared
        said = "" if compared.within_one_step else "warning: "
        say(f"{said}{uri}: the logits for {compared.images} recorded images: {compared.text}")
    return found
