"""Whether a registered int8 version becomes `champion`: held against the gate and the present champion, side by side.

All are measured in this session: the same test images, the same machine, one latency sweep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from qexp import metrics, registry, tracking
from qexp.config import Config
from qexp.contenders import BASELINE, Contender
from qexp.data import Dataset
from qexp.deciding import latency_tags, time_versions
from qexp.errors import InputError, StageError, first_line
from qexp.evaluation import Comparison, compare, measure_accuracy, predict_logits
from qexp.evidence import Evidence, LatencyEvidence
from qexp.gate import GateResult, decide_gate, decide_succession
from qexp.host import Host
from qexp.latency import LatencyResult
from qexp.prepare import prepare
from qexp.progress import say
from qexp.store import ModelVersion, split_uri, uri_of, use_store
from qexp.store.aliases import CHALLENGER, CHAMPION, move_champion, version_with
from qexp.store.catalog import list_models
from qexp.store.integrity import checked_copy
from qexp.sweep import SweepRequest

CANDIDATE = "candidate"
CHANGED = "another version has become champion meanwhile"


@dataclass(frozen=True)
class Promotion:
    """What was found about a candidate: the gate's decision, and that against the champion where there is another."""

    uri: str
    champion_uri: str | None
    gate: GateResult
    succession: GateResult | None
    drop: Comparison
    drop_from_champion: Comparison | None
    latency: LatencyResult

    @property
    def decision(self) -> GateResult:
        """Both together."""
        found = [self.gate, self.succession] if self.succession else [self.gate]
        failed = tuple(reason for one in found if not one.passed for reason in one.reasons)
        return GateResult(not failed, failed or tuple(reason for one in found for reason in one.reasons))


def run_promote(config: Config, name: str, version: str | None = None, force: bool = False) -> dict[str, Any]:
    """Decide on a version of the int8 model `name` (None: the challenger, or the newest), and move `champion` if it
    passed, or with `force`. The decision is a run of its own and in the version's tags.

    Raises:
        InputError: there is no such version, or the data are not those that it was made with.
        StageError: it was rejected; the message says by which rules and by how much. No alias has moved.
    """
    use_store()
    candidate = _candidate(name, version)
    uri, fp32_uri = uri_of(candidate), candidate.tags["fp32_uri"]
    if not registry.exists(fp32_uri):
        raise InputError(f"NAME {name}: {uri} was made from {fp32_uri}, which is no longer there")
    champion = version_with(CHAMPION, name)
    before = uri_of(champion) if champion else None
    other = champion if before != uri else None
    config, host, dataset = prepare(config, fp32_uri)
    with _promotion_run(config, host, dataset, candidate, other) as run_id:
        found = _measure(config, host, dataset, candidate, other, run_id)
        word = "passed" if found.decision.passed else "forced" if force else "rejected"
        _record(found, word, run_id)  # first: no alias moves without a word on why
        if force:
            move_champion(uri)
        elif word == "passed" and not succeed(uri, champion):
            tags = {"promotion": "rejected", "promotion_reason": f"rejected: {CHANGED}"}
            registry.tag_version(uri, tags)
            raise StageError(f"{uri} is not promoted: {CHANGED}; run it again, to compare with that one")
    if word == "rejected":
        still = f"the champion is still {before}" if before else "there is still no champion"
        raise StageError(f"{uri} is not promoted: {'; '.join(found.decision.reasons)}; {still}")
    uris = {"int8": uri, "fp32": fp32_uri, "champion_before": before}
    facts = {"gate": found.gate.word, "reasons": list(found.decision.reasons), **_figures(found)}
    return {"command": "promote", "run_id": run_id, "decision": word, **uris, **facts}


