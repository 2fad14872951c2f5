"""PT2E quantization (torchao) of an exported program, lowered to oneDNN's int8 kernels and traced with TorchScript.

Method: https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html, without the compiler: what
Inductor's patterns leave is traced, so that it loads without qexp, without torchao and without a C++ compiler.
"""

import logging
import re
import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from qexp.config import QuantizeConfig
from qexp.errors import StageError, with_place
from qexp.measurement.accuracy import to_float
from qexp.progress import track
from qexp.quantization.fp32_layers import between_kept
from qexp.quantization.observers import calibration_batches, observer_class
from qexp.quantization.result import QuantizedModel, QuantizeResult

MOST_IMAGES = 65_536  # of one batch: torch.export wants a limit
# Torch's own for observers. The 2**-12 of torchao's quantizer is coarser than int8 for weights below 0.03.
SMALLEST_SCALE = torch.finfo(torch.float32).eps
NAME = "qexp_name"  # of a constant: the key of its name in the model, in a node's `meta`
LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
LEFT_FP32 = (
    "conv2d", "conv_transpose2d", "convolution", "linear", "addmm", "mm", "mv", "bmm", "baddbmm", "matmul", "einsum",
    "tensordot", "bilinear", "_trilinear", "lstm", "gru",
)  # fmt: skip


def quantize(model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    """See `qexp.quantization.quantize_model`; `model` may be changed."""
    for noisy in ("torchao", "torch.utils._pytree"):  # of CUDA extensions that cannot be loaded, of names that change
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            made = _quantize(model.eval(), images, options, reduce_range)
        except Exception as error:  # export raises whatever the model's Python code does when it meets a symbol
            raise StageError(f"engine pt2e cannot quantize this model: {with_place(error)}") from error
    return made


def _quantize(model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    from torchao.quantization.pt2e import quantize_pt2e

    from qexp.quantization.engines.lowering import lower

    two = to_float(images[:2])
    example = torch.cat([two, two])  # of one image alone, too, a batch that torch.export does not take for fixed
    sizes = ({0: torch.export.Dim("images", min=1, max=MOST_IMAGES)},)
    # Strict: the quantizer looks for the source of each operation, which the other mode does not record.
    program = torch.export.export(model, (example,), dynamic_shapes=sizes, strict=True).module()
    _hide_sums_with_numbers(program)
    prepared = quantize_pt2e.prepare_pt2e(program, _quantizer(options, reduce_range))
    batches = calibration_batches(images, options.calibration_batch_size)
    for batch in track(batches, "calibrating", len(batches)):
        prepared(to_float(batch))
    # Patterns of training with fake quantization, each an export of its own: there was none, and they take a minute.
    with mock.patch.object(quantize_pt2e, "_fold_conv_bn_qat", lambda trained: trained):
        converted = quantize_pt2e.convert_pt2e(prepared)
    layers = [_module_of(node) for node in converted.graph.nodes if node.target in LAYERS]
    lowered = lower(converted, example)
    stayed = {_module_of(node) or name for node in lowered.graph.nodes if (name := _fp32_weights(node))}
    module = torch.jit.trace(lowered, example, check_trace=False).eval()
    int8_layers = tuple(name for name in layers if name not in stayed)
    result = QuantizeResult.with_options(
        options,
        reduce_range,
        len(images),
        backend="onednn",
        int8_layers=int8_layers,
        float_layers=tuple(sorted(stayed)),
    )
    return QuantizedModel(module, module, "pytorch", model, result, converted)


def _quantizer(options: QuantizeConfig, reduce_range: bool) -> Any:
    from torchao.quantization.pt2e import observer as kinds
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observer_class(kinds, options).with_args(eps=SMALLEST_SCALE),
    )

    class OneScale(kinds.PerChannelMinMaxObserver):
        """The largest channel's scale for all of them: oneDNN's patterns know weights with a scale a channel only."""

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            scale, zero = super().calculate_qparams()
            return torch.full_like(scale, float(scale.max())), zero

    weight = QuantizationSpec(
        dtype=torch.int8,
        # Reduced in the weights: oneDNN's kernels know no limit of their results but that of the type.
        quant_min=-64 if reduce_range else -128,
        quant_max=63 if reduce_range else 127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=(kinds.PerChannelMinMaxObserver if options.per_channel else OneScale).with_args(
            eps=SMALLEST_SCALE
        ),
    )

    class KeepingQuantizer(X86InductorQuantizer):
        """Some layers stay as they are, and what follows the last layers gives floats."""

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            annotated = super().annotate(model)
            layers = {node: _is_kept(node, options) for node in annotated.graph.nodes}
            between = between_kept((node, node.all_input_nodes, kept) for node, kept in layers.items())
            for node in [*between, *(node for node, kept in layers.items() if kept)]:
                node.meta.pop("quantization_annotation", None)
            _leave_ends_float(annotated)
            return annotated

    return KeepingQuantizer().set_global(QuantizationConfig(activation, activation, weight, None))


def _is_kept(node: fx.Node, options: QuantizeConfig) -> bool | None:
    """Whether a layer is to stay fp32; None for what is no layer."""
    return _module_of(node) in (options.keep_fp32 or ()) if node.target in LAYERS else None


def _leave_ends_float(model: fx.GraphModule) -> None:
    """Quantize no result of the last layers and of what follows them: it would round the logits."""
    before: set[fx.Node] = set()  # nodes that a layer depends on
    for node in reversed(model.graph.nodes):
        if node.target in LAYERS or node in before:
            before.update(node.all_input_nodes)
    for node in model.graph.nodes:
        annotation = node.meta.get("quantization_annotation")
        if annotation and node not in before:
            annotation.output_qspec = None
            for source in [source for source in annotation.input_qspec_map if source not in before]:
                del annotation.input_qspec_map[source]


def _hide_sums_with_numbers(program: fx.GraphModule) -> None:
    """The quantizer takes each sum after a layer for one of two tensors; it finds them by their source."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and not all(isinstance(term, fx.Node) for term in node.args):
            for source in ("source_fn_stack", "torch_fn"):
                node.meta.pop(source, None)


def _module_of(node: fx.Node) -> str:
    """The qualified name of the module that an operation comes from; empty: of none but the whole."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # Of a module that torch.fx has traced it is Python: getattr(L['self'].network, '0')
    path = re.sub(r"getattr\(|L\['self'\]\.?|['\")]", "", str(stack[-1][0])) if stack else ""
    return path.replace(", ", ".").strip(".")


def _fp32_weights(node: fx.Node) -> str | None:
    """Name of the constant weights that an operation multiplies by in fp32, whatever reshapes them; None: of none."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._opname in LEFT_FP32):
        return None
    for factor in node.all_input_nodes:
        while factor.op == "call_method" or (factor.op == "call_function" and len(factor.all_input_nodes) == 1):
            factor = factor.all_input_nodes[0]  # of a method, such as `expand`, the tensor; then come its sizes
        if factor.op == "get_attr":
            return str(factor.meta.get(NAME, factor.target))
    return None
