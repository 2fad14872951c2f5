"""Exact clean-up of an fp32 classifier before it is quantized: its outputs stay equal, but for rounding.

Takes any module; feeds the engines, `measure_sensitivity` and the count of MACs.
"""

import copy
import operator
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse, remove_dropout
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from qexp.errors import StageError, first_line
from qexp.models.folding import fold_pools
from qexp.progress import say
from qexp.quantization.attention import SelfAttention, replace_attention
from qexp.quantization.equivalence import same_logits
from qexp.quantization.windows import replace_windows

OTHER_FUNCTION = "torch.fx traces it as another function, as it does where a tensor is changed in place"
ADDITIONS = ("add", "sub", "add_", "sub_")
FOLDED = {nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm1d: nn.Linear}


class ScaleAndShift(nn.Module):
    """A batch norm in evaluation, as multiplication and addition."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        scale = gain * (norm.running_var + norm.eps).rsqrt()
        shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
        shape = (-1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (-1,)
        self.register_buffer("scale", scale.detach().view(shape))
        self.register_buffer("shift", shift.detach().view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def clean(model: nn.Module, example: Tensor, fold_pool: bool) -> nn.Module:
    """A copy without dropout, batch norm folded into the convolutions before it, attention made of linear layers.

    Args:
        example: float images [N, 3, H, W], for the shapes of the activations.
        fold_pool: also fold an average pool that only enlarges its map into the linear layer after it. In a VGG at
            32 px each of 512 values reaches the layer 49 times, so its 49 weights for each of them can be summed.

    Pools and flattening that only repeat or move values become operations that do just that, for which the engines have
    faster int8 kernels. A model that torch.fx cannot trace, or that computes something else when traced, is copied as
    it is; a model that is an ONNX graph stays that graph.
    """
    if hasattr(model, "onnx_layers"):
        return model
    try:
        copied = _copied(model)
        with torch.no_grad():
            expected = copied(example)
            replace_windows(copied, example)
            cleaned = _cleaned(copied, example, fold_pool)
            if not same_logits(expected, cleaned(example)):
                raise ValueError(OTHER_FUNCTION)
        return cleaned
    except StageError:
        raise
    except Exception as error:  # tracing raises whatever the model's Python code does when it meets a symbol
        say(f"the model is quantized without clean-up: {first_line(error)}")
        return _copied(model)


def _copied(model: nn.Module) -> nn.Module:
    """With layers of the user's own classes as the layers that they are, if they compute as these do."""
    try:
        with warnings.catch_warnings():  # copying the program of an export calls what torch itself has deprecated
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)", FutureWarning)
            copied = copy.deepcopy(model).eval()
    except Exception as error:  # weights that are no parameters, as those of the old weight_norm
        raise StageError(f"this model cannot be copied: {first_line(error)}") from error
    for module in list(copied.modules()):
        _compute_weights(module)
        for kind in (nn.Conv2d, nn.Linear):
            own: Any = type(module)
            same = isinstance(module, kind) and own.forward is kind.forward and own.__call__ is kind.__call__
            if same and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None):
                module.__class__ = kind
        if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
            _pad_by_numbers(module)
    return copied


def _compute_weights(module: nn.Module) -> None:
    """Make plain parameters of those that torch.nn.utils.parametrizations compute anew in each forward."""
    if not parametrize.is_parametrized(module):
        return
    with torch.no_grad():  # not by `remove_parametrizations`: the class is that of the model that was copied, too
        values = {name: getattr(module, name).clone() for name in module.parametrizations}  # type: ignore[union-attr]
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _pad_by_numbers(convolution: nn.Conv2d) -> None:
    """Make `padding="same"` or "valid" the numbers that it stands for, which the engines want; where it is not the same
    before and after the map, it stays."""
    left, right, top, bottom = convolution._reversed_padding_repeated_twice
    if (left, top) == (right, bottom):
        convolution.padding = (top, left)


