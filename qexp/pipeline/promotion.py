"""Whether a registered int8 version becomes `champion`: held against the gate and the present champion, side by side.

All are measured in this session: the same test images, the same machine, one latency sweep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from qexp.config import Config
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError, first_line
from qexp.measurement.accuracy import Comparison, compare, guess_percent, measure_accuracy, predict_logits
from qexp.measurement.gate import PASSED, UNMEASURED, GateResult, Succession, decide_gate, decide_succession
from qexp.measurement.host import Host
from qexp.measurement.sweep_models import BASELINE, BF16, SweepModel
from qexp.measurement.verdict import Verdict, decide_verdict
from qexp.models.classifier import load_classifier
from qexp.pipeline.latency_stage import (
    baselines_for,
    fair_floats,
    latency_tags,
    local_files,
    measure_bf16,
    speedup_tags,
    time_models,
)
from qexp.pipeline.loading import bf16_of
from qexp.pipeline.setup import prepare
from qexp.progress import say
from qexp.report.results import Bf16Evidence, Evidence, LatencyEvidence
from qexp.tracking import metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import CHALLENGER, CHAMPION, move_champion, version_with
from qexp.tracking.catalog import list_models
from qexp.tracking.integrity import checked_copy
from qexp.tracking.store import ModelVersion, split_uri, uri_of, use_store

CANDIDATE = "candidate"
STAYS = "champion stays"
CHANGED = "another version has become champion meanwhile"


@dataclass(frozen=True)
class Promotion:
    """What was found about a candidate: the gate's decision, and that against the champion where there is another.

    `floats` are the models that the candidate's speed was held against.
    """

    uri: str
    champion_uri: str | None
    gate: GateResult
    succession: Succession | None
    drop: Comparison
    drop_from_champion: Comparison | None
    measured: LatencyEvidence
    floats: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """That on the candidate, whether or not it takes the champion's place."""
        result = self.measured.latency
        return decide_verdict(
            self.gate, result.mean_ratio(self.floats, CANDIDATE), self.uri, result.winner(self.floats)
        )

    @property
    def word(self) -> str:
        """`passed`, what the gate says where it did not pass, or `champion stays`."""
        if not self.gate.passed:
            return "rejected" if self.gate.word != UNMEASURED else UNMEASURED
        return STAYS if self.succession and not self.succession.replaces else "passed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why: of the gate where it did not pass, or of both."""
        if self.succession is None or not self.gate.passed:
            return self.gate.reasons
        return self.succession.reasons if not self.succession.replaces else self.gate.reasons + self.succession.reasons


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
    uri, fp32_uri = uri_of(candidate), registry.tag_of(candidate, "fp32_uri")
    if not registry.exists(fp32_uri):
        raise InputError(f"NAME {name}: {uri} was made from {fp32_uri}, which is no longer there")
    champion = version_with(CHAMPION, name)
    before = uri_of(champion) if champion else None
    other = champion if before != uri else None
    config, host, dataset = prepare(config, fp32_uri)
    with _promotion_run(config, host, dataset, candidate, other) as run_id:
        found = _measure(config, host, dataset, candidate, other, run_id)
        word = "forced" if force and found.word != "passed" else found.word
        _record(found, word, run_id)  # first: no alias moves without a word on why
        if force:
            move_champion(uri)
        elif word == "passed" and not succeed(uri, champion):
            tags = {"promotion": "rejected", "promotion_reason": f"rejected: {CHANGED}"}
            registry.tag_version(uri, tags)
            raise StageError(f"{uri} is not promoted: {CHANGED}; run it again, to compare with that one")
    if word in ("rejected", UNMEASURED):
        still = f"the champion is still {before}" if before else "there is still no champion"
        raise StageError(f"{uri} is not promoted: {word}: {'; '.join(found.reasons)}; {still}")
    uris = {"int8": uri, "fp32": fp32_uri, "champion_before": before}
    facts = {"gate": found.gate.word, "reasons": list(found.reasons), **_figures(found)}
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
        _record(found, found.word, run_id)
    passed = found.word == "passed"
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
    newest = registry.newest_version(name)
    if number is None and version_with(CHALLENGER, name) and not _awaits_times(f"models:/{name}/{newest}"):
        return registry.find_version(f"models:/{name}@{CHALLENGER}", "int8", option="NAME")
    number = number or newest
    try:
        return registry.find_version(f"models:/{name}/{number}", "int8")
    except InputError as error:
        raise InputError(f"--version {number}: {str(error).partition(': ')[2]}") from None


def _awaits_times(uri: str) -> bool:
    """Whether a version's own job has not measured it well enough for a verdict, and so for an alias."""
    return bool(registry.look_up(uri).tags.get("gate") == UNMEASURED)


