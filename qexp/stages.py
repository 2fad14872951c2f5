"""Each stage in a run of its own: compute, log, register. pipeline.py says in which order they go."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp import metrics, registry, tracking
from qexp.checkpoint import checkpoint_folder, lock_of, remove_checkpoints
from qexp.config import Config
from qexp.cost import measure_cost
from qexp.data import Dataset, calibration_count, calibration_subset, stratified_sample
from qexp.errors import InputError
from qexp.evaluation import Accuracy, compare, measure_accuracy, predict_logits
from qexp.evidence import DataFacts, Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence
from qexp.gate import GateResult, decide_gate
from qexp.host import Host
from qexp.models import Classifier, ModelSpec, build_classifier, save_classifier
from qexp.quantization import quantize_model
from qexp.registry import Registered
from qexp.report import write_report
from qexp.sweep import SweepRequest, run_sweep
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


@dataclass(frozen=True)
class Int8:
    """A quantized model's registered version and what was found out about it."""

    version: Registered
    evidence: Int8Evidence


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
    tags = {"train_run_id": run_id, "weights_uri": _log_weights(model, run_id)} | _lineage(dataset, host, accuracy)
    name = f"{config.model}-{dataset.name}-fp32"
    version = registry.register("fp32", model, name, model.spec, _verification_images(dataset), tags)
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


def quantize_stage(config: Config, host: Host, dataset: Dataset, fp32: Fp32) -> Int8:
    """Quantize, compare both models on the same images, log and register the int8 model."""
    options = config.quantize
    count = calibration_count(options, dataset.train)
    subset, digest = calibration_subset(dataset.train, count, config.seed)
    name = f"quantize-{options.engine}-{count}"
    with tracking.start_run(name, f"Quantization of `{fp32.version.uri}`.") as run_id:
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, SPLITS)
        tracking.log_dataset(subset, dataset, "calibration", digest)
        quantized = quantize_model(fp32.model, subset.images, options, reduce_range=not host.has_int8_dot_product)
        logits, accuracy = evaluate_splits(quantized.module, dataset, "int8")
        tags: dict[str, Any] = {
            "quantize_run_id": run_id,
            "fp32_uri": fp32.version.uri,
            "train_run_id": fp32.version.run_id,
        }
        tags |= {"engine": options.engine, "observer": options.observer}
        if quantized.result.load_backend:
            tags["backend"] = quantized.result.load_backend
        tags |= {"per_channel": options.per_channel, "calibration_samples": len(subset), "calibration_digest": digest}
        tags |= _lineage(dataset, host, accuracy)
        model_name = fp32.version.name.removesuffix("-fp32") + "-int8"
        sample = _verification_images(dataset)
        version = registry.register("int8", quantized.module, model_name, fp32.model.spec, sample, tags)
        cost = measure_cost(
            fp32.model, fp32.model.spec.image_size, config.latency.batch_sizes, quantized.result.int8_layers
        )
        comparison = {
            split: compare(fp32.logits[split], logits[split], getattr(dataset, split).labels) for split in SPLITS
        }
        evidence = Int8Evidence(version.uri, version.size_bytes, quantized.result, digest, cost, accuracy, comparison)
        _log_int8(fp32, version, evidence)
    return Int8(version, evidence)


def _log_int8(fp32: Fp32, version: Registered, evidence: Int8Evidence) -> None:
    accuracy, test, cost = evidence.accuracy, evidence.comparison["test"], evidence.cost
    values = metrics.of_model(accuracy, version.size_bytes, cost.parameters)
    tracking.log_metrics(values | metrics.of_comparison(test, cost.int8_percent), owner=version.owner)
    for owner in (fp32.version.owner, version.owner):
        for batch_size, count in cost.macs.items():
            tracking.log_metrics({"model/macs": count}, step=batch_size, owner=owner)
    tracking.log_table(metrics.accuracy_table({"fp32": fp32.evidence.accuracy, "int8": accuracy}), "accuracy")
    tracking.log_result("int8", evidence)
    tracking.set_note(
        f"`{fp32.version.uri}` as int8: test top-1 **{accuracy['test'].top1_percent:.2f} %**, drop "
        f"{test.top1_drop_points:.2f} points; registered as `{version.uri}`."
    )


def latency_stage(config: Config, host: Host, fp32: Registered, int8: Registered) -> LatencyEvidence:
    """Time both registered versions in a process of its own, and log it to the run, to both models and as a tag."""
    with tracking.start_run(f"latency-{config.model}", f"Latency of `{fp32.uri}` and `{int8.uri}`.") as run_id:
        tracking.log_setup(config, host)
        request = SweepRequest(fp32.uri, int8.uri, config.data.image_size, host.threads, config.latency)
        result = run_sweep(request, registry.child_environment(host.threads))
        evidence = LatencyEvidence(fp32.uri, int8.uri, result, host, run_id)
        owners = {"fp32": fp32.owner, "int8": int8.owner, "both": None}
        for whose, step, values in metrics.of_latency(result):
            tracking.log_metrics(values, step, owners[whose])
        tracking.log_table(metrics.latency_table(result.rows), "latency")
        tracking.log_result("latency", evidence)
        registry.tag_version(int8.uri, {"latency_run_id": run_id, "smallest_speedup": f"{result.smallest_speedup:.3f}"})
        tracking.set_note(f"Smallest speed-up of `{int8.uri}` over `{fp32.uri}`: **{result.smallest_speedup:.2f}x**.")
    return evidence


def gate_stage(config: Config, fp32: Fp32, int8: Int8, latency: LatencyEvidence) -> Evidence:
    """Hold the int8 version against the gate and tag it with the decision; the pipeline acts on it."""
    verified = fp32.version.verified and int8.version.verified
    gate = decide(config, fp32.evidence, int8.evidence, latency, verified)
    registry.tag_version(int8.version.uri, {"gate": "passed" if gate.passed else "failed", "gate_reason": gate.summary})
    return Evidence(fp32.evidence, int8.evidence, latency.latency, latency.host, gate, champion=gate.passed)


def check_output_dir(config: Config) -> None:
    """Make `output_dir`, if it is set; InputError if that cannot be done."""
    if config.output_dir is None:
        return
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {config.output_dir}: must be a folder that can be written ({error})") from None


def decide(
    config: Config, fp32: Fp32Evidence, int8: Int8Evidence, latency: LatencyEvidence, verified: bool
) -> GateResult:
    drop = int8.comparison["test"].top1_drop_points
    ratio = fp32.size_bytes / int8.size_bytes
    return decide_gate(config.gate, drop, ratio, latency.latency.smallest_speedup, verified)


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
    model: nn.Module, dataset: Dataset, label: str, splits: tuple[str, ...] = SPLITS
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


def _lineage(dataset: Dataset, host: Host, accuracy: dict[str, Accuracy]) -> dict[str, Any]:
    """Tags that every version carries: data, machine, accuracy on the test images."""
    return {
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "cpu": host.cpu,
        "cpu_features": ",".join(host.features),
        "test_top1_percent": f"{accuracy['test'].top1_percent:.3f}",
        "test_top3_percent": f"{accuracy['test'].top3_percent:.3f}",
    }


def _verification_images(dataset: Dataset) -> Tensor:
    count = min(VERIFY_IMAGES, len(dataset.train))
    return dataset.train.images[stratified_sample(dataset.train.labels, count, seed=0)]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _data_facts(dataset: Dataset, config: Config) -> DataFacts:
    counts = [len(getattr(dataset, split)) for split in SPLITS]
    return DataFacts(dataset.name, dataset.source, dataset.digest, dataset.classes, config.data.image_size, *counts)