def hold_against_champion(
    config: Config, host: Host, dataset: Dataset, evidence: Evidence
) -> tuple[Evidence, ModelVersion | None]:
    """`evidence` with the decision on its version against the present champion too, and that champion.

    Both are measured side by side in a run of its own, as for `run_promote`; the gate's own decision stands. Where the
    version has failed the gate, or there is no other champion, that is all.
    """
    candidate = registry.find_version(evidence.int8.version_uri, "int8")
    champion = version_with(CHAMPION, candidate.name)
    if not evidence.champion or champion is None or champion.version == candidate.version:
        return evidence, champion
    with _promotion_run(config, host, dataset, candidate, champion) as run_id:
        found = replace(_measure(config, host, dataset, candidate, champion, run_id), gate=evidence.gate)
        _record(found, "passed" if found.decision.passed else "rejected", run_id)
    passed = found.decision.passed
    return replace(evidence, champion=passed, succession=found.succession, before_uri=uri_of(champion)), champion


def succeed(int8_uri: str, champion: ModelVersion | None) -> bool:
    """Make a version `champion` if the one that it was compared with, or none, still is; whether that was so."""
    unmoved = _is_champion(split_uri(int8_uri)[0], champion)
    if unmoved:
        move_champion(int8_uri)
    return unmoved


@contextmanager
def _promotion_run(
    config: Config, host: Host, dataset: Dataset, candidate: ModelVersion, champion: ModelVersion | None
) -> Iterator[str]:
    against = f" and `{uri_of(champion)}`, the champion" if champion else ""
    note = f"`{uri_of(candidate)}` against the gate{against}."
    with tracking.start_run(f"promote-{candidate.name}", note) as run_id:
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, ("test",))
        yield run_id


def _candidate(name: str, number: str | None) -> ModelVersion:
    names = sorted({row["name"] for row in list_models() if row["kind"] == "int8"})
    if name not in names:
        raise InputError(f"NAME {name}: no registered int8 model; there are: {', '.join(names) or 'none'}")
    if number is not None and not (number.isdecimal() and len(number) < 10):
        raise InputError(f"--version {number}: must be a version number of {name}")
    if number is None and version_with(CHALLENGER, name):
        return registry.find_version(f"models:/{name}@{CHALLENGER}", "int8", option="NAME")
    number = number or registry.newest_version(name)
    try:
        return registry.find_version(f"models:/{name}/{number}", "int8")
    except InputError as error:
        raise InputError(f"--version {number}: {str(error).partition(': ')[2]}") from None


def _measure(
    config: Config, host: Host, dataset: Dataset, candidate: ModelVersion, champion: ModelVersion | None, run_id: str
) -> Promotion:
    uri, fp32_uri = uri_of(candidate), candidate.tags["fp32_uri"]
    fp32_version = registry.find_version(fp32_uri, "fp32")
    fp32, int8 = (_logits(one, dataset) for one in (fp32_version, candidate))
    before, why_not = _logits_of_champion(champion, dataset)
    versions = {CANDIDATE: candidate} | ({CHAMPION: champion} if champion and before is not None else {})
    latency = _sweep(config, host, fp32_uri, versions, run_id)
    source = registry.from_entity(fp32_version)
    version = registry.from_entity(candidate)
    labels, ratio = dataset.test.labels, source.size_bytes / version.size_bytes
    accuracy, drop = measure_accuracy(int8, labels), compare(fp32, int8, labels)
    verified = source.verified and version.verified
    limits = config.gate.of(candidate.name)
    gate = decide_gate(limits, accuracy, drop, ratio, latency.least_speedup(CANDIDATE), verified)
    champion_uri = uri_of(champion) if champion else None
    if champion is None:
        return Promotion(uri, None, gate, None, drop, None, latency)
    lost = compare(before, int8, labels) if before is not None else None
    found = decide_succession(lost, latency, CHAMPION, CANDIDATE) if lost else GateResult(False, (why_not,))
    first, *others = found.reasons
    succession = replace(found, reasons=(f"beside {champion_uri}: {first}", *others))
    return Promotion(uri, champion_uri, gate, succession, drop, lost, latency)


def _logits(version: ModelVersion, dataset: Dataset) -> Tensor:
    """Of the test images, from files that are those that were registered."""
    uri = uri_of(version)
    registry.refuse_pickled(version)
    with checked_copy(version) as files:
        try:
            model = registry.load_files(str(files), version.tags.get("backend"))
        except Exception as error:  # files of another version of a library: any library's
            raise StageError(f"{uri}: cannot be loaded ({first_line(error)})") from None
        return predict_logits(model, dataset.test.images, label=f"{uri} on test images")


