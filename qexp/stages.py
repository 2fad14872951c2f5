"""Each stage in a run of its own: compute, log, register. pipeline.py says in which order they go.

Here are training and the report, and what all stages share; quantizing.py and deciding.py have those between.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp import metrics, registry, tracking
from qexp.checkpoint import checkpoint_folder, lock_of, remove_checkpoints
from qexp.commit import read_commit
from qexp.config import Config
from qexp.data import Dataset, stratified_sample
from qexp.errors import InputError
from qexp.evaluation import Accuracy, measure_accuracy, predict_logits
from qexp.evidence import DataFacts, Evidence, Fp32Evidence
from qexp.host import Host
from qexp.models import Classifier, ModelSpec, build_classifier, save_classifier
from qexp.registry import Registered
from qexp.report import write_report
from qexp.training import EpochResult, TrainResult, train_model

VERIFY_IMAGES = 64  # training images on which a reloaded version must give the same bits
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
    logged = tracking.logged_steps(resume, metrics.FIRST_OF_EPOCH) if resume else set()
    # Of a run that goes on, nothing is touched before it is known that nobody else is at work on it.
    with lock_of(resume), tracking.start_run(name, note, resume) as run_id, lock_of(None if resume else run_id):
        if resume:
            registry.discard_versions(resume)
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, SPLITS)
        model = fresh_classifier(config, dataset)

        def log_new(epoch: EpochResult) -> None:
            if epoch.epoch not in logged:
                tracking.log_metrics(metrics.of_epoch(epoch), step=epoch.epoch)

        trained = train_model(model, dataset, config.train, config.seed, log_new, checkpoint_folder(run_id))
        fp32 = _register_trained(config, host, dataset, model, trained, run_id)
    remove_checkpoints(run_id)
    return fp32


def fresh_classifier(config: Config, dataset: Dataset) -> Classifier:
    """The classifier before its first step: the same bits from the same seed."""
    torch.manual_seed(config.seed)
    return build_classifier(ModelSpec(config.model, dataset.classes, config.data.image_size), dataset.train.images)


def _register_trained(
    config: Config, host: Host, dataset: Dataset, model: Classifier, trained: TrainResult, run_id: str
) -> Fp32:
    logits, accuracy = evaluate_splits(model, dataset, "fp32")
    tags = {"train_run_id": run_id, "weights_uri": _log_weights(model, run_id)} | lineage(dataset, host, accuracy)
    name = f"{config.model}-{dataset.name}-fp32"
    version = registry.register("fp32", model, name, model.spec, verification_images(dataset), tags)
    facts = _data_facts(dataset, config)
    evidence = Fp32Evidence(config.model, config.seed, version.uri, version.size_bytes, facts, trained, accuracy)
    tracking.log_result("fp32", evidence)
    top1 = accuracy["test"].top1_percent
    tracking.set_note(
        f"{config.model} on {dataset.name}: test top-1 **{top1:.2f} %** with the weights of epoch "
        f"{trained.best_epoch}; registered as `{version.uri}`."
    )
    # Last: what a killed run has logged before is logged again when it goes on.
    tracking.log_metrics(metrics.of_model(accuracy, version.size_bytes, _parameters(model)), owner=version.owner)
    return Fp32(model, version, evidence, logits)


def check_output_dir(config: Config) -> None:
    """Make `output_dir`, if it is set; InputError if that cannot be done."""
    if config.output_dir is None:
        return
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {config.output_dir}: must be a folder that can be written ({error})") from None


def report_stage(config: Config, host: Host, evidence: Evidence, parent_run_id: str | None = None) -> str:
    """Write the report, log it with its pictures (to the parent's run too), copy it to `output_dir`; the page's URI."""
    with tracking.start_run("report", f"Report on `{evidence.int8.version_uri}`: see the artifacts.") as run_id:
        tracking.log_setup(config, host)
        with tempfile.TemporaryDirectory() as folder:
            write_report(evidence, Path(folder))
            for owner in filter(None, (run_id, parent_run_id)):
                tracking.log_folder(Path(folder), "report", owner)
            if config.output_dir:
                shutil.copytree(folder, config.output_dir, dirs_exist_ok=True)
    return f"runs:/{run_id}/report/report.html"


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
        "test_top1_correct": round(test.top1_percent * test.images / 100),
        "test_top3_correct": round(test.top3_percent * test.images / 100),
        "test_top1_percent": f"{test.top1_percent:.3f}",
        "test_top3_percent": f"{test.top3_percent:.3f}",
    }


def verification_images(dataset: Dataset) -> Tensor:
    count = min(VERIFY_IMAGES, len(dataset.train))
    return dataset.train.images[stratified_sample(dataset.train.labels, count, seed=0)]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _data_facts(dataset: Dataset, config: Config) -> DataFacts:
    counts = [len(getattr(dataset, split)) for split in SPLITS]
    return DataFacts(dataset.name, dataset.source, dataset.digest, dataset.classes, config.data.image_size, *counts)
