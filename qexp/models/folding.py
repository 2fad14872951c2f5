"""A pool before a linear layer that only enlarges its map, folded into that layer: the same outputs, fewer weights.

A VGG has 7x7 averages before its first linear layer, whatever the size of its images: at 32 px each of 512 values
reaches the layer 49 times. An average that is taken to a larger map has fewer inputs than outputs, and is linear, so
the layer can take the inputs instead. Takes any module; feeds the clean-up before quantization and the floats of a
sweep.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import remove_dropout
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = 512  # of a layer's weights that are folded at once: in double precision all of VGG's would take 0.8 GB
POOLS = ("adaptive_avg_pool2d", "adaptive_avg_pool2d.default")
FLATTENS = ("flatten", "flatten.using_ints", "view", "view.default", "reshape", "reshape.default")
CLOSE = 1e-4  # largest difference of logits that are the same but for rounding, as a share of the largest


def enlarging_pool(model: nn.Module, example: Tensor) -> bool:
    """Whether `forward` averages a map to a larger one.

    Args:
        model: in evaluation mode.
        example: float images [N, C, H, W].
    """
    with torch.no_grad(), _Pools() as watch:
        model(example)
    return watch.found


class _Pools(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "adaptive_avg_pool2d" in str(func):
            self.found |= result.numel() > args[0].numel()
        return result


def folded(model: nn.Module, example: Tensor) -> nn.Module | None:
    """A copy of the model with each such pool folded; None where there is none, or torch.fx does not trace the model.

    Args:
        model: in evaluation mode.
        example: float images [N, C, H, W], for the shapes of the activations.
    """
    try:
        if not enlarging_pool(model, example):
            return None
        traced: Any = remove_dropout(copy.deepcopy(model).eval())
        with torch.no_grad():
            if not fold_pools(traced, example):
                return None
            expected, found = model(example), traced(example)
    except Exception:  # tracing raises whatever the model's Python code does when it meets a symbol
        return None
    return traced.eval() if (found - expected).abs().max() <= CLOSE * expected.abs().max() else None


def fold_pools(model: fx.GraphModule, example: Tensor) -> list[str]:
    """Fold them in place; the names of the linear layers that have changed."""
    with torch.no_grad():
        ShapeProp(model).propagate(example)
    modules: dict[str, Any] = dict(model.named_modules())
    calls = Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")
    changed = []
    for linear in list(model.graph.nodes):
        layer = _module_of(linear, modules)
        pool = _pool_before(linear, modules)
        if not isinstance(layer, nn.Linear) or calls[str(linear.target)] > 1 or pool is None:
            continue
        (_, channels, *small), (_, _, *large) = (node.meta["tensor_meta"].shape for node in (pool.args[0], pool))
        if small[0] * small[1] < large[0] * large[1] and layer.in_features == channels * large[0] * large[1]:
            _replace_weights(model, str(linear.target), layer, _spread(pool, modules, small[0], small[1]))
            with model.graph.inserting_before(linear):
                linear.args = (model.graph.call_function(torch.flatten, (pool.args[0], 1)),)
            changed.append(str(linear.target))
    model.graph.eliminate_dead_code()
    model.recompile()
    return changed


def _pool_before(linear: fx.Node, modules: dict[str, Any]) -> Any:
    """The average pool whose flattened output `linear` takes; None if there is none."""
    flat: Any = linear.args[0] if len(linear.args) == 1 else None
    if not isinstance(flat, fx.Node) or not (_is(flat, FLATTENS) or isinstance(_module_of(flat, modules), nn.Flatten)):
        return None
    pool: Any = flat.args[0] if flat.args else None
    if not isinstance(pool, fx.Node) or "tensor_meta" not in pool.meta or len(pool.meta["tensor_meta"].shape) != 4:
        return None
    count, *shape = pool.meta["tensor_meta"].shape
    if flat.meta["tensor_meta"].shape != (count, shape[0] * shape[1] * shape[2]):
        return None
    is_pool = isinstance(_module_of(pool, modules), nn.AdaptiveAvgPool2d) or _is(pool, POOLS)
    return pool if is_pool and pool.args and isinstance(pool.args[0], fx.Node) else None


def _is(node: fx.Node, names: tuple[str, ...]) -> bool:
    """Whether it is a function or a method of one of these names."""
    return node.op in ("call_function", "call_method") and str(getattr(node.target, "__name__", node.target)) in names


def _module_of(node: Any, modules: dict[str, Any]) -> nn.Module | None:
    return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _spread(pool: fx.Node, modules: dict[str, Any], height: int, width: int) -> Tensor:
    """How much of each place of the map before [height * width] is in each place of the map after."""
    ones = torch.eye(height * width, dtype=torch.float64).view(height * width, 1, height, width)
    run: Any = _module_of(pool, modules) or pool.target
    return run(ones, *pool.args[1:], **pool.kwargs).flatten(1)


def _replace_weights(model: fx.GraphModule, name: str, layer: nn.Linear, spread: Tensor) -> None:
    """Sum the weights of equal inputs; in double precision, so that the outputs stay within rounding."""
    places, copies = spread.shape
    channels = layer.in_features // copies
    smaller = nn.Linear(channels * places, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        for start in range(0, layer.out_features, ROWS):
            rows = layer.weight[start : start + ROWS].double().view(-1, channels, copies)
            smaller.weight[start : start + ROWS] = (rows @ spread.T).flatten(1)
        if layer.bias is not None:
            smaller.bias.copy_(layer.bias)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, smaller)