def _cleaned(model: nn.Module, example: Tensor, fold_pool: bool) -> nn.Module:
    traced: Any = remove_dropout(model)
    _spell_out_factors(traced)
    _reshape_instead_of_view(traced)
    replace_attention(traced)
    _spare_shared_layers(traced)
    with torch.no_grad():
        # Traced again only to go into attention: what a first trace leaves out as a whole, a second may not.
        attention = any(isinstance(module, SelfAttention) for module in traced.modules())
        cleaned: Any = fuse(traced, inplace=True, no_trace=not attention)
    if fold_pool:
        fold_pools(cleaned, example)
    _repeat_instead_of_averaging(cleaned, example)
    return cleaned.eval()


def _spell_out_factors(model: fx.GraphModule) -> None:
    """Make `torch.add(x, y, alpha=2)` x + 2 * y: the int8 sums of torch leave the factor out."""
    for node in model.graph.nodes:
        factor = node.kwargs.get("alpha", 1)
        if factor != 1 and len(node.args) == 2 and str(getattr(node.target, "__name__", node.target)) in ADDITIONS:
            with model.graph.inserting_before(node):
                scaled = model.graph.call_function(operator.mul, (node.args[1], factor))
            node.args, node.kwargs = (node.args[0], scaled), {}
    model.recompile()


def _reshape_instead_of_view(model: fx.GraphModule) -> None:
    """int8 convolutions give channels-last maps, of which a view may not be possible."""
    for node in model.graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(argument, torch.dtype) for argument in node.args):
            node.target = "reshape"
    model.recompile()


def folded_layers(model: nn.Module, cleaned: nn.Module) -> list[str]:
    """The linear layers of a model into which its clean-up has folded a pool: they take fewer inputs afterwards."""
    before = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    after = {name: module.in_features for name, module in cleaned.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, count in after.items() if count < before.get(name, 0)]


def _spare_shared_layers(model: fx.GraphModule) -> None:
    """Make multiplication and addition of the batch norms after a layer that is called more than once.

    Whatever folds batch norm, here or in an engine, would fold into such a layer at each of its calls.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    calls = _calls(model)
    for node in list(model.graph.nodes):
        norm: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if type(norm) in FOLDED and norm.track_running_stats else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and calls[str(before.target)] > 1):
            continue
        if type(modules[str(before.target)]) is FOLDED[type(norm)]:
            model.add_submodule(f"{node.name}_unfolded", ScaleAndShift(norm))
            node.target = f"{node.name}_unfolded"
    model.recompile()


def _calls(model: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")


def _repeat_instead_of_averaging(model: fx.GraphModule, example: Tensor) -> None:
    """An average over one value, to a larger map, is that value repeated: 0.04, not 7.9 ms for VGG16, batch 128."""
    with torch.no_grad():
        ShapeProp(model).propagate(example)
    modules: dict[str, Any] = dict(model.named_modules())
    for node in list(model.graph.nodes):
        layer: Any = _module_of(node, modules)
        same: Any = None  # torch.ao knows these as functions alone
        with model.graph.inserting_before(node):
            if isinstance(layer, nn.AdaptiveAvgPool2d):
                before, after = (place.meta["tensor_meta"].shape[2:] for place in (node.args[0], node))
                if before == (1, 1) != after:
                    options: dict[str, Any] = {"size": tuple(after), "mode": "nearest"}
                    same = model.graph.call_function(nn.functional.interpolate, node.args, options)
            elif isinstance(layer, nn.Flatten):
                arguments = (node.args[0], layer.start_dim, layer.end_dim)
                same = model.graph.call_function(torch.flatten, arguments)
            elif _averages_one_value(node):
                same = model.graph.call_function(torch.flatten, (node.args[0], 1))
        if same is not None:
            node.replace_all_uses_with(same)
            model.graph.erase_node(node)
    model.recompile()


def _averages_one_value(node: fx.Node) -> bool:
    """Of `x.mean([2, 3])` on 1x1 maps, for which torch has no int8 kernel."""
    if (
        node.target not in (torch.mean, "mean")
        or len(node.args) != 2
        or node.kwargs
        or not isinstance(node.args[0], fx.Node)
    ):
        return False
    shape, dims = node.args[0].meta["tensor_meta"].shape, node.args[1]
    return (
        len(shape) == 4 and shape[2:] == (1, 1) and isinstance(dims, list | tuple) and {d % 4 for d in dims} == {2, 3}
    )


def _module_of(node: Any, modules: dict[str, Any]) -> nn.Module | None:
    return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None
