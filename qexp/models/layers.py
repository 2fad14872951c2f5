"""The layers of an exported program, which has only operations: its convolutions, linear layers and norms as modules
again, so that they are quantized and counted as those of any other network.

Fed by program.py. The names of all weights stay, so that the layers have those that the exported module had, and a
weights file fits them; exported.py, which rebuilds any module for engine fx alone, calculates what it can beforehand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qexp.models import exported

aten = torch.ops.aten
# Operations without weights, as the functions that the engines know; these two are still whole here.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **exported.FUNCTIONS, aten.hardtanh.default: F.hardtanh, aten.relu6.default: F.relu6,
}  # fmt: skip
IN_PLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default, aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default, aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default, aten.silu_.default: aten.silu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default, aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor, aten.dropout_.default: aten.dropout.default,
}  # fmt: skip
GUARDS = "_guards_fn"  # a module that torch puts first, which raises at a batch of another size


def with_layers(program: fx.GraphModule) -> fx.GraphModule:
    """The same computation with layers, for batches of any size where the operations take them.

    Args:
        program: the module of an exported program.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == GUARDS:
            graph.erase_node(node)
        elif node.op == "call_function":
            _out_of_place(node)
            if not _as_layer(program, node):
                _as_function(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(program, graph, "Program")


def _out_of_place(node: fx.Node) -> None:
    """Where nothing else reads what the operation overwrites."""
    if node.target in IN_PLACE and len(node.all_input_nodes[0].users) == 1:
        node.target = IN_PLACE[node.target]


def _as_function(node: fx.Node) -> None:
    if node.target == aten.dropout.default and node.args[2] is False:
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)
    elif node.target in FUNCTIONS:
        node.target = FUNCTIONS[node.target]


def _as_layer(program: fx.GraphModule, node: fx.Node) -> bool:
    """Make a call of a module of an operation with weights; False where it has none of its own."""
    make = LAYERS.get(node.target)
    given = _arguments(node)
    weight = given.get("weight")
    if make is None or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    path, _, name = str(weight.target).rpartition(".")
    tensors = {key: value for key, value in given.items() if isinstance(value, fx.Node) and key != "input"}
    named = all(value.op == "get_attr" and value.target == f"{path}.{key}" for key, value in tensors.items())
    if not (path and name == "weight" and named):
        return False
    holder = program.get_submodule(path)
    layer = make(given, {key: getattr(holder, key) for key in tensors})
    if layer is None or not _same_layer(holder, layer):
        return False
    for key in tensors:
        setattr(layer, key, getattr(holder, key))
    if hasattr(holder, "num_batches_tracked"):
        layer.num_batches_tracked = holder.num_batches_tracked
    program.set_submodule(path, layer.eval())
    with node.graph.inserting_before(node):
        called = node.graph.call_module(path, (given["input"],))
    called.meta = dict(node.meta)
    node.replace_all_uses_with(called)
    node.graph.erase_node(node)
    return True


def _same_layer(holder: nn.Module, layer: nn.Module) -> bool:
    """Whether the place is a mere holder of weights, or already the same layer, which is called again."""
    if type(holder) is type(layer):
        return repr(holder) == repr(layer)
    others = set(holder.state_dict()) - {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return not others and not LAYER_TYPES & {type(holder)}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an operation is given, by the names of its schema, with its defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
    return found


def _conv(given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    weight = tensors["weight"]
    groups = given["groups"]
    padding = given["padding"] if isinstance(given["padding"], str) else _pair(given["padding"])
    with torch.device("meta"):
        return nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], _pair(weight.shape[2:]), _pair(given["stride"]), padding,
            _pair(given["dilation"]), groups, "bias" in tensors,
        )  # fmt: skip


def _linear(given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    with torch.device("meta"):
        return nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], "bias" in tensors)


def _batch_norm(given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    dimensions = _dimensions(given["input"])
    if given["training"] or len(tensors) < 4 or dimensions not in (2, 3, 4):
        return None
    kind = nn.BatchNorm2d if dimensions == 4 else nn.BatchNorm1d
    with torch.device("meta"):
        return kind(len(tensors["weight"]), given["eps"], given["momentum"])


def _layer_norm(given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    with torch.device("meta"):
        return nn.LayerNorm(tuple(given["normalized_shape"]), given["eps"], bias="bias" in tensors)


LAYERS: dict[Any, Callable[[dict[str, Any], dict[str, torch.Tensor]], nn.Module | None]] = {
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
}
LAYER_TYPES = {nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm}


def _dimensions(node: fx.Node) -> int:
    return len(getattr(node.meta.get("val"), "shape", ()))


def _pair(values: Any) -> tuple[int, int]:
    first, *others = values
    return first, others[0] if others else first
