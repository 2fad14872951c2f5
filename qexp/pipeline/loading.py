"""Models that are in the registry already, as the stages need them: configuration, model, files, results."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config import HOW_TO_TRAIN, PLACES, Config, given_otherwise
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.gate import Succession
from qexp.models.classifier import ModelSpec, load_classifier, read_weights
from qexp.models.names import OPENVINO, is_factory, is_program
from qexp.models.published import sha256_of
from qexp.models.stored import model_file
from qexp.models.taken import load_taken
from qexp.pipeline.decide import judge
from qexp.pipeline.measure import LocalVersions, ToTime, predict_splits
from qexp.progress import say
from qexp.report.results import Bf16Evidence, Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence, ThroughputEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import CHAMPION, version_with
from qexp.tracking.integrity import checked_copy
from qexp.tracking.results import Fp32
from qexp.tracking.store import ModelVersion, uri_of
from qexp.tracking.tags import tags_of


def config_of_version(config: Config, uri: str, kind: str) -> Config:
    """`config` with the model, seed, data and training that the version was made with; given places of the data stay.

    Raises:
        InputError: the version does not exist or is not one of ours.
    """
    with tags_of(registry.find_version(uri, kind)).followed("train_run_id") as run_id:
        recorded = tracking.read_config(run_id)
    given = {name: value for name in PLACES if (value := getattr(config.data, name)) is not None}
    data = recorded.data.model_copy(update=given)
    train = recorded.train.model_copy(update={name: getattr(config.train, name) for name in HOW_TO_TRAIN})
    made_with = {"model": recorded.model, "seed": recorded.seed, "data": data, "train": train}
    made_with["preprocess"] = recorded.preprocess
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
    tags = tags_of(registry.find_version(uri, kind))
    digest = tags.data_digest
    if dataset.has_digest(digest):
        try:
            dataset.with_classes(tags.classes.count)
        except InputError:
            raise tags.wrong("classes", f"must be the {len(dataset.classes)} names of its data") from None
    else:
        raise InputError(
            f"--data-dir: {dataset.source} (digest {dataset.digest}) is not what {uri} was trained on (digest {digest})"
        )


def fp32_from_registry(uri: str, dataset: Dataset, splits: tuple[str, ...] | None = None) -> Fp32:
    """A registered fp32 model of ours; its logits on these splits, or on those on which it was evaluated.

    `dataset` is the one that it was trained on: `check_data` says so before there is a run.

    Raises:
        InputError: the version does not exist or is not ours.
        StageError: its files, or its weights, are not those that were registered.
    """
    found = registry.find_version(uri, "fp32")
    model = load_weights(found)
    evidence = fp32_result(found)
    # Those of the data at hand, which cost little in memory: an earlier version has not counted them.
    data = replace(evidence.data, duplicates=dataset.duplicates) if dataset.in_memory else evidence.data
    version = registry.from_entity(found)
    evidence = replace(evidence, data=data, verified=version.verified)
    return Fp32(model, version, evidence, predict_splits(model, dataset, "fp32", splits or tuple(evidence.accuracy)))


def load_weights(found: ModelVersion) -> Any:
    """The module of a registered fp32 version, with the weights that were registered: a `Classifier`, or of a model
    that was trained elsewhere and cannot be built again from a name, the program or the ONNX file that was registered.

    Raises:
        InputError: it has no weights file, or one of something else.
        StageError: its files, or its weights, are not those that were registered.
    """
    with checked_copy(found) as copy, checked_weights(found, copy) as file:
        if file.suffix == ".safetensors":
            return load_classifier(file)
        tags = tags_of(found)
        return load_taken(copy, ModelSpec(found.name.removesuffix("-fp32"), tags.classes.read(copy), tags.input))


@contextmanager
def checked_weights(found: ModelVersion, copy: Path) -> Iterator[Path]:
    """A private copy of the weights file of an fp32 version, which lies beside its training and not in its own folder:
    held, before anything is built from it, against the version's own files. Of a model that is not built again from a
    name, the model's own file in `copy`.

    Args:
        copy: those files, compared with what was registered.
    """
    tags = tags_of(found)
    with ExitStack() as stack:
        if tags.trained and "weights_uri" not in found.tags:
            yield model_file(copy)
            return
        with tags.followed("weights_uri") as weights_uri:
            file = stack.enter_context(tracking.downloaded(weights_uri))
            other = StageError(f"{tags.uri}: the weights in {weights_uri} are not those that were registered")
            if tags.weights_sha256 and sha256_of(file) != tags.weights_sha256:
                raise other
            spec, weights = read_weights(file)
            # Without a digest, as versions of before are, nothing that runs code of others is built from the file.
            if not tags.weights_sha256 and (is_factory(spec.architecture) or is_program(spec.architecture)):
                raise other
        stored = registry.load_files(copy, None).state_dict()  # type: ignore[attr-defined]  # a module
        same = all(name in weights and torch.equal(weights[name], value) for name, value in stored.items())
        if not same or (spec.classes, spec.shape) != (tags.classes.read(copy), tags.input.shape):
            raise other
        del stored, weights
        yield file


def fp32_result(found: ModelVersion) -> Fp32Evidence:
    """What the training of a version has found, by its tag."""
    with tags_of(found).followed("train_run_id") as run_id:
        return tracking.read_result(Fp32Evidence, run_id, "fp32")


def fp32_of_run(run_id: str, dataset: Dataset) -> Fp32:
    """The version that a run has trained."""
    return fp32_from_registry(tracking.read_result(Fp32Evidence, run_id, "fp32").version_uri, dataset)


def int8_of_run(run_id: str) -> Int8Evidence:
    """What a run of quantization has found, with the version that it has registered."""
    found = tracking.read_result(Int8Evidence, run_id, "int8")
    version = registry.find_version(found.version_uri, "int8")
    return replace(found, verified=tags_of(version).verified)


def to_time(found: ModelVersion) -> ToTime:
    """A registered int8 version as a sweep takes it: in the runtimes in which its accuracy was measured."""
    tags = tags_of(found)
    folded = bool(tags.folded)
    if tags.engine != "onnx":
        return ToTime(tags.engine, folded=folded)
    try:
        with tags.followed("quantize_run_id") as run_id:
            return ToTime.of(int8_of_run(run_id))
    except InputError as error:
        return ToTime(tags.engine, {OPENVINO: f"its accuracy there is not known: {error}"}, folded)


def bf16_of(found: ModelVersion) -> dict[str, Bf16Evidence]:
    """What is known of the baselines in bf16 from the last sweep of a version, by name."""
    if not (run_id := tags_of(found).latency_run_id):
        return {}
    try:
        return tracking.read_result(LatencyEvidence, run_id, "latency").rounded
    except InputError as error:  # a sweep that is lost is made anew
        say(f"the accuracy of bf16 is not known: {error}")
        return {}


def throughput_of(found: ModelVersion) -> ThroughputEvidence | None:
    """What is known of the throughput of a version, by its latest measurement."""
    if not (run_id := tags_of(found).throughput_run_id):
        return None
    try:
        return tracking.read_result(ThroughputEvidence, run_id, "throughput")
    except InputError as error:
        say(f"the throughput is not known: {error}")
        return None


@contextmanager
def local_files(fp32_uri: str, *int8_uris: str) -> Iterator[LocalVersions]:
    """Copies of the files of registered versions that have been compared with what was registered, for as long as the
    block lasts: loading them asks no store.

    Raises:
        InputError: a tag of a version is missing or wrong.
        StageError: files are gone, or others than those that were registered.
    """
    fp32 = registry.find_version(fp32_uri, "fp32")
    int8s = {uri: registry.find_version(uri, "int8") for uri in int8_uris}
    with ExitStack() as stack:
        copies = {uri: stack.enter_context(checked_copy(one)) for uri, one in ({fp32_uri: fp32} | int8s).items()}
        weights = stack.enter_context(checked_weights(fp32, copies[fp32_uri]))
        yield LocalVersions(fp32_uri, weights, {uri: str(copy) for uri, copy in copies.items()})


def logits_of_version(version: ModelVersion, dataset: Dataset) -> Tensor:
    """Of the test images, from files that are those that were registered.

    Raises:
        InputError: a tag of the version is missing or wrong.
        StageError: the files are others, or do not load.
    """
    model = registry.open_version(version)
    return predict_logits(model, dataset.test.images, label=f"{uri_of(version)} on test images")


def evidence_of_version(config: Config, uri: str) -> Evidence:
    """What the stages logged about a registered int8 version, held against the gate of `config`; no alias moves.

    Raises:
        InputError: the version is not one of ours, or its latency has not been measured.
    """
    found = registry.find_version(uri, "int8")
    tags, own = tags_of(found), uri_of(found)
    if tags.latency_run_id is None:
        raise InputError(f"--model-uri {uri}: its latency was not measured; run `qexp latency --model-uri {uri}` first")
    source = registry.source_of(found)
    fp32 = replace(fp32_result(found), verified=tags_of(source).verified)
    with tags.followed("latency_run_id") as run_id:
        latency = tracking.read_result(LatencyEvidence, run_id, "latency")
    judged = []
    for timed in sorted(latency.names, key=lambda other: other != own):  # the one that was asked for comes first
        try:
            version = registry.find_version(timed, "int8")
        except InputError:  # one that was timed beside it has been deleted since: its times stay in the table
            continue
        with tags_of(version).followed("quantize_run_id") as run_id:
            int8 = int8_of_run(run_id)
            if int8.version_uri not in latency.names:
                raise InputError("must be the run that has quantized this version")
        judged.append(judge(config, fp32, int8, latency))
    if not judged:
        raise tags.wrong("latency_run_id", "must be a run that has timed a version that is there")
    champion = version_with(CHAMPION, found.name)
    now, before = uri_of(champion) if champion else None, tags.champion_kept or "none"
    floats = latency.fair_floats(config.gate.of(found.name))
    if now == own or before == "none":
        return Evidence(fp32, tuple(judged), latency, champion=now == own, floats=floats)
    reason = found.tags.get("champion_kept_reason") or found.tags.get("promotion_reason", "not recorded")
    succession = Succession(False, (reason,), tags.champion_compared is not False)
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
