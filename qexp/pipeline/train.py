"""Training: a classifier is trained and evaluated, and becomes a model that can be registered.

Plain functions: a configuration and a data set go in, `NewModel` comes out. The loop itself is in `qexp/training/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config import Config
from qexp.data.datasets import Dataset, stratified_sample
from qexp.data.duplicates import Duplicates
from qexp.measurement.accuracy import Accuracy, guess_percent, measure_accuracy, to_float
from qexp.measurement.cost import layer_table
from qexp.measurement.host import Host, freed_memory_reused
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.external import load_external
from qexp.models.preprocessing import preprocessing_of
from qexp.pipeline.measure import predict_splits
from qexp.report.results import DataFacts, Fp32Evidence
from qexp.tracking.commit import read_commit
from qexp.tracking.metrics import tags_of_accuracy
from qexp.tracking.results import NewModel
from qexp.training.execution import settle_execution
from qexp.training.train import EpochResult, train_model

VERIFY_IMAGES = 64  # training images on which a reloaded version must give the same bits


def train(
    config: Config,
    host: Host,
    dataset: Dataset,
    folder: Path,
    on_settled: Callable[[dict[str, bool | int]], None],
    on_epoch: Callable[[EpochResult], None],
) -> NewModel:
    """Train and evaluate a classifier; with a checkpoint in `folder`, from there on to the same bits.

    Args:
        on_settled: told of the options that are settled by timing, before the first step.
        on_epoch: told of every epoch, as by `train_model`.
    """
    model = fresh_classifier(config, dataset)
    with freed_memory_reused():  # as the training that follows
        settled = settle_execution(config.train, config.train.device or "cpu", model, dataset.train, folder).options()
    on_settled(settled)
    options = config.with_training(settled).train
    result = train_model(model, dataset, options, config.seed, on_epoch, folder)
    logits = predict_splits(model, dataset, "fp32")
    accuracy = accuracy_of(logits, dataset)
    evidence = Fp32Evidence(
        config.model,
        config.seed,
        version_uri="",
        size_bytes=0,
        data=data_facts(dataset, config, dataset.duplicates),
        train=result,
        accuracy=accuracy,
    )
    sample = verification_images(dataset)
    with torch.no_grad():
        expected = model(to_float(sample))
    layers = layer_table(model, model.spec.shape)
    return NewModel(evidence, model, model.spec, sample, expected, logits, lineage(dataset, host, accuracy), layers)


def follow(config: Config, dataset: Dataset) -> None:
    """The part in the training of a process that does not lead."""
    model = fresh_classifier(config, dataset)
    train_model(model, dataset, config.train, config.seed, lambda epoch: None, Path("checkpoints"))


def fresh_classifier(config: Config, dataset: Dataset) -> Classifier:
    """The classifier before its first step: the same bits from the same seed. With weights of others, it begins with
    those."""
    torch.manual_seed(config.seed)
    preprocessing = preprocessing_of(config.data, config.preprocess)
    if config.weights:
        return load_external(config, dataset.classes, preprocessing, new_head=True)
    return build_classifier(ModelSpec(config.model, dataset.classes, preprocessing), dataset.train.images)


def accuracy_of(logits: dict[str, Tensor], dataset: Dataset) -> dict[str, Accuracy]:
    """Accuracy by split."""
    return {name: measure_accuracy(found, getattr(dataset, name).labels) for name, found in logits.items()}


def lineage(dataset: Dataset, host: Host, accuracy: dict[str, Accuracy]) -> dict[str, Any]:
    """Tags that every version carries: data, code, machine, accuracy on the test images."""
    return {
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "git_commit": read_commit(),
        "cpu": host.cpu,
        "cpu_features": ",".join(host.features),
        "threads": host.threads,
    } | tags_of_accuracy(accuracy["test"])


def verification_images(dataset: Dataset) -> Tensor:
    """Training images, or without any, test images, on which a version that is loaded again must give the same bits."""
    part = dataset.train if len(dataset.train) else dataset.test
    return part.images[stratified_sample(part.labels, min(VERIFY_IMAGES, len(part)), seed=0)]


def data_facts(dataset: Dataset, config: Config, duplicates: Duplicates) -> DataFacts:
    """What the report says of a data set."""
    counts = len(dataset.train), len(dataset.validation), len(dataset.test)
    facts = dataset.name, dataset.source, dataset.digest, dataset.classes, config.data.image_size
    return DataFacts(*facts, *counts, duplicates, guess_percent(dataset.test.labels))
