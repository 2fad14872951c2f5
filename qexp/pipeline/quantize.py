"""Quantization: what each layer costs in int8, then an int8 model with one engine, measured beside its fp32 model.

Plain functions: a configuration, a data set and an fp32 model go in, results come out. The engines are in
`qexp/quantization/`.
"""

from typing import Any

import torch
from torch import Tensor

from qexp.config import Config
from qexp.data.datasets import Dataset, Split, calibration_count, calibration_subset, stratified_sample
from qexp.errors import StageError, first_line
from qexp.foundation.extras import has_openvino
from qexp.measurement.accuracy import Comparison, compare, predict_logits, to_float
from qexp.measurement.cost import Cost, layer_table, measure_cost
from qexp.measurement.host import Host
from qexp.measurement.latency import AGAIN, Run, measure_latency
from qexp.models.folding import folded
from qexp.models.names import BY_OPENVINO, ONNXRUNTIME, OPENVINO, OPENVINO_BF16, RUNTIME_NAMES
from qexp.models.taken import is_onnx
from qexp.pipeline.measure import predict_splits
from qexp.pipeline.train import accuracy_of, lineage, verification_images
from qexp.progress import say
from qexp.quantization import QuantizedModel, keepable_layers, quantize_model
from qexp.quantization.budget import BudgetResult, quantize_within_budget
from qexp.quantization.cleanup import clean
from qexp.quantization.equivalence import check_kernels
from qexp.quantization.rebuild import calls_functions, with_layers
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult, measure_sensitivity, most_sensitive_first
from qexp.report.results import BudgetCost, InRuntime, Int8Evidence
from qexp.tracking.metrics import tags_of_drop
from qexp.tracking.results import Fp32, NewModel

SATURATION = "sums of two products of whole ranges do not fit into 16 bits"
RECORDED_IMAGES = 32  # test images that are kept with their logits
BUDGET_IMAGES = 256  # validation images that order the layers, where the options ask for none


def sensitivity_images(config: Config) -> int:
    """How many validation images each layer is tried with; 0 where nobody asks what it costs."""
    options = config.quantize
    return options.sensitivity_images or (BUDGET_IMAGES if options.max_top1_drop is not None else 0)


def find_sensitivity(config: Config, host: Host, dataset: Dataset, fp32: Fp32) -> SensitivityResult:
    """What each layer costs in int8, on validation images."""
    options, held_out = config.quantize, dataset.validation
    subset, _ = calibration(config, dataset)
    chosen = stratified_sample(held_out.labels, min(sensitivity_images(config), len(held_out)), config.seed)
    split = held_out.subset(chosen)
    example = to_float(subset.pixels()[:2])
    fold = bool(options.fold_pool)
    source = clean(fp32.model, example, fold)
    if calls_functions(source, example):
        source = with_layers(source, example, fold) or source
    reduce_range = not host.has_int8_dot_product
    return measure_sensitivity(source, subset.pixels(), split.pixels(), split.labels, options, reduce_range)


def foldings(config: Config, fp32: Fp32) -> tuple[bool, ...]:
    """Whether a pool is folded away, of each version that every engine makes: as asked for, or without and, where there
    is such a pool, with it."""
    fold = config.quantize.fold_pool
    if fold is not None:
        return (fold,)
    if is_onnx(fp32.model):
        return (False,)
    example = torch.rand(2, *fp32.model.spec.shape, generator=torch.Generator().manual_seed(0))
    return (False, True) if folded(fp32.model, example) is not None else (False,)


def layer_order(model: Any, sensitivity: SensitivityResult) -> tuple[str, ...]:
    """The layers of `model` in the order in which they go back to fp32."""
    order, able = most_sensitive_first(sensitivity), set(keepable_layers(model))
    if functions := [name for name in order if name not in able]:
        say(f"{', '.join(functions)}: functions in `forward` and no modules, which cannot be kept in fp32")
    return tuple(name for name in order if name in able)


