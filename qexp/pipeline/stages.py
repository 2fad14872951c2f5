"""Each stage in a run of its own: compute, log, register. pipeline.py says in which order they go.

Here are training and the report, and what all stages share; quantizing.py and deciding.py have those between.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config import Config
from qexp.data.datasets import Dataset, stratified_sample
from qexp.errors import StageError
from qexp.measurement.accuracy import Accuracy, guess_percent, measure_accuracy, predict_logits
from qexp.measurement.cost import layer_table
from qexp.measurement.host import Host, freed_memory_reused
from qexp.models.classifier import Classifier, ModelSpec, build_classifier, save_classifier
from qexp.pipeline.trained import Trained, save_trained
from qexp.progress import say
from qexp.report.page import write_report
from qexp.report.results import DataFacts, Evidence, Fp32Evidence
from qexp.tracking import leftovers, metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.commit import read_commit
from qexp.tracking.outage import store_errors
from qexp.tracking.registry import Registered
from qexp.tracking.store import quickly
from qexp.training.checkpoint import checkpoint_folder, lock_of, remove_checkpoints
from qexp.training.execution import settle_execution
from qexp.training.train import EpochResult, train_model

VERIFY_IMAGES = 64  # training images on which a reloaded version must give the same bits
LAYER_TABLE = "model_summary.txt"  # artifact of the runs that train and quantize
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Fp32:
    """A trained model with its registered version, what was found out about it, and its logits by split."""

    model: Classifier
    version: Registered
    evidence: Fp32Evidence
    logits: dict[str, Tensor]


def train_stage(config: Config, host: Host, dataset: Dataset, resume: str | None = None) -> Fp32:
    """Train, evaluate, log and register an fp32 classifier; with `resume`, going on with that run."""
    name, note = f"train-{config.model}", f"Training of {config.model} on {dataset.name}."
    logged: set[int] = tracking.logged_steps(resume, metrics.FIRST_OF_EPOCH) if resume else set()
    # Of a run that goes on, nothing is touched before it is known that nobody else is at work on it.
    with lock_of(resume), tracking.start_run(name, note, resume) as run_id, lock_of(None if resume else run_id):
        if resume:
            leftovers.discard_versions(resume)
        model, folder = fresh_classifier(config, dataset), checkpoint_folder(run_id)
        tracking.log_setup(config, host)  # what timing settles is left out: a run that is stopped now can be resumed
        with freed_memory_reused():  # as the training that follows
            settled = settle_execution(config.train, config.train.device or "cpu", model, dataset.train, folder)
        config = with_execution(config, settled.options())
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, SPLITS)
        result = train_model(model, dataset, config.train, config.seed, _curve_logger(run_id, logged), folder)
        logits, accuracy = evaluate_splits(model, dataset, "fp32")
        evidence = Fp32Evidence(config.model, config.seed, "", 0, _data_facts(dataset, config), result, accuracy)
        tags = lineage(dataset, host, accuracy)
        trained = Trained(evidence, tags, verification_images(dataset))
        save_trained(folder, trained)
        version, evidence = publish_trained(model, trained, run_id, logged)
    remove_checkpoints(run_id)
    return Fp32(model, version, evidence, logits)


def with_execution(config: Config, options: dict[str, bool | int]) -> Config:
    """The configuration with what training has settled by timing."""
    return config.model_copy(update={"train": config.train.model_copy(update=options)})


def _curve_logger(run_id: str, logged: set[int]) -> Callable[[EpochResult], None]:
    """Logs each epoch that is not in `logged`, and adds it. A store that fails stops no training: what it lacks is sent
    with the next epoch, or at the end."""
    waiting: list[EpochResult] = []

    def log(epoch: EpochResult) -> None:
        away = bool(waiting)
        waiting.append(epoch)
        try:
            with store_errors(), quickly() if away else nullcontext():
                log_curves(run_id, waiting, logged)
            waiting.clear()
        except StageError as error:
            if not away:
                say(f"{error}; training goes on, its curves will be logged once the store is back")

    return log


def log_curves(run_id: str, epochs: Sequence[EpochResult], logged: set[int]) -> None:
    """Log the epochs that are not in `logged`, and add them."""
    for epoch in epochs:
        if epoch.epoch not in logged:
            tracking.log_metrics(metrics.of_epoch(epoch), epoch.epoch, (run_id, None))
            logged.add(epoch.epoch)


def fresh_classifier(config: Config, dataset: Dataset) -> Classifier:
    """The classifier before its first step: the same bits from the same seed."""
    torch.manual_seed(config.seed)
    return build_classifier(ModelSpec(config.model, dataset.classes, config.data.image_size), dataset.train.images)


def publish_trained(
    model: Classifier, trained: Trained, run_id: str, logged: set[int]
) -> tuple[Registered, Fp32Evidence]:
    """Log what a finished training has found, in its run, the active one, and register the model; `logged` are the
    epochs whose curves are there. Returns the version, and the evidence with it."""
    evidence = trained.evidence
    log_curves(run_id, evidence.train.epochs, logged)
    name = f"{evidence.model}-{evidence.data.name}-fp32"
    tags = {"train_run_id": run_id, "weights_uri": _log_weights(model, run_id)} | trained.tags
    version = registry.register("fp32", model, name, model.spec, trained.sample, tags)
    registry.make_challenger(version)
    evidence = replace(evidence, version_uri=version.uri, size_bytes=version.size_bytes, contents=version.contents)
    tracking.log_result("fp32", evidence)
    tracking.log_text(layer_table(model, model.spec.image_size), LAYER_TABLE)
    top1 = evidence.accuracy["test"].top1_percent
    tracking.set_note(
        f"{evidence.model} on {evidence.data.name}: test top-1 **{top1:.2f} %** with the weights of epoch "
        f"{evidence.train.best_epoch}; registered as `{version.uri}`."
    )
    # Last: what a killed run has logged before is logged again when it goes on.
    values = metrics.of_model(evidence.accuracy, version.size_bytes, _parameters(model))
    tracking.log_metrics(values, owner=version.owner)
    return version, evidence


def report_stage(config: Config, host: Host, evidence: Evidence, parent_run_id: str | None = None) -> str:
    """Write the report, log it with its pictures (to the parent's run too), copy it to `output_dir`; the page's URI."""
    with tracking.start_run("report", f"Report on `{evidence.int8.version_uri}`: see the artifacts.") as run_id:
        tracking.log_setup(config, host)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "report")  # not the temporary one, which nobody else may read
            folder.mkdir()
            write_report(evidence, folder)
            if config.output_dir:  # first: it is there whatever becomes of the store
                shutil.copytree(folder, config.output_dir, dirs_exist_ok=True)
            for owner in filter(None, (run_id, parent_run_id)):
                tracking.log_folder(folder, "report", owner)
    return f"runs:/{run_id}/report/report.html"


def copy_report(config: Config, report_uri: str) -> None:
    """Copy a report that is logged already to `output_dir`, if it is set."""
    if config.output_dir:
        with tracking.downloaded(report_uri.rpartition("/")[0]) as folder:
            shutil.copytree(folder, config.output_dir, dirs_exist_ok=True)


def evaluate_splits(
    model: Callable[[Tensor], Tensor], dataset: Dataset, label: str, splits: tuple[str, ...] = SPLITS
) -> tuple[dict[str, Tensor], dict[str, Accuracy]]:
    """Logits and accuracy of a model by split."""
    logits, accuracy = {}, {}
    for name in splits:
        split = getattr(dataset, name)
        logits[name] = predict_logits(model, split.images, label=f"{label} on {name} images")
        accuracy[name] = measure_accuracy(logits[name], split.labels)
    return logits, accuracy


def _log_weights(model: Classifier, run_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(model, Path(folder, "model.safetensors"))
        tracking.log_folder(Path(folder), "weights", run_id)
    return f"runs:/{run_id}/weights/model.safetensors"


def lineage(dataset: Dataset, host: Host, accuracy: dict[str, Accuracy]) -> dict[str, Any]:
    """Tags that every version carries: data, code, machine, accuracy on the test images."""
    test = accuracy["test"]
    return {
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "git_commit": read_commit(),
        "cpu": host.cpu,
        "cpu_features": ",".join(host.features),
        "threads": host.threads,
        "test_images": test.images,
        "test_top1_correct": test.top1_correct,
        "test_top3_correct": test.top3_correct,
        "test_top1_tied": test.top1_tied_images,
        "test_top3_tied": test.top3_tied_images,
        "test_top1_percent": f"{test.top1_percent:.3f}",
        "test_top3_percent": f"{test.top3_percent:.3f}",
    }


def verification_images(dataset: Dataset) -> Tensor:
    count = min(VERIFY_IMAGES, len(dataset.train))
    return dataset.train.images[stratified_sample(dataset.train.labels, count, seed=0)]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _data_facts(dataset: Dataset, config: Config) -> DataFacts:
    counts = len(dataset.train), len(dataset.validation), len(dataset.test)
    facts = dataset.name, dataset.source, dataset.digest, dataset.classes, config.data.image_size
    return DataFacts(*facts, *counts, dataset.duplicates, guess_percent(dataset.test.labels))
