"""Whether a registered int8 version becomes `champion`: held against the gate and the present champion, side by side.

All are measured in this session: the same test images, the same machine, one latency sweep.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qexp.config import Config
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.foundation.text import opaque
from qexp.measurement.accuracy import Comparison, compare, guess_percent, measure_accuracy
from qexp.measurement.gate import UNMEASURED, Succession, decide_gate, decide_succession
from qexp.measurement.host import Host
from qexp.measurement.sweep_models import SweepModel
from qexp.models.names import parse_version_uri
from qexp.pipeline.job import Inputs, Job
from qexp.pipeline.loading import bf16_of, load_weights, local_files, logits_of_version
from qexp.pipeline.measure import measure_bf16, rounded_fields, thread_counts, time_models
from qexp.pipeline.setup import Setup, prepare
from qexp.progress import say
from qexp.report.promotion import CANDIDATE, OVERTAKEN, Promotion
from qexp.report.results import Bf16Evidence, Evidence, LatencyEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import CHALLENGER, CHAMPION, version_with
from qexp.tracking.catalog import list_models
from qexp.tracking.results import Result
from qexp.tracking.store import ModelVersion, uri_of, use_store
from qexp.tracking.tags import tags_of


def run_promote(config: Config, name: str, version: str | None = None, force: bool = False) -> dict[str, Any]:
    """Decide on a version of the int8 model `name` (None: the challenger, or the newest), and move `champion` if it
    passed the gate and is better than the present one, or with `force`. A champion that stays is no failure. The
    decision is a run of its own and in the version's tags.

    Raises:
        InputError: there is no such version, or the data are not those that it was made with.
        StageError: the gate did not pass it; the message says by which limits and by how much. No alias has moved.
    """
    use_store()
    candidate = _candidate(name, version)
    uri, fp32_uri = uri_of(candidate), uri_of(registry.source_of(candidate))
    champion = version_with(CHAMPION, name)
    before = uri_of(champion) if champion else None
    setup = prepare(config, fp32_uri)
    other = champion if before != uri else None
    again = shlex.join(["qexp", "promote", name, "--version", str(candidate.version), *(["--force"] if force else [])])
    job = Job(setup.host, again=again)
    found = _promotion(job, setup, candidate, other, lambda found: replace(found, force=force))
    if found.overtaken:
        raise StageError(f"{uri} is not promoted: {OVERTAKEN}; run it again, to compare with that one")
    if found.word in ("rejected", UNMEASURED):
        still = f"the champion is still {before}" if before else "there is still no champion"
        raise StageError(f"{uri} is not promoted: {found.summary}; {still}")
    uris = {"int8": uri, "fp32": fp32_uri, "champion_before": before}
    facts = {"gate": found.gate.word, "reasons": list(found.reasons), **found.figures}
    return {"command": "promote", "run_id": found.measured.run_id, "decision": found.word, **uris, **facts}


def hold_against_champion(job: Job, setup: Setup, evidence: Evidence) -> Evidence:
    """`evidence` with the decision on its version against the present champion too.

    Both are measured side by side in a run of its own, as for `run_promote`; the gate's own decision stands. Where the
    version has failed the gate, or there is no other champion, `evidence` is as it was.
    """
    candidate = registry.find_version(evidence.int8.version_uri, "int8")
    champion = version_with(CHAMPION, candidate.name)
    if not evidence.champion or champion is None or champion.version == candidate.version:
        return evidence
    found = _promotion(job, setup, candidate, champion, lambda found: replace(found, gate=evidence.gate))
    passed = found.word == "passed"
    return replace(evidence, champion=passed, succession=found.succession, before_uri=uri_of(champion))


def _candidate(name: str, number: str | None) -> ModelVersion:
    names = sorted({row["name"] for row in list_models() if row["kind"] == "int8"})
    if name not in names:
        if name.startswith("models:/"):
            parts = parse_version_uri(name, "NAME")
            raise InputError(f"NAME {name}: must be a name without a version; give {parts['name']} and --version")
        raise InputError(f"NAME {name}: no registered int8 model; there are: {', '.join(names) or 'none'}")
    if number is not None and not (number.isdecimal() and len(number) < 10):
        raise InputError(f"--version {number}: must be a version number of {name}")
    newest = registry.newest_version(name)
    if number is None and version_with(CHALLENGER, name) and not _awaits_times(f"models:/{name}/{newest}"):
        return registry.find_version(f"models:/{name}@{CHALLENGER}", "int8", option="NAME")
    number = number or newest
    try:
        return registry.find_version(f"models:/{name}/{number}", "int8")
    except InputError as error:
        given, _, why = str(error).partition(": ")
        raise InputError(f"--version {number}: {why}") if given.startswith("--model-uri") else error from None


def _awaits_times(uri: str) -> bool:
    """Whether a version's own job has not measured it well enough for a verdict, and so for an alias."""
    return bool(registry.look_up(uri).tags.get("gate") == UNMEASURED)