def quantize(
    config: Config,
    host: Host,
    dataset: Dataset,
    fp32: Fp32,
    sensitivity: SensitivityResult | None = None,
    must_fold: bool = False,
) -> NewModel:
    """Quantize with the one engine of `config`, and compare both models on the same images.

    Raises:
        StageError: the engine cannot quantize the model, or with `must_fold` no pool is folded away.
    """
    subset, digest = calibration(config, dataset)
    warn_of_reduced_range(host)
    quantized, budget = _quantize(config, host, dataset, fp32, subset, sensitivity)
    label = quantized.result.label
    if config.quantize.fold_pool and not quantized.result.folded:
        none = f"{config.model} has no pool that only enlarges its map before a linear layer"
        if must_fold:
            raise StageError(f"engine {label}: {none}")
        say(f"fold_pool: {none}; nothing folded")
    if layers := quantized.result.saturating_layers:
        say(f"{_reason_of(quantized.result)}: {SATURATION}, so the weights of {len(layers)} layers have 7 bits")
    logits = predict_splits(quantized, dataset, f"int8 {label}", tuple(fp32.logits))
    accuracy, comparison = accuracy_of(logits, dataset), _compared(fp32.logits, logits, dataset)
    others = other_runtimes(config, host, quantized)
    found = {name: _in_runtime(name, quantized, subset, dataset, fp32.logits, logits) for name in others}
    fp32_cost = _cost_of_fp32(config, fp32, quantized)
    evidence = Int8Evidence(
        version_uri="",
        size_bytes=0,
        quantize=quantized.result,
        calibration_digest=digest,
        fp32_cost=fp32_cost,
        cost=_cost_of_int8(config, fp32, quantized) if quantized.result.folded else fp32_cost,
        accuracy=accuracy,
        comparison=comparison,
        sensitivity=sensitivity,
        budget=budget,
        budget_cost=_budget_cost(config, host, fp32, subset, quantized) if budget else None,
        runtime=ONNXRUNTIME if quantized.flavor == "onnx" else None,
        runtimes={name: one for name, one in found.items() if isinstance(one, InRuntime)},
        runtimes_left_out={name: why for name, why in found.items() if isinstance(why, str)},
    )
    tags = {"fp32_uri": fp32.version.uri, "train_run_id": fp32.version.run_id} | _facts(quantized, digest)
    tags |= lineage(dataset, host, accuracy) | tags_of_drop(comparison["test"])
    sample, spec = verification_images(dataset), fp32.model.spec
    with torch.no_grad():
        expected = quantized.module(to_float(sample))
    table, recorded = layer_table(quantized.source, spec.shape), _recorded(quantized, dataset)
    return NewModel(evidence, quantized.stored, spec, sample, expected, logits, tags, table, recorded)


def _recorded(quantized: QuantizedModel, dataset: Dataset) -> dict[str, Tensor]:
    """Some test images and the logits for them, with which other machines compare theirs."""
    test = dataset.test
    images = test.images[stratified_sample(test.labels, min(RECORDED_IMAGES, len(test)), seed=0)]
    with torch.no_grad():
        return {"images": images, "logits": quantized.module(to_float(images))}


def _compared(fp32: dict[str, Tensor], int8: dict[str, Tensor], dataset: Dataset) -> dict[str, Comparison]:
    return {split: compare(fp32[split], int8[split], getattr(dataset, split).labels) for split in int8}


def other_runtimes(config: Config, host: Host, quantized: QuantizedModel) -> tuple[str, ...]:
    """The runtimes beside ONNX Runtime in which an ONNX file is evaluated: the one that was asked for, or OpenVINO. It
    computes what is not int8 in bf16, too, where the CPU has that and there is such work."""
    asked = config.quantize.backend
    if quantized.flavor != "onnx" or not has_openvino():
        return ()
    if asked is not None:
        return (asked,) if asked in BY_OPENVINO else ()
    return BY_OPENVINO if host.has_bf16 and quantized.computes_in_float else (OPENVINO,)


def _in_runtime(
    name: str,
    quantized: QuantizedModel,
    subset: Split,
    dataset: Dataset,
    fp32_logits: dict[str, Tensor],
    logits: dict[str, Tensor],
) -> InRuntime | str:
    """The figures of an ONNX file in OpenVINO, or why there are none.

    It must compute what ONNX Runtime computes, whose logits are given, but for rounding, and its accuracy must not be
    shown to be lower: then it may be chosen for its speed.
    """
    label = f"onnx in {RUNTIME_NAMES[name]}"
    try:
        other = quantized.in_openvino(bf16=name == OPENVINO_BF16)
        check_kernels(label, other.module, quantized.module, quantized.source, subset.pixels())
        found = predict_splits(other, dataset, f"int8 {label}", tuple(logits))
    except Exception as error:  # of OpenVINO's compiler too: it is left out, and ONNX Runtime is there
        return first_line(error).removesuffix("; use another --engine")
    lost = compare(logits["test"], found["test"], dataset.test.labels)
    if lost.top1_drop_low_points > 0:
        return f"its top-1 is {lost.top1_drop_points:.2f} points below that in ONNX Runtime"
    return InRuntime(accuracy_of(found, dataset), _compared(fp32_logits, found, dataset))


