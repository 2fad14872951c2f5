"""Models that are in the registry already, as the stages need them: configuration, model, files, results."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qexp.config import HOW_TO_TRAIN, Config, given_otherwise
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError, first_line
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.gate import Succession
from qexp.models.classifier import load_classifier
from qexp.pipeline.decide import judge
from qexp.pipeline.measure import SPLITS, LocalVersions, predict_splits
from qexp.progress import say
from qexp.report.results import Bf16Evidence, Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import CHAMPION, version_with
from qexp.tracking.integrity import checked_copy, copy_files
from qexp.tracking.outage import store_errors
from qexp.tracking.results import Fp32
from qexp.tracking.store import ModelVersion, uri_of


def config_of_version(config: Config, uri: str, kind: str) -> Config:
    """`config` with the model, seed, data and training that the version was made with; a given data_dir stays.

    Raises:
        InputError: the version does not exist or is not one of ours.
    """
    found = registry.find_version(uri, kind)
    recorded = tracking.read_config(registry.tag_of(found, "train_run_id"))
    data = recorded.data.model_copy(update={"data_dir": config.data.data_dir or recorded.data.data_dir})
    train = recorded.train.model_copy(update={name: getattr(config.train, name) for name in HOW_TO_TRAIN})
    made_with = {"model": recorded.model, "seed": recorded.seed, "data": data, "train": train}
    return config.model_copy(update=made_with)


def refuse_conflicts(config: Config, uri: str, sections: tuple[str, ...]) -> None:
    """Raise InputError where `config` asks for something else than the fp32 version at `uri` was made with.

    A value that is the default asks for nothing. Top-level `model` and `seed` are always looked at.
    """
    for name, value, made_with in given_otherwise(config, config_of_version(config, uri, "fp32")):
        section, key = name.split(".")
        if section in sections or key in ("model", "seed"):
            option = key.replace("_", "-")
            raise InputError(f"--{option} {value}: {uri} was made with {made_with}; leave the option or the URI out")


def check_data(uri: str, dataset: Dataset, kind: str = "fp32") -> None:
    """Raise InputError unless the version was made with this data: its test images might be among others."""
    digest = registry.tag_of(registry.find_version(uri, kind), "data_digest")
    if digest != dataset.digest:
        raise InputError(
            f"--data-dir: {dataset.source} (digest {dataset.digest}) is not what {uri} was trained on (digest {digest})"
        )


def fp32_from_registry(uri: str, dataset: Dataset, splits: tuple[str, ...] = SPLITS) -> Fp32:
    """Rebuild a registered fp32 model of ours from its weights file; its logits on these splits.

    `dataset` is the one that it was trained on: `check_data` says so before there is a run.

    Raises:
        InputError: the version does not exist or is not ours.
    """
    found = registry.find_version(uri, "fp32")
    with tracking.downloaded(found.tags["weights_uri"]) as file:
        model = load_classifier(file)
    evidence = tracking.read_result(Fp32Evidence, found.tags["train_run_id"], "fp32")
    # Those of the data at hand: an earlier version has not counted them.
    data = replace(evidence.data, duplicates=dataset.duplicates)
    version = registry.from_entity(found)
    evidence = replace(evidence, data=data, verified=version.verified)
    return Fp32(model, version, evidence, predict_splits(model, dataset, "fp32", splits))


def fp32_of_run(run_id: str, dataset: Dataset) -> Fp32:
    """The version that a run has trained."""
    return fp32_from_registry(tracking.read_result(Fp32Evidence, run_id, "fp32").version_uri, dataset)


def int8_of_run(run_id: str) -> Int8Evidence:
    """What a run of quantization has found, with the version that it has registered."""
    found = tracking.read_result(Int8Evidence, run_id, "int8")
    version = registry.find_version(found.version_uri, "int8")
    return replace(found, verified=version.tags["verified"] == "true")


def bf16_of(tags: dict[str, str]) -> Bf16Evidence | None:
    """What is known of the baseline bf16 from the last sweep of a version with these tags."""
    if not (run_id := tags.get("latency_run_id")):
        return None
    try:
        return tracking.read_result(LatencyEvidence, run_id, "latency").bf16
    except InputError as error:  # a sweep that is lost is made anew
        say(f"the accuracy of bf16 is not known: {error}")
        return None


@contextmanager
def local_files(fp32_uri: str, *int8_uris: str) -> Iterator[LocalVersions]:
    """Copies of the files of registered versions, for as long as the block lasts: loading them asks no store."""
    weights_uri = registry.find_version(fp32_uri, "fp32").tags["weights_uri"]
    with tempfile.TemporaryDirectory() as name, tracking.downloaded(weights_uri) as weights:
        with store_errors():
            folders = {uri: str(copy_files(uri, Path(name))) for uri in (fp32_uri, *int8_uris)}
        yield LocalVersions(fp32_uri, weights, folders)


def logits_of_version(version: ModelVersion, dataset: Dataset) -> Tensor:
    """Of the test images, from files that are those that were registered.

    Raises:
        StageError: the files are others, or do not load.
    """
    uri = uri_of(version)
    registry.refuse_pickled(version)
    with checked_copy(version) as files:
        try:
            model = registry.load_files(str(files), version.tags.get("backend"))
        except Exception as error:  # files of another version of a library: any library's
            raise StageError(f"{uri}: cannot be loaded ({first_line(error)})") from None
        return predict_logits(model, dataset.test.images, label=f"{uri} on test images")


def evidence_of_version(config: Config, uri: str) -> Evidence:
    """What the stages logged about a registered int8 version, held against the gate of `config`; no alias moves.

    Raises:
        InputError: the version is not one of ours, or its latency has not been measured.
    """
    found = registry.find_version(uri, "int8")
    if "latency_run_id" not in found.tags:
        raise InputError(f"--model-uri {uri}: its latency was not measured; run `qexp latency --model-uri {uri}` first")
    source = registry.find_version(found.tags["fp32_uri"], "fp32")
    fp32 = tracking.read_result(Fp32Evidence, found.tags["train_run_id"], "fp32")
    fp32 = replace(fp32, verified=source.tags["verified"] == "true")
    latency = tracking.read_result(LatencyEvidence, found.tags["latency_run_id"], "latency")
    own = uri_of(found)
    judged = []
    for timed in sorted(latency.names, key=lambda other: other != own):  # the one that was asked for comes first
        try:
            version = registry.find_version(timed, "int8")
        except InputError:  # one that was timed beside it has been deleted since: its times stay in the table
            continue
        judged.append(judge(config, fp32, int8_of_run(version.tags["quantize_run_id"]), latency))
    champion = version_with(CHAMPION, found.name)
    now, before = uri_of(champion) if champion else None, found.tags.get("champion_kept", "none")
    floats = latency.fair_floats(config.gate.of(found.name))
    if now == own or before == "none":
        return Evidence(fp32, tuple(judged), latency, champion=now == own, floats=floats)
    reason = found.tags.get("champion_kept_reason") or found.tags.get("promotion_reason", "not recorded")
    succession = Succession(False, (reason,), found.tags.get("champion_compared") != "false")
    since = now if now != before else None
    return Evidence(
        fp32,
        tuple(judged),
        latency,
        champion=False,
        floats=floats,
        succession=succession,
        before_uri=before,
        now_uri=since,
    )