def _measure(
    config: Config, host: Host, dataset: Dataset, candidate: ModelVersion, champion: ModelVersion | None, run_id: str
) -> Promotion:
    uri, fp32_uri = uri_of(candidate), candidate.tags["fp32_uri"]
    fp32_version = registry.find_version(fp32_uri, "fp32")
    fp32, int8 = (_logits(one, dataset) for one in (fp32_version, candidate))
    before, why_not = _logits_of_champion(champion, dataset)
    versions = {CANDIDATE: candidate} | ({CHAMPION: champion} if champion and before is not None else {})
    bf16 = _bf16(config, host, dataset, fp32_version, candidate, fp32)
    measured = _sweep(config, host, fp32_uri, versions, run_id, bf16)
    result, limits = measured.latency, config.gate.of(candidate.name)
    floats = fair_floats(limits, measured)
    source = registry.from_entity(fp32_version)
    version = registry.from_entity(candidate)
    labels = dataset.test.labels
    drop = compare(fp32, int8, labels)
    gate = decide_gate(
        limits,
        measure_accuracy(fp32, labels),
        measure_accuracy(int8, labels),
        guess_percent(labels),
        drop,
        source.size_bytes / version.size_bytes,
        result.least_speedup(CANDIDATE, floats),
        result.shortcomings,
        source.verified and version.verified,
    )
    if champion is None:
        return Promotion(uri, None, gate, None, drop, None, measured, floats)
    lost = compare(before, int8, labels) if before is not None else None
    if lost:
        smaller = version.size_bytes / registry.from_entity(champion).size_bytes
        faster = result.mean_ratio([CHAMPION], CANDIDATE)
        found = decide_succession(limits, lost, faster, smaller, result.shortcomings)
    else:
        found = Succession(False, (why_not,), compared=False)
    first, *others = found.reasons
    succession = replace(found, reasons=(f"beside {uri_of(champion)}: {first}", *others))
    return Promotion(uri, uri_of(champion), gate, succession, drop, lost, measured, floats)


def _bf16(
    config: Config, host: Host, dataset: Dataset, fp32: ModelVersion, candidate: ModelVersion, logits: Tensor
) -> Bf16Evidence | None:
    """What the candidate's own job has found of the baseline bf16, or else what is measured here."""
    if found := bf16_of(candidate.tags):
        return found
    with tracking.downloaded(fp32.tags["weights_uri"]) as file:
        return measure_bf16(config, host, dataset, load_classifier(file), logits)


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


def _sweep(
    config: Config,
    host: Host,
    fp32_uri: str,
    versions: dict[str, ModelVersion],
    run_id: str,
    bf16: Bf16Evidence | None,
) -> LatencyEvidence:
    baselines = baselines_for(config, host)
    with local_files(fp32_uri, *map(uri_of, versions.values())) as (weights, folders):
        models = [SweepModel(name, folders[fp32_uri]) for name in (BASELINE, *baselines)]
        models += [SweepModel(name, folders[uri_of(one)], one.tags.get("backend")) for name, one in versions.items()]
        result = time_models(config, host, models, CANDIDATE, weights)
    names: dict[str, tuple[str, ...]] = {uri_of(one): (name,) for name, one in versions.items()}
    evidence = LatencyEvidence(fp32_uri, names, result, host, run_id, bf16 if BF16 in baselines else None)
    floats = fair_floats(config.gate.of(split_uri(next(iter(names)))[0]), evidence)
    for _, step, values in metrics.of_latency(result, CANDIDATE, floats):
        tracking.log_metrics(values, step)
    tracking.log_table(metrics.latency_table(result), "latency")
    tracking.log_result("latency", evidence)
    return evidence


def _is_champion(name: str, version: ModelVersion | None) -> bool:
    """Whether this version, or for None no version, has the alias: another process may have moved it."""
    now = version_with(CHAMPION, name)
    return (now and now.version) == (version and version.version)


def _record(found: Promotion, word: str, run_id: str) -> None:
    """In the run and in the version's tags: what was decided, why, when and at whose word."""
    summary = f"{word}: {'; '.join(found.reasons)}"
    run_tags = tracking.find_run(run_id).data.tags
    by, at = run_tags.get("mlflow.user", "unknown"), datetime.now(UTC).isoformat(timespec="seconds")
    version = registry.look_up(found.uri)
    stays = found.succession is not None and not found.succession.replaces
    tags = {
        "promotion": word,
        "promotion_reason": summary,
        "promotion_run_id": run_id,
        "promotion_by": by,
        "promotion_at": at,
        "champion_kept": str(found.champion_uri) if stays else "none",
        "champion_compared": str(found.succession is not None and found.succession.compared).lower(),
        "champion_kept_reason": "; ".join(found.succession.reasons) if stays and found.succession else "none",
    }
    # What its own job has found stays, by limits that those of this one need not be, unless this is better news.
    outdated = word == "passed" and version.tags.get("gate") != PASSED
    if outdated or "gate" not in version.tags:
        tags |= {"gate": found.gate.word, "gate_reason": found.gate.summary}
        tags |= {"verdict": found.verdict.word, "verdict_reason": found.verdict.reason}
    if word == "forced":
        tags |= {"forced_reason": "; ".join(found.reasons), "forced_by": by, "forced_at": at}
    timed = version.tags.get("latency_run_id")
    if outdated or timed in (None, version.tags.get("promotion_run_id")):  # by no job, or by a promotion before
        tags |= {"latency_run_id": run_id} | speedup_tags(found.measured, CANDIDATE, found.floats)
        tags |= latency_tags(found.measured.latency, CANDIDATE)
    tracking.log_result("promotion", found)
    tracking.log_metrics(_figures(found))
    registry.tag_version(found.uri, tags)
    tracking.set_tag("qexp.promotion", word)
    tracking.set_note(f"`{found.uri}` {summary}.")
    if word not in ("rejected", UNMEASURED):  # which the last line says
        say(f"{found.uri} {summary}")


def _figures(found: Promotion) -> dict[str, float]:
    figures = {
        "top1_drop_points": found.drop.top1_drop_points,
        "smallest_speedup": found.measured.latency.smallest_speedup(CANDIDATE, found.floats),
    }
    if found.drop_from_champion:
        figures["top1_below_champion_points"] = found.drop_from_champion.top1_drop_points
    return figures
