"""Models that are in the registry already, as the stages need them: configuration, fp32 model, evidence."""

from dataclasses import replace

from qexp.config import HOW_TO_TRAIN, Config, given_otherwise
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.measurement.gate import Succession
from qexp.models.classifier import load_classifier
from qexp.pipeline.latency_stage import decide, fair_floats
from qexp.pipeline.quantize_stage import Int8
from qexp.pipeline.stages import SPLITS, Fp32, evaluate_splits
from qexp.progress import say
from qexp.report.results import Bf16Evidence, Evidence, Fp32Evidence, Int8Evidence, Judged, LatencyEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import CHAMPION, version_with
from qexp.tracking.store import uri_of


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
    evidence = replace(evidence, data=replace(evidence.data, duplicates=dataset.duplicates))
    logits, _ = evaluate_splits(model, dataset, "fp32", splits)
    return Fp32(model, registry.from_entity(found), evidence, logits)


def int8_of_run(run_id: str) -> Int8:
    """The version that a run of the quantization stage has registered."""
    evidence = tracking.read_result(Int8Evidence, run_id, "int8")
    return Int8(registry.from_entity(registry.find_version(evidence.version_uri, "int8")), evidence)


def bf16_of(tags: dict[str, str]) -> Bf16Evidence | None:
    """What is known of the baseline bf16 from the last sweep of a version with these tags."""
    if not (run_id := tags.get("latency_run_id")):
        return None
    try:
        return tracking.read_result(LatencyEvidence, run_id, "latency").bf16
    except InputError as error:  # a sweep that is lost is made anew
        say(f"the accuracy of bf16 is not known: {error}")
        return None


def evidence_of_version(config: Config, uri: str) -> Evidence:
    """What the stages logged about a registered int8 version, held against the gate of `config`; no alias moves.

    Raises:
        InputError: the version is not one of ours, or its latency has not been measured.
    """
    found = registry.find_version(uri, "int8")
    if "latency_run_id" not in found.tags:
        raise InputError(f"--model-uri {uri}: its latency was not measured; run `qexp latency --model-uri {uri}` first")
    fp32 = tracking.read_result(Fp32Evidence, found.tags["train_run_id"], "fp32")
    latency = tracking.read_result(LatencyEvidence, found.tags["latency_run_id"], "latency")
    source = registry.find_version(found.tags["fp32_uri"], "fp32")
    own = uri_of(found)
    judged = []
    for timed in sorted(latency.contenders, key=lambda other: other != own):  # the one that was asked for comes first
        try:
            version = registry.find_version(timed, "int8")
        except InputError:  # one that was timed beside it has been deleted since: its times stay in the table
            continue
        int8 = tracking.read_result(Int8Evidence, version.tags["quantize_run_id"], "int8")
        verified = all(one.tags["verified"] == "true" for one in (source, version))
        gate = decide(config, fp32, int8, latency, verified)
        judged.append(Judged(int8, latency.name_of(timed), gate))
    champion = version_with(CHAMPION, found.name)
    now, before = uri_of(champion) if champion else None, found.tags.get("champion_kept", "none")
    floats = fair_floats(config.gate.of(found.name), latency)
    if now == own or before == "none":
        return Evidence(fp32, tuple(judged), latency, now == own, floats)
    reason = found.tags.get("champion_kept_reason", found.tags["promotion_reason"])
    succession = Succession(False, (reason,), found.tags.get("champion_compared") != "false")
    since = now if now != before else None
    return Evidence(fp32, tuple(judged), latency, False, floats, {}, succession, before, since)