def _logits_of_champion(champion: ModelVersion | None, dataset: Dataset) -> tuple[Tensor | None, str]:
    """Its logits on the candidate's test images, or why there are none, if it is there at all."""
    if champion is None:
        return None, ""
    if champion.tags.get("data_digest") != dataset.digest:
        was = champion.tags.get("data_digest")
        return None, f"it was made with other data or another image size (digest {was}, not {dataset.digest})"
    try:
        return _logits(champion, dataset), ""
    except StageError as error:
        return None, f"it cannot be compared: {error}"


def _sweep(config: Config, host: Host, fp32_uri: str, versions: dict[str, ModelVersion], run_id: str) -> LatencyResult:
    contenders = [Contender(BASELINE, fp32_uri)]
    contenders += [Contender(name, uri_of(one), one.tags.get("backend")) for name, one in versions.items()]
    options = config.latency.model_copy(update={"baselines": []})
    request = SweepRequest(tuple(contenders), CANDIDATE, config.data.image_size, host.threads, options)
    result = time_versions(request)
    for _, step, values in metrics.of_latency(result, CANDIDATE):
        tracking.log_metrics(values, step)
    tracking.log_table(metrics.latency_table(result), "latency")
    names: dict[str, tuple[str, ...]] = {uri_of(one): (name,) for name, one in versions.items()}
    tracking.log_result("latency", LatencyEvidence(fp32_uri, names, result, host, run_id))
    return result


def _is_champion(name: str, version: ModelVersion | None) -> bool:
    """Whether this version, or for None no version, has the alias: another process may have moved it."""
    now = version_with(CHAMPION, name)
    return (now and now.version) == (version and version.version)


def _record(found: Promotion, word: str, run_id: str) -> None:
    """In the run and in the version's tags: what was decided, why, when and at whose word."""
    summary = f"{word}: {'; '.join(found.decision.reasons)}"
    run_tags = tracking.find_run(run_id).data.tags
    by, at = run_tags.get("mlflow.user", "unknown"), datetime.now(UTC).isoformat(timespec="seconds")
    version = registry.look_up(found.uri)
    worse = found.succession is not None and not found.succession.passed
    tags = {
        "promotion": word,
        "promotion_reason": summary,
        "promotion_run_id": run_id,
        "promotion_by": by,
        "promotion_at": at,
        "worse_than": str(found.champion_uri) if worse else "none",
        "worse_reason": "; ".join(found.succession.reasons) if worse and found.succession else "none",
    }
    # What its own job has found stays, by limits that those of this one need not be, unless this is better news.
    outdated = word == "passed" and version.tags.get("gate") == "failed"
    if outdated or "gate" not in version.tags:
        tags |= {"gate": found.gate.word, "gate_reason": found.gate.summary}
    if word == "forced":
        tags |= {"forced_reason": "; ".join(found.decision.reasons), "forced_by": by, "forced_at": at}
    timed = version.tags.get("latency_run_id")
    if outdated or timed in (None, version.tags.get("promotion_run_id")):  # by no job, or by a promotion before
        tags |= {"latency_run_id": run_id, "smallest_speedup": f"{found.latency.smallest_speedup(CANDIDATE):.3f}"}
        tags |= latency_tags(found.latency, CANDIDATE)
    tracking.log_result("promotion", found)
    tracking.log_metrics(_figures(found))
    registry.tag_version(found.uri, tags)
    tracking.set_tag("qexp.promotion", word)
    tracking.set_note(f"`{found.uri}` {summary}.")
    if word != "rejected":  # which the last line says
        say(f"{found.uri} {summary}")


def _figures(found: Promotion) -> dict[str, float]:
    figures = {
        "top1_drop_points": found.drop.top1_drop_points,
        "smallest_speedup": found.latency.smallest_speedup(CANDIDATE),
    }
    if found.drop_from_champion:
        figures["top1_below_champion_points"] = found.drop_from_champion.top1_drop_points
    return figures
