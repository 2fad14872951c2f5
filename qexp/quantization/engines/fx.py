"""FX graph mode quantization, then TorchScript traced and frozen, so that the int8 model loads without qexp.

Method: https://docs.pytorch.org/docs/2.13/quantization.html (post-training static, FX graph mode).
"""

import copy
import operator
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.ao.quantization import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    get_default_qconfig_mapping,
    observer,
)
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
    get_native_backend_config,
)
from torch.ao.quantization.fx import utils as fx_utils
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from qexp.config import QuantizeConfig
from qexp.errors import StageError, first_line, with_place
from qexp.measurement.accuracy import to_float
from qexp.progress import track
from qexp.quantization.attention import normalizes_tokens
from qexp.quantization.cleanup import OTHER_FUNCTION
from qexp.quantization.engines.packed import SCALAR_TYPES, Factors, Output, PackedConv, PackedLinear
from qexp.quantization.equivalence import same_logits
from qexp.quantization.fp32_layers import between_kept
from qexp.quantization.observers import below, calibration_batches, observer_class
from qexp.quantization.rebuild import with_layers
from qexp.quantization.result import QuantizedModel, QuantizeResult

KERNELS = ("x86", "onednn")  # what a process uses that sets none, then the other
MOST_GROUPS = 100  # of a convolution that torch's x86 leaves to oneDNN (should_use_onednn_quant in aten)
LAYERS = (nn.Conv2d, nn.Linear)
INT8_MODULES = (nnq.Conv2d, nnq.Linear)  # with the next ones, those that also compute a ReLU
INT8_FUNCTIONS = tuple(
    getattr(torch.ops.quantized, name) for name in ("linear", "linear_relu", "conv2d", "conv2d_relu")
)
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


def quantize(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool, layers: Sequence[str] = ()
) -> QuantizedModel:
    """See `qexp.quantization.quantize_model`; `model` may be changed.

    torch.ao quantizes the layers that torch.fx finds. Where it finds not all, or none, the network is rebuilt from its
    exported program; `source` of the result is what was quantized.

    Args:
        layers: names of layers before the clean-up, which may have dissolved those of the user's own classes.
    """
    made, refused = None, None
    try:
        made = _quantize(model, images, options, reduce_range)
    except StageError as error:
        refused = error
    left = _left(made, options, layers) if made else set(layers)
    rebuilt = with_layers(model, to_float(images[:2]), bool(options.fold_pool)) if refused or left else None
    if rebuilt is not None and (refused or left & _layer_names(rebuilt)):
        try:
            again = _quantize(rebuilt, images, options, reduce_range, _with_padding())
            if refused or len(_left(again, options, layers)) < len(left):
                return again
        except StageError as error:
            refused = refused or error
    if made is None:
        assert refused is not None
        raise refused
    return made


def _left(made: QuantizedModel, options: QuantizeConfig, layers: Sequence[str]) -> set[str]:
    """Layers that were to be int8 and are not, and what else multiplies by weights in fp32."""
    wanted = {*layers, *_layer_names(made.source), *made.float_layers}
    return wanted - {*made.int8_layers, *(options.keep_fp32 or ())}


def _layer_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LAYERS)}


def _with_padding() -> BackendConfig:
    """torch's own, and zeros put around an int8 map as zeros in int8: networks that pad in `forward` do so often."""
    integers = DTypeConfig(torch.quint8, torch.quint8)
    padding = BackendPatternConfig(F.pad).set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT)
    return get_native_backend_config().set_backend_pattern_config(padding.set_dtype_configs([integers]))


