"""Models that are in the registry already, as the stages need them: configuration, fp32 model, evidence."""

from qexp import registry, tracking
from qexp.config import Config
from qexp.data import Dataset
from qexp.errors import InputError
from qexp.evidence import Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence
from qexp.models import load_classifier
from qexp.stages import SPLITS, Fp32, decide, evaluate_splits


def config_of_version(config: Config, uri: str, kind: str) -> Config:
    """`config` with the model, data and seed that the registered version was trained with; a given data_dir stays.

    Raises:
        InputError: the version does not exist or is not one of ours.
    """
    found = registry.find_version(uri, kind)
    recorded = tracking.read_config(found.tags["train_run_id"])
    data = recorded.data.model_copy(update={"data_dir": config.data.data_dir or recorded.data.data_dir})
    return config.model_copy(update={"model": recorded.model, "seed": recorded.seed, "data": data})


def check_data(uri: str, dataset: Dataset) -> None:
    """Raise InputError unless the fp32 version was trained on this data: its test images might be among others."""
    digest = registry.find_version(uri, "fp32").tags["data_digest"]
    if digest != dataset.digest:
        raise InputError(
            f"--data-dir: {dataset.source} (digest {dataset.digest}) is not what {uri} was trained on (digest {digest})"
        )


def fp32_from_registry(uri: str, dataset: Dataset, splits: tuple[str, ...] = SPLITS) -> Fp32:
    """Rebuild a registered fp32 model of ours from its weights file; its logits on these splits.

    Raises:
        InputError: the version does not exist, is not ours, or was trained on other data.
    """
    check_data(uri, dataset)
    found = registry.find_version(uri, "fp32")
    with tracking.downloaded(found.tags["weights_uri"]) as file:
        model = load_classifier(file)
    evidence = tracking.read_result(Fp32Evidence, found.tags["train_run_id"], "fp32")
    logits, _ = evaluate_splits(model, dataset, "fp32", splits)
    return Fp32(model, registry.from_entity(found), evidence, logits)


def evidence_of_version(config: Config, uri: str) -> Evidence:
    """What the stages logged about a registered int8 version, held against the gate of `config`; no alias moves.

    Raises:
        InputError: the version is not one of ours, or its latency has not been measured.
    """
    found = registry.find_version(uri, "int8")
    if "latency_run_id" not in found.tags:
        raise InputError(f"--model-uri {uri}: its latency was not measured; run `qexp latency --model-uri {uri}` first")
    fp32 = tracking.read_result(Fp32Evidence, found.tags["train_run_id"], "fp32")
    int8 = tracking.read_result(Int8Evidence, found.tags["quantize_run_id"], "int8")
    latency = tracking.read_result(LatencyEvidence, found.tags["latency_run_id"], "latency")
    gate = decide(config, fp32, int8, latency, found.tags["verified"] == "true")
    return Evidence(fp32, int8, latency.latency, latency.host, gate, champion=found.tags.get("gate") == "passed")
