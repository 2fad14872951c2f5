"""The stages between a trained model and its int8 versions: layer sensitivity, then quantization, an engine a run."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from qexp.config import Config
from qexp.data.datasets import Dataset, Split, calibration_count, calibration_subset, stratified_sample
from qexp.measurement.accuracy import Comparison, compare, predict_logits, to_float
from qexp.measurement.cost import Cost, layer_table, measure_cost
from qexp.measurement.host import Host
from qexp.measurement.latency import AGAIN, Run, measure_latency
from qexp.pipeline.stages import LAYER_TABLE, SPLITS, Fp32, evaluate_splits, lineage, verification_images
from qexp.progress import say
from qexp.quantization import QuantizedModel, quantize_model
from qexp.quantization.budget import BudgetResult, quantize_within_budget
from qexp.quantization.cleanup import clean, folded_layers
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult, measure_sensitivity, most_sensitive_first
from qexp.report.results import BudgetCost, Int8Evidence
from qexp.tracking import metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.registry import Registered

SATURATION = "sums of two products of whole ranges do not fit into 16 bits"
BUDGET_IMAGES = 256  # validation images that order the layers, where the options ask for none


@dataclass(frozen=True)
class Int8:
    """A quantized model's registered version and what was found out about it."""

    version: Registered
    evidence: Int8Evidence


def sensitivity_stage(config: Config, host: Host, dataset: Dataset, fp32: Fp32) -> SensitivityResult | None:
    """What each layer costs in int8, on validation images; None where nobody asks for it."""
    options = config.quantize
    wanted = options.sensitivity_images or (BUDGET_IMAGES if options.max_top1_drop is not None else 0)
    if not wanted:
        return None
    calibration, _ = _calibration(config, dataset)
    with tracking.start_run(f"sensitivity-{config.model}", f"Layer by layer: `{fp32.version.uri}` in int8."):
        tracking.log_setup(config, host)
        held_out = dataset.validation
        chosen = stratified_sample(held_out.labels, min(wanted, len(held_out)), config.seed)
        split = held_out.subset(chosen)
        source = clean(fp32.model, to_float(calibration.images[:2]), options.fold_pool)
        result = measure_sensitivity(
            source, calibration.images, split.images, split.labels, options, not host.has_int8_dot_product
        )
        tracking.log_table(metrics.columns([asdict(layer) for layer in result.layers]), "sensitivity")
        tracking.log_result("sensitivity", result)
    return result


def quantize_stage(
    config: Config, host: Host, dataset: Dataset, fp32: Fp32, sensitivity: SensitivityResult | None = None
) -> Int8:
    """Quantize with the one engine of `config`, compare both models on the same images, log and register."""
    (engine,) = config.quantize.engine
    subset, digest = _calibration(config, dataset)
    with tracking.start_run(f"quantize-{engine}-{len(subset)}", f"Quantization of `{fp32.version.uri}`.") as run_id:
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, SPLITS)
        tracking.log_dataset(subset, dataset, "calibration", digest)
        warn_of_reduced_range(host)
        quantized, budget = _quantize(config, host, dataset, fp32, subset, sensitivity)
        if layers := quantized.result.saturating_layers:
            say(f"{_reason_of(quantized.result)}: {SATURATION}, so the weights of {len(layers)} layers have 7 bits")
        logits, accuracy = evaluate_splits(quantized.module, dataset, f"int8 {engine}")
        comparison = {
            split: compare(fp32.logits[split], logits[split], getattr(dataset, split).labels) for split in SPLITS
        }
        tags = {"quantize_run_id": run_id, "fp32_uri": fp32.version.uri, "train_run_id": fp32.version.run_id}
        tags |= _facts(fp32, quantized, digest) | lineage(dataset, host, accuracy)
        tags |= _drop_tags(comparison["test"])
        name = fp32.version.name.removesuffix("-fp32") + "-int8"
        sample = verification_images(dataset)
        version = registry.register(
            "int8", quantized.module, name, fp32.model.spec, sample, tags, stored=quantized.stored
        )
        fp32_cost, cost = _costs(config, fp32, quantized)
        evidence = Int8Evidence(
            version_uri=version.uri,
            size_bytes=version.size_bytes,
            contents=version.contents,
            quantize=quantized.result,
            calibration_digest=digest,
            fp32_cost=fp32_cost,
            cost=cost,
            accuracy=accuracy,
            comparison=comparison,
            sensitivity=sensitivity,
            budget=budget,
            budget_cost=_budget_cost(config, host, fp32, subset, quantized) if budget else None,
        )
        _log_int8(fp32, version, evidence)
        tracking.log_text(layer_table(quantized.source, fp32.model.spec.image_size), LAYER_TABLE)
    return Int8(version, evidence)


def warn_of_reduced_range(host: Host) -> None:
    """Say so where the CPU's int8 products would saturate."""
    if not host.has_int8_dot_product:
        say(f"warning: {host.cpu} has no int8 dot product: {SATURATION}, so all weights have 7 bits")