def _quantize(
    model: nn.Module,
    images: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
    kernels: BackendConfig | None = None,
) -> QuantizedModel:
    example, limits = to_float(images[:2]), dict[str, float]()
    apart, copies = model, dict[str, str]()
    batches = list(calibration_batches(images, options.calibration_batch_size))
    expected = _logits_before(model, batches[0])
    _refuse_hooks(model, batches[0], expected)
    if isinstance(model, fx.GraphModule):
        model = fx.GraphModule(model, copy.deepcopy(model.graph))  # its operations change, and not those of the caller
        _hide_float_operations(model, example, options.keep_fp32 or ())
        limits = _fuse_limits(model, options.keep_fp32 or ())
        apart, copies = _with_a_module_for_each_call(model)
    backend, saturating = _kernels_of(options), saturating_layers(model, options)
    with _kernels(backend), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao.quantization and torch.jit announce their successors on every call
        mapping = _qconfig_mapping(options, reduce_range, saturating, limits, copies)
        reference, converted = _calibrate_and_convert(apart, batches, mapping, expected, kernels)
        module = _trace(converted, example, limits)
    result = QuantizeResult.with_options(
        options,
        reduce_range,
        len(images),
        backend=backend,
        int8_layers=_int8_layers(converted, copies),
        float_layers=tuple(copies.get(name, name) for name in _float_products(converted)),
        load_backend=backend,
        saturating_layers=() if reduce_range else saturating,
    )
    return QuantizedModel(module, module, "pytorch", model, result, reference)