def _promotion(
    job: Job,
    setup: Setup,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    change: Callable[[Promotion], Promotion],
) -> Promotion:
    """The stage: what `compare_with_champion` finds, as `change` changes it, in a run of its own."""
    against = f" and `{opaque(uri_of(champion))}`, the champion" if champion else ""

    def work(folder: Path) -> Result:
        return change(compare_with_champion(setup.config, setup.host, setup.dataset, candidate, champion))

    found = job.stage(
        f"promote-{candidate.name}",
        f"`{opaque(uri_of(candidate))}` against the gate{against}.",
        setup.config,
        work,
        read=lambda run_id: tracking.read_result(Promotion, run_id, "promotion"),
        inputs=Inputs(setup.dataset, ("test",)),
        holds=lambda found: (found.uri, found.champion_uri) == (uri_of(candidate), champion and uri_of(champion)),
    )
    if found.word not in ("rejected", UNMEASURED):  # which the last line says
        say(f"{found.uri} {found.summary}")
    return found


def compare_with_champion(
    config: Config, host: Host, dataset: Dataset, candidate: ModelVersion, champion: ModelVersion | None
) -> Promotion:
    """Measure a candidate, its fp32 model and the champion side by side, and decide by the gate and by its margins."""
    uri, fp32_version = uri_of(candidate), registry.source_of(candidate)
    fp32, int8 = (logits_of_version(one, dataset) for one in (fp32_version, candidate))
    labels = dataset.test.labels if dataset.test.is_labelled else fp32.argmax(1)  # accuracy is agreement with fp32 then
    other = _answers_of(champion, dataset) if champion else None
    versions = {CANDIDATE: candidate}
    if champion and other and other.logits is not None:
        versions[CHAMPION] = champion
    measured = _time(config, host, versions, _bf16(config, host, dataset, candidate, fp32))
    result, limits = measured.latency, config.gate.of(candidate.name)
    floats = measured.fair_floats(limits)
    source, version = registry.from_entity(fp32_version), registry.from_entity(candidate)
    drop = compare(fp32, int8, labels)
    gate = decide_gate(
        limits,
        measure_accuracy(fp32, labels),
        measure_accuracy(int8, labels),
        guess_percent(labels) if dataset.test.is_labelled else None,
        drop,
        source.size_bytes / version.size_bytes,
        result.least_speedup(CANDIDATE, floats),
        result.shortcomings,
        source.verified and version.verified,
    )
    lost: Comparison | None = None
    succession: Succession | None = None
    if champion and other:
        if other.logits is None:
            found = Succession(False, (other.why_not,), compared=False)
        else:
            lost = compare(other.logits, int8, labels)
            smaller = version.size_bytes / registry.from_entity(champion).size_bytes
            faster = result.mean_ratio([CHAMPION], CANDIDATE)
            found = decide_succession(limits, lost, faster, smaller, result.shortcomings)
        first, *others = found.reasons
        succession = replace(found, reasons=(f"beside {uri_of(champion)}: {first}", *others))
    return Promotion(
        uri,
        champion_uri=uri_of(champion) if champion else None,
        gate=gate,
        succession=succession,
        drop=drop,
        drop_from_champion=lost,
        measured=measured,
        floats=floats,
    )


def _bf16(
    config: Config, host: Host, dataset: Dataset, candidate: ModelVersion, fp32_logits: Tensor
) -> dict[str, Bf16Evidence]:
    """What the candidate's own job has found of the baselines in bf16, or else what is measured here."""
    if found := bf16_of(candidate):
        return found
    model, folded = load_weights(registry.source_of(candidate)), bool(tags_of(candidate).folded)
    return measure_bf16(config, host, dataset, model, fp32_logits, folded)


@dataclass(frozen=True)
class _Answers:
    """Logits of a champion on the candidate's test images, or why there are none."""

    logits: Tensor | None
    why_not: str = ""


def _answers_of(champion: ModelVersion, dataset: Dataset) -> _Answers:
    tags = tags_of(champion)
    try:
        if not dataset.has_digest(was := tags.check().data_digest):
            other = f"it was made with other data or another image size (digest {was}, not {dataset.digest})"
            return _Answers(None, other)
        return _Answers(logits_of_version(champion, dataset))
    except (InputError, StageError) as error:
        return _Answers(None, f"it cannot be compared: {error}")


def _time(
    config: Config, host: Host, versions: dict[str, ModelVersion], bf16: dict[str, Bf16Evidence]
) -> LatencyEvidence:
    """The candidate and the champion, with the kernels that `qexp.load` gives, beside fp32."""
    tags = tags_of(versions[CANDIDATE])
    fp32_uri, folded, host = tags.fp32_uri, bool(tags.folded), replace(host, threads=thread_counts(config, host)[0])
    with local_files(fp32_uri, *map(uri_of, versions.values())) as files:
        folders = {name: files.folders[uri_of(one)] for name, one in versions.items()}
        models = [SweepModel(name, folders[name], registry.backend_of(one)) for name, one in versions.items()]
        environment = registry.child_environment(host.threads)
        result = time_models(config, host, files, models, CANDIDATE, environment, folded)
    names: dict[str, tuple[str, ...]] = {uri_of(one): (name,) for name, one in versions.items()}
    return LatencyEvidence(fp32_uri, names, result, host, run_id="", **rounded_fields(config, host, bf16, folded))