def _reason_of(result: QuantizeResult) -> str:
    """Why weights have 7 bits; on a CPU that asks for it anyway, an engine has no reason of its own."""
    if not (layers := result.saturating_layers):
        return "no int8 dot product"
    return f"torch's x86 kernels for depthwise convolutions ({layers[0]} and {len(layers) - 1} more)"


def _calibration(config: Config, dataset: Dataset) -> tuple[Split, str]:
    return calibration_subset(dataset.train, calibration_count(config.quantize, dataset.train), config.seed)


def _quantize(
    config: Config, host: Host, dataset: Dataset, fp32: Fp32, subset: Split, sensitivity: SensitivityResult | None
) -> tuple[QuantizedModel, BudgetResult | None]:
    options, reduce_range = config.quantize, not host.has_int8_dot_product
    if options.max_top1_drop is None or sensitivity is None:
        return quantize_model(fp32.model, subset.images, options, reduce_range), None
    held_out = dataset.validation

    def compared(quantized: QuantizedModel) -> Comparison:
        logits = predict_logits(quantized.module, held_out.images, label="int8 on validation images")
        return compare(fp32.logits["validation"], logits, held_out.labels)

    order = most_sensitive_first(sensitivity)
    return quantize_within_budget(fp32.model, subset.images, options, reduce_range, order, compared)


def _costs(config: Config, fp32: Fp32, quantized: QuantizedModel) -> tuple[Cost, Cost]:
    """Of the fp32 model, and of the int8 model: they differ where a pool was folded away."""
    sizes, image_size, layers = config.latency.batch_sizes, fp32.model.spec.image_size, quantized.result.int8_layers
    fp32_cost = measure_cost(fp32.model, image_size, sizes, layers)
    if not config.quantize.fold_pool:
        return fp32_cost, fp32_cost
    if not folded_layers(fp32.model, quantized.source):
        say(f"fold_pool: {config.model} has no pool that only repeats a 1x1 map before a linear layer; nothing folded")
        return fp32_cost, fp32_cost
    return fp32_cost, measure_cost(quantized.source, image_size, sizes, layers)


def _budget_cost(config: Config, host: Host, fp32: Fp32, subset: Split, quantized: QuantizedModel) -> BudgetCost | None:
    """Against the same model without the layers that went back, timed in turns in this process."""
    if not set(quantized.result.kept_layers) - set(config.quantize.keep_fp32 or ()):
        return None
    all_int8 = quantize_model(fp32.model, subset.images, config.quantize, not host.has_int8_dot_product)
    size = fp32.model.spec.image_size

    def prepare(batch_size: int) -> dict[str, Run]:
        images = torch.rand(batch_size, 3, size, size)
        kept, all_of_it, again = quantized.reloaded(), all_int8.reloaded(), all_int8.reloaded()
        return {"kept": lambda: kept(images), "all": lambda: all_of_it(images), AGAIN: lambda: again(images)}

    with torch.no_grad():
        rows = measure_latency(prepare, "kept", "all", config.latency)
    slowdown = {row.batch_size: row.ratio("kept", "all") for row in rows}
    told_apart = tuple(row.batch_size for row in rows if row.compared("kept", "all"))
    return BudgetCost(all_int8.saved_bytes(), quantized.saved_bytes(), slowdown, told_apart)


def _facts(fp32: Fp32, quantized: QuantizedModel, digest: str) -> dict[str, Any]:
    """Tags that say how an int8 version was made."""
    result = quantized.result
    facts = quantized.tags() | {"calibration_digest": digest}
    facts |= {"fold_pool": bool(folded_layers(fp32.model, quantized.source))}
    if result.reduce_range or result.saturating_layers:
        facts["reduce_range_reason"] = f"{_reason_of(result)}: {SATURATION}"
    return facts


def _drop_tags(found: Comparison) -> dict[str, str]:
    names = ("top1_drop_points", "top1_drop_low_points", "top1_drop_high_points")
    return {name: f"{getattr(found, name):.3f}" for name in names}


def _log_int8(fp32: Fp32, version: Registered, evidence: Int8Evidence) -> None:
    accuracy, test, cost = evidence.accuracy, evidence.comparison["test"], evidence.cost
    values = metrics.of_model(accuracy, version.size_bytes, cost.parameters)
    tracking.log_metrics(values | metrics.of_comparison(test, cost.int8_percent), owner=version.owner)
    for owner, counted in ((fp32.version.owner, evidence.fp32_cost), (version.owner, cost)):
        for batch_size, count in counted.macs.items():
            tracking.log_metrics({"model/macs": count}, step=batch_size, owner=owner)
    tracking.log_table(metrics.accuracy_table({"fp32": fp32.evidence.accuracy, "int8": accuracy}), "accuracy")
    tracking.log_result("int8", evidence)
    tracking.set_note(
        f"`{fp32.version.uri}` as int8: test top-1 **{accuracy['test'].top1_percent:.2f} %**, drop "
        f"{test.top1_drop_points:.2f} points; registered as `{version.uri}`."
    )