def _logits_before(model: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            return model.eval()(to_float(images))
    except Exception as error:  # whatever the model's own code raises
        raise StageError(f"engine fx cannot quantize this model: {with_place(error)}") from error


def _refuse_hooks(model: nn.Module, images: Tensor, expected: Tensor) -> None:
    """Raise StageError where forward hooks change the logits: torch.ao's int8 modules take the place of those that have
    them. Hooks that only watch are no matter, nor those that set weights, which are set by now."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    hooked = [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in hooks)]
    if not hooked:
        return
    before = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in hooks]
    try:
        for module, kind, _ in before:
            setattr(module, kind, OrderedDict())
        found = _logits_before(model, images)
    finally:
        for module, kind, its in before:
            setattr(module, kind, its)
    if not same_logits(expected, found):
        names = ", ".join(name or "the model" for name in hooked)
        raise StageError(
            f"engine fx cannot quantize this model: it would drop the forward hooks of {names}, which change the "
            "logits; compute in `forward` what they do, or use engine onnx"
        )


def saturating_layers(model: nn.Module, options: QuantizeConfig) -> tuple[str, ...]:
    """Depthwise convolutions whose default kernels, FBGEMM's, sum pairs of products in 16 bits on any CPU.

    The other int8 kernels sum in 32 bits wherever the CPU has an int8 dot product.
    """
    kept = options.keep_fp32 or ()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == module.groups > MOST_GROUPS and name not in kept
    )


def _hide_float_operations(model: fx.GraphModule, example: Tensor, kept: Sequence[str]) -> None:
    """Hide from torch.ao the operations whose rounding would serve no int8 kernel.

    They lie between kept layers alone, or after the last int8 layers: there it would leave the logits 8 bits.
    """
    ShapeProp(model).propagate(example)
    modules, matrices = dict(model.named_modules()), _matrices(model)

    def is_kept(node: fx.Node) -> bool | None:
        """Whether a layer stays fp32; None for what is no layer."""
        if node.op == "call_module" and isinstance(modules[str(node.target)], LAYERS):
            return str(node.target) in kept
        product = _has_matrix(modules[str(node.target)]) if node.op == "call_module" else _factors(node, matrices)
        return False if product else None

    layers = {node: is_kept(node) for node in model.graph.nodes}
    served: set[fx.Node] = set()  # whose values reach an int8 layer
    for node in reversed(model.graph.nodes):
        if any(user in served or layers[user] is False for user in node.users):
            served.add(node)
    between = between_kept((node, node.all_input_nodes, stays) for node, stays in layers.items())
    for node, stays in layers.items():
        if stays is not None or not (node in between or node not in served or _is_prelu(node, modules)):
            continue
        if isinstance(node.meta.get("tensor_meta"), TensorMetadata) and node.op in CALLS:  # not a size, not a tuple
            model.add_submodule(f"{node.name}_fp32", Float(CALLS[node.op](node.target, modules)))
            node.op, node.target = "call_module", f"{node.name}_fp32"
    model.recompile()


def _is_prelu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A PReLU with a weight a channel, for which torch has no int8 kernel."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.PReLU) and module.num_parameters > 1


def _fuse_limits(model: fx.GraphModule, kept: Sequence[str]) -> dict[str, float]:
    """Put ReLU in the place of ReLU6 after int8 layers, where torch.ao fuses it; the limits, by layer.

    The range of the layer's output then ends at the limit, and integers saturate there (`below` in observers.py).
    Unfused, the 8 bits would have to hold all outputs of the convolution, negative ones and those above 6, too.
    """
    modules, limits = dict(model.named_modules()), {}
    calls = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
    for node in list(model.graph.nodes):
        limit: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        layer = node.all_input_nodes[0] if node.target is F.relu6 or isinstance(limit, nn.Hardtanh) else None
        if layer is None or layer.op != "call_module" or not isinstance(modules[str(layer.target)], LAYERS):
            continue
        name = str(layer.target)
        if name in kept or len(layer.users) > 1 or calls[layer.target] > 1 or getattr(limit, "min_val", 0) != 0:
            continue
        limits[name] = float(getattr(limit, "max_val", 6))
        model.add_submodule(f"{node.name}_relu", nn.ReLU())
        with model.graph.inserting_before(node):
            node.replace_all_uses_with(model.graph.call_module(f"{node.name}_relu", (layer,)))
        model.graph.erase_node(node)
    model.recompile()
    return limits


def _with_a_module_for_each_call(model: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """The network with a copy of each module for every call of it but the first, which has the same weights; and the
    names of the modules by those of their copies.

    An int8 module of torch.ao has one scale, to which it would round what all of its calls give.
    """
    weights: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    apart, copies = fx.GraphModule(model, copy.deepcopy(model.graph)), dict[str, str]()
    called, modules = set[str](), dict(model.named_modules())
    for node in apart.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or any(modules[name].children()):
            continue
        if name in called:
            node.target = f"{name}_again_{node.name}"
            copies[node.target] = name
            apart.add_submodule(node.target, copy.deepcopy(modules[name], dict(weights)))
        called.add(name)
    apart.recompile()
    return apart, copies


def _give_floats(converted: fx.GraphModule, example: Tensor, limits: Mapping[str, float]) -> None:
    """Let int8 layers whose outputs are only read as floats give floats: from the sums in 32 bits, without rounding.

    Torch's own int8 layers round their output to 8 bits, which for logits are 256 values. Those of oneDNN, which take
    their place here, compute in int8 all the same.
    """
    ShapeProp(converted).propagate(example)
    for node in list(converted.graph.nodes):
        if not node.users or any(user.target != "dequantize" for user in node.users):
            continue
        layer = _with_float_output(converted, node, limits.get(str(node.target)))
        if layer is None:
            continue
        calls = [other for other in converted.graph.nodes if other.op == node.op and other.target == node.target]
        name = str(node.target) if node.op == "call_module" and calls == [node] else f"int8_{node.name}"
        converted.set_submodule(name, layer)
        with converted.graph.inserting_before(node):
            integers = converted.graph.call_method("int_repr", (node.args[0],))
            floats = converted.graph.call_module(name, (integers,))
        for user in list(node.users):
            user.replace_all_uses_with(floats)
            converted.graph.erase_node(user)
        converted.graph.erase_node(node)
    converted.recompile()


def _with_float_output(
    converted: fx.GraphModule, node: fx.Node, limit: float | None
) -> PackedConv | PackedLinear | None:
    """What computes the sums of an int8 layer without rounding them; None of what is no such layer, or pads with other
    values than zeros."""
    packed: Any
    if node.op == "call_module" and isinstance(module := converted.get_submodule(str(node.target)), INT8_MODULES):
        packed = module._packed_params if isinstance(module, nnq.Conv2d) else module._packed_params._packed_params
        relu = isinstance(module, nniq.ConvReLU2d | nniq.LinearReLU)
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return None
    elif node.target in INT8_FUNCTIONS:
        packed = getattr(converted, str(node.all_input_nodes[1].target))
        relu = "relu" in str(node.target)
    else:
        return None
    weight, bias = packed.unpack()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scales = weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale())
    zeros = torch.zeros(len(weight), dtype=torch.int)
    given: Any = node.all_input_nodes[0].meta["tensor_meta"]
    x_scale, x_zero = given.qparams["scale"], given.qparams["zero_point"]
    factors: Factors = x_scale, x_zero, scales.float().expand(len(weight)).contiguous(), zeros, bias
    post = "hardtanh" if limit is not None else "relu" if relu else "none"
    ends: list[float | None] = [0.0, limit] if limit is not None else []
    output: Output = 1.0, 0, SCALAR_TYPES[torch.float32], "none", 1.0, 0, post, ends, ""
    if not packed._has_method("stride"):
        return PackedLinear(weight.int_repr(), factors, list(given.shape), output)
    geometry = packed.stride(), packed.padding(), packed.dilation(), packed.groups(), list(given.shape)
    return PackedConv(weight.int_repr(), factors, geometry, output)


def _calibrate_and_convert(
    model: nn.Module,
    batches: Sequence[Tensor],
    mapping: QConfigMapping,
    expected: Tensor,
    kernels: BackendConfig | None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The quantized program with fp32 operations between quantize and dequantize, and with int8 operations.

    Args:
        batches: calibration images, uint8 [N, 3, H, W].
        expected: the logits of the first batch before anything of the model was changed.
        kernels: the operations that there are in int8; None: torch's own.
    """
    try:
        if normalizes_tokens(model):
            for operation in TOKEN_ARITHMETIC:
                mapping.set_object_type(operation, None)
        whole = PrepareCustomConfig().set_non_traceable_module_classes([Float])
        prepared = prepare_fx(model.eval(), mapping, (to_float(batches[0]),), whole, backend_config=kernels)
        logits = [prepared(to_float(batch)) for batch in track(batches, "calibrating", len(batches))]
        if not same_logits(expected, logits[0]):
            raise ValueError(OTHER_FUNCTION)
        shared: dict[int, Any] = {id(weight): weight for weight in prepared.parameters()}
        return convert_to_reference_fx(copy.deepcopy(prepared, shared), backend_config=kernels), convert_fx(
            prepared, backend_config=kernels
        )
    except Exception as error:  # tracing raises whatever the model's Python code does when it meets a symbol
        raise StageError(f"engine fx cannot quantize this model: {with_place(error)}") from error
    finally:
        # torch caches the device of every module that it has seen, and with it the module: a search makes hundreds.
        if hasattr(fx_utils, "assert_and_get_unique_device"):
            fx_utils.assert_and_get_unique_device.cache_clear()


def _trace(converted: fx.GraphModule, example: Tensor, limits: Mapping[str, float]) -> torch.jit.ScriptModule:
    try:
        converted(example)  # before ShapeProp, whose errors hold the whole graph
        _give_floats(converted, example, limits)
        # Freezing would turn packed weights into constants, which cannot be saved.
        packed = [name for name, module in converted.named_modules() if isinstance(module, PackedConv | PackedLinear)]
        traced = torch.jit.trace(converted, example, check_trace=False).eval()
        return torch.jit.freeze(traced, preserved_attrs=packed)
    except Exception as error:  # an operation for which there is no int8 kernel
        raise StageError(f"engine fx quantized this model, but it does not run: {first_line(error)}") from error


def _kernels_of(options: QuantizeConfig) -> str:
    """The kernels to pack weights for; those that were asked for may be another engine's."""
    return options.backend if options.backend in KERNELS else KERNELS[0]


@contextmanager
def _kernels(backend: str) -> Iterator[None]:
    """Pack weights for `backend` inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _qconfig_mapping(
    options: QuantizeConfig,
    reduce_range: bool,
    saturating: Sequence[str],
    limits: Mapping[str, float],
    copies: Mapping[str, str],
) -> QConfigMapping:
    """Torch's default mapping (operations with fixed ranges included) with our observers in place of its own; `copies`
    of layers are quantized as those are.

    The weights of `saturating` layers, or of all with `reduce_range`, are from -64 to 64: the sum of two products with
    inputs of 8 bits then fits into 16 bits. Inputs of 7 bits would do so, too, but cost more (SQNR of the logits of a
    mobilenet_v2 and a mobilenet_v3_small: 12.8 and 25.1 dB with all weights reduced, 10.6 and 21.5 with all inputs).
    """
    observed = observer_class(observer, options)
    activation = observed.with_args(dtype=torch.quint8)
    weight: Any = PerChannelMinMaxObserver if options.per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if options.per_channel else torch.per_tensor_symmetric
    weight = weight.with_args(dtype=torch.qint8, qscheme=scheme, reduce_range=reduce_range)
    qconfig = QConfig(activation, weight)
    mapping = get_default_qconfig_mapping(_kernels_of(options)).set_global(qconfig)
    for pattern, default in list(mapping.object_type_qconfigs.items()):
        if default is not None and not _has_fixed_range(default):
            mapping.set_object_type(pattern, qconfig)
    kept = options.keep_fp32 or ()
    for name in {*saturating, *limits}:
        output = below(observed, limits[name]).with_args(dtype=torch.quint8) if name in limits else activation
        reduced = reduce_range or name in saturating
        for one in (name, *(again for again, first in copies.items() if first == name)):
            mapping.set_module_name(one, QConfig(output, weight.with_args(reduce_range=reduced)))
    for name in (*kept, *(again for again, first in copies.items() if first in kept)):
        mapping.set_module_name(name, None)
    return mapping.set_module_name("normalize", None)  # one multiplication on three channels; int8 would cost accuracy


def _has_fixed_range(qconfig: QConfig) -> bool:
    return isinstance(qconfig.activation(), torch.ao.quantization.FixedQParamsObserver)


def _int8_layers(converted: fx.GraphModule, copies: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the modules that are called and compute in int8, in each of the `copies` that are made of them.

    A layer that tracing went around, or that kept its reference (fp32) form, is not among them.
    """
    called = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
    modules = dict(converted.named_modules())
    int8 = {name for name in called if isinstance(modules[name], (*INT8_MODULES, PackedConv, PackedLinear))}
    partly = {copies.get(name, name) for name in called - int8}
    return tuple({copies.get(name, name) for name in int8} - partly)


def _float_products(converted: fx.GraphModule) -> tuple[str, ...]:
    """Names of what multiplies by weights in fp32: modules with a matrix of them, and functions that are given one."""
    modules, matrices, names = dict(converted.named_modules()), _matrices(converted), []
    for node in converted.graph.nodes:
        if node.op == "call_module" and _has_matrix(modules[str(node.target)]):
            names.append(str(node.target))
        names += [name.rpartition(".")[0] or name for name in _factors(node, matrices)]
    return tuple(names)


def _has_matrix(module: nn.Module) -> bool:
    return not isinstance(module, nn.LayerNorm) and any(weight.dim() > 1 for weight in module.parameters())


def _matrices(model: fx.GraphModule) -> set[str]:
    return {name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.dim() > 1}


def _factors(node: fx.Node, matrices: set[str]) -> list[str]:
    """Those of `matrices` that a function or method multiplies by."""
    if node.target not in PRODUCTS:
        return []
    return [name for one in node.all_input_nodes if (name := str(_source(one).target)) in matrices]


def _source(node: fx.Node) -> fx.Node:
    """What a tensor is made of by operations on it alone, such as transposing it."""
    while node.op in ("call_method", "call_function") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node