def warn_of_reduced_range(host: Host) -> None:
    """Say so where the CPU's int8 products would saturate."""
    if not host.has_int8_dot_product:
        say(f"warning: {host.cpu} has no int8 dot product: {SATURATION}, so all weights have 7 bits")


def calibration(config: Config, dataset: Dataset) -> tuple[Split, str]:
    """The images that set the ranges, and the digest of which they are."""
    images = dataset.calibration_images
    return calibration_subset(images, calibration_count(config.quantize, images), config.seed)


def _reason_of(result: QuantizeResult) -> str:
    """Why weights have 7 bits; on a CPU that asks for it anyway, an engine has no reason of its own."""
    if not (layers := result.saturating_layers):
        return "no int8 dot product"
    return f"torch's x86 kernels for depthwise convolutions ({layers[0]} and {len(layers) - 1} more)"


def _quantize(
    config: Config, host: Host, dataset: Dataset, fp32: Fp32, subset: Split, sensitivity: SensitivityResult | None
) -> tuple[QuantizedModel, BudgetResult | None]:
    options, reduce_range = config.quantize, not host.has_int8_dot_product
    if options.max_top1_drop is None or sensitivity is None:
        return quantize_model(fp32.model, subset.pixels(), options, reduce_range), None
    held_out = dataset.validation

    def compared(quantized: QuantizedModel) -> Comparison:
        logits = predict_logits(quantized.module, held_out.images, label="int8 on validation images")
        return compare(fp32.logits["validation"], logits, held_out.labels)

    order = layer_order(fp32.model, sensitivity)
    return quantize_within_budget(fp32.model, subset.pixels(), options, reduce_range, order, compared)


def _cost_of_fp32(config: Config, fp32: Fp32, quantized: QuantizedModel) -> Cost:
    sizes, layers = config.latency.batch_sizes, quantized.result.int8_layers
    return measure_cost(fp32.model, fp32.model.spec.shape, sizes, layers)


def _cost_of_int8(config: Config, fp32: Fp32, quantized: QuantizedModel) -> Cost:
    """Where it is not that of the fp32 model, as a pool was folded away."""
    sizes, layers = config.latency.batch_sizes, quantized.result.int8_layers
    return measure_cost(quantized.source, fp32.model.spec.shape, sizes, layers)


def _budget_cost(config: Config, host: Host, fp32: Fp32, subset: Split, quantized: QuantizedModel) -> BudgetCost | None:
    """Against the same model without the layers that went back, timed in turns in this process."""
    if not set(quantized.result.kept_layers) - set(config.quantize.keep_fp32 or ()):
        return None
    all_int8 = quantize_model(fp32.model, subset.pixels(), config.quantize, not host.has_int8_dot_product)
    shape = fp32.model.spec.shape

    def prepare(batch_size: int) -> dict[str, Run]:
        images = torch.rand(batch_size, *shape)
        kept, all_of_it, again = quantized.reloaded(), all_int8.reloaded(), all_int8.reloaded()
        return {"kept": lambda: kept(images), "all": lambda: all_of_it(images), AGAIN: lambda: again(images)}

    with torch.no_grad():
        rows = measure_latency(prepare, "kept", "all", config.latency)
    slowdown = {row.batch_size: row.ratio("kept", "all") for row in rows}
    told_apart = tuple(row.batch_size for row in rows if row.compared("kept", "all"))
    return BudgetCost(all_int8.size_bytes, quantized.size_bytes, slowdown, told_apart)


def _facts(quantized: QuantizedModel, digest: str) -> dict[str, Any]:
    """Tags that say how an int8 version was made."""
    result = quantized.result
    facts = quantized.tags() | {"calibration_digest": digest}
    if result.reduce_range or result.saturating_layers:
        facts["reduce_range_reason"] = f"{_reason_of(result)}: {SATURATION}"
    return facts
