"""FX graph mode quantization, then TorchScript traced and frozen, so that the int8 model loads without qexp.

Method: https://docs.pytorch.org/docs/2.13/quantization.html (post-training static, FX graph mode).
"""

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    get_default_qconfig_mapping,
    observer,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from qexp.config import QuantizeConfig
from qexp.errors import StageError, first_line, with_place
from qexp.evaluation import to_float
from qexp.quantization.attention import normalizes_tokens
from qexp.quantization.cleanup import OTHER_FUNCTION
from qexp.quantization.equivalence import same_logits
from qexp.quantization.kept import between_kept
from qexp.quantization.observers import observer_class
from qexp.quantization.result import EngineResult

KERNELS = ("x86", "onednn")  # what a process uses that sets none, then the other
MOST_GROUPS = 100  # of a convolution that torch's x86 leaves to oneDNN (should_use_onednn_quant in aten)
PRODUCTS = (  # functions, and methods by name
    F.linear, F.conv2d, F.conv_transpose2d, F.bilinear, torch.matmul, operator.matmul, torch.mm, torch.mv, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot, "matmul", "mm", "mv", "bmm", "addmm", "baddbmm",
)  # fmt: skip
CALLS: dict[str, Callable[[Any, dict[str, nn.Module]], Callable[..., Tensor]]] = {  # what a node of a graph calls
    "call_function": lambda function, modules: function,
    "call_method": lambda name, modules: lambda values, *more, **options: getattr(values, name)(*more, **options),
    "call_module": lambda name, modules: modules[name],
}
# Where layer norm is, sums run through all layers and take the rounding of each: fp32 costs little there.
TOKEN_ARITHMETIC = (nn.LayerNorm, F.layer_norm, operator.add, operator.iadd, torch.add, operator.mul, torch.mul)


class Float(nn.Module):
    """An operation that torch.ao does not know, and leaves in fp32 for that."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.operation(*arguments, **options)


def quantize(model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> EngineResult:
    """See `qexp.quantization.quantize_model`; `model` may be changed."""
    if isinstance(model, fx.GraphModule) and options.keep_fp32:
        _keep_between(model, to_float(images[:2]), options.keep_fp32)
    backend, saturating = options.backend or KERNELS[0], _saturating_layers(model, options)
    with _kernels(backend), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao.quantization and torch.jit announce their successors on every call
        reference, converted = _calibrate_and_convert(model, images, options, reduce_range or bool(saturating))
        module = _trace(converted, to_float(images[:2]))
    int8, floats = _int8_layers(converted), _float_products(converted)
    return EngineResult(
        module, reference, module, "pytorch", backend, int8, floats, backend, () if reduce_range else saturating
    )


def _saturating_layers(model: nn.Module, options: QuantizeConfig) -> tuple[str, ...]:
    """Convolutions whose kernels of a plain load, FBGEMM's, sum pairs of products in 16 bits on any CPU."""
    kept = options.keep_fp32 or ()
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return tuple(name for name, module in convolutions if module.groups > MOST_GROUPS and name not in kept)


def _keep_between(model: fx.GraphModule, example: Tensor, kept: Sequence[str]) -> None:
    """Hide what lies between kept layers alone from torch.ao."""
    ShapeProp(model).propagate(example)
    modules = dict(model.named_modules())

    def is_kept(node: fx.Node) -> bool | None:
        layer = node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d | nn.Linear)
        return str(node.target) in kept if layer else None

    for node in between_kept((node, node.all_input_nodes, is_kept(node)) for node in model.graph.nodes):
        if isinstance(node.meta.get("tensor_meta"), TensorMetadata) and node.op in CALLS:  # not a size, not a tuple
            model.add_submodule(f"{node.name}_fp32", Float(CALLS[node.op](node.target, modules)))
            node.op, node.target = "call_module", f"{node.name}_fp32"
    model.recompile()


def _calibrate_and_convert(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The quantized program with fp32 operations between quantize and dequantize, and with int8 operations."""
    try:
        mapping = _qconfig_mapping(options, reduce_range)
        if normalizes_tokens(model):
            for operation in TOKEN_ARITHMETIC:
                mapping.set_object_type(operation, None)
        whole = PrepareCustomConfig().set_non_traceable_module_classes([Float])
        batches = images.split(options.calibration_batch_size)
        expected = model.eval()(to_float(batches[0]))
        prepared = prepare_fx(model, mapping, (to_float(images[:2]),), whole)
        logits = [prepared(to_float(batch)) for batch in batches]
        if not same_logits(expected, logits[0]):
            raise ValueError(OTHER_FUNCTION)
        shared: dict[int, Any] = {id(weight): weight for weight in prepared.parameters()}
        return convert_to_reference_fx(copy.deepcopy(prepared, shared)), convert_fx(prepared)
    except Exception as error:  # tracing raises whatever the model's Python code does when it meets a symbol
        raise StageError(f"engine fx cannot quantize this model: {with_place(error)}") from error


def _trace(converted: fx.GraphModule, example: Tensor) -> torch.jit.ScriptModule:
    try:
        return torch.jit.freeze(torch.jit.trace(converted, example, check_trace=False).eval())
    except Exception as error:  # an operation for which there is no int8 kernel
        raise StageError(f"engine fx quantized this model, but it does not run: {first_line(error)}") from error


@contextmanager
def _kernels(backend: str) -> Iterator[None]:
    """Pack weights for `backend` inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _qconfig_mapping(options: QuantizeConfig, reduce_range: bool) -> QConfigMapping:
    """Torch's default mapping (operations with fixed ranges included) with our observers in place of its own."""
    weight_observer: Any = PerChannelMinMaxObserver if options.per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if options.per_channel else torch.per_tensor_symmetric
    qconfig = QConfig(
        activation=observer_class(observer, options).with_args(dtype=torch.quint8, reduce_range=reduce_range),
        weight=weight_observer.with_args(dtype=torch.qint8, qscheme=scheme),
    )
    mapping = get_default_qconfig_mapping(options.backend or KERNELS[0]).set_global(qconfig)
    for pattern, default in list(mapping.object_type_qconfigs.items()):
        if default is not None and not _has_fixed_range(default):
            mapping.set_object_type(pattern, qconfig)
    for name in options.keep_fp32 or ():
        mapping.set_module_name(name, None)
    return mapping.set_module_name("normalize", None)  # one multiplication on three channels; int8 would cost accuracy


def _has_fixed_range(qconfig: QConfig) -> bool:
    return isinstance(qconfig.activation(), torch.ao.quantization.FixedQParamsObserver)


def _int8_layers(converted: fx.GraphModule) -> tuple[str, ...]:
    """Names of the modules that are called and compute in int8.

    A layer that tracing went around, or that kept its reference (fp32) form, is not among them.
    """
    called = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
    modules = dict(converted.named_modules())
    return tuple(name for name in called if isinstance(modules[name], nnq.Conv2d | nnq.Linear))


def _float_products(converted: fx.GraphModule) -> tuple[str, ...]:
    """Names of what multiplies by weights in fp32: modules with a matrix of them, and functions that are given one."""
    modules, names = dict(converted.named_modules()), []
    matrices = {
        name for name, tensor in [*converted.named_parameters(), *converted.named_buffers()] if tensor.dim() > 1
    }
    for node in converted.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module and not isinstance(module, nn.LayerNorm) and any(weight.dim() > 1 for weight in module.parameters()):
            names.append(str(node.target))
        elif node.target in PRODUCTS:
            weights = [source for arg in node.all_input_nodes if (source := _source(arg)).target in matrices]
            names += [str(weight.target).rpartition(".")[0] or str(weight.target) for weight in weights]
    return tuple(names)


def _source(node: fx.Node) -> fx.Node:
    """What a tensor is made of by operations on it alone, such as transposing it."""
    while node.op in ("call_method", "call_function") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node
