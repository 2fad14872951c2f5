"""A classifier rebuilt from its exported program: its operations as layers and functions of torch.nn, by their names.

torch.export sees what a network computes, whatever its code looks like: subclasses that pad or standardise their
weights in `forward`, functions that are given weights, Python that torch.fx cannot trace. What it gives has lost the
layers, though. Feeds engine fx, which knows layers alone.
"""

import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

LARGEST_DIFFERENCE = 1e-6  # of the power of the logits: rounding alone
aten = torch.ops.aten
# Of the same arguments; what is not here stays the operation that it is.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.relu.default: F.relu, aten.hardswish.default: F.hardswish, aten.hardsigmoid.default: F.hardsigmoid,
    aten.silu.default: F.silu, aten.gelu.default: F.gelu, aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh, aten.leaky_relu.default: F.leaky_relu, aten.elu.default: F.elu,
    aten.softmax.int: torch.softmax, aten.max_pool2d.default: F.max_pool2d, aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d, aten.mean.dim: torch.mean, aten.pad.default: F.pad,
    aten.constant_pad_nd.default: F.pad, aten.flatten.using_ints: torch.flatten, aten.cat.default: torch.cat,
    aten.stack.default: torch.stack, aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze, aten.squeeze.dim: torch.squeeze, aten.squeeze.dims: torch.squeeze,
    aten.chunk.default: torch.chunk, aten.split.Tensor: torch.split, aten.split_with_sizes.default: torch.split,
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.matmul.default: torch.matmul, aten.bmm.default: torch.bmm, aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm, aten.conv_transpose2d.input: F.conv_transpose2d,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.pixel_shuffle.default: F.pixel_shuffle, aten.channel_shuffle.default: F.channel_shuffle,
}  # fmt: skip
METHODS = {  # of tensors: torch.ao has kernels by these names alone, and a trace keeps sizes that they are given
    aten.view.default: "reshape", aten._unsafe_view.default: "reshape", aten.reshape.default: "reshape",
    aten.permute.default: "permute", aten.repeat.default: "repeat", aten.expand.default: "expand",
    aten.sym_size.int: "size",
}  # fmt: skip
SAME = (  # as their first argument, in evaluation
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.dropout.default,
    aten.lift_fresh_copy.default,
)  # fmt: skip
LIMITS = (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default)
CONVOLUTIONS = {aten.conv1d: nn.Conv1d, aten.conv2d: nn.Conv2d}
BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
BATCH_NORM_OF = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def as_layers(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """A module of layers of torch.nn that computes what `model` does, in evaluation; `model` stays as it is.

    Convolutions along one or two axes and linear layers whose weights do not depend on the images are modules, named as
    those of `model` or as their weights.

    Args:
        example: float images [N, C, H, W].

    Raises:
        Exception: of whatever kind torch.export raises.
        ValueError: what was rebuilt gives other logits.
    """
    two = example[:2]
    with _exporting(), torch.no_grad():
        expected = model(two)
        images = torch.cat([two, two])[:4]  # of one image alone, too, a batch that torch.export does not take for fixed
        sizes = ({0: torch.export.Dim.AUTO},)  # within the limits of an exported program, if it is one
        program = torch.export.export(model, (images,), dynamic_shapes=sizes, strict=False).run_decompositions({})
        rebuilt = _Rebuilt(program, model).module()
        found = rebuilt(two)
    if found.shape != expected.shape or _power(found - expected) > LARGEST_DIFFERENCE * _power(expected):
        raise ValueError("torch.export sees another function")
    return rebuilt


def _power(values: Tensor) -> float:
    return values.double().square().mean().item()


@contextmanager
def _exporting() -> Iterator[None]:
    """Without the fused kernel of attention, which is one operation, and without torch's notes on its own future."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Rebuilt:
    """Walks through an exported program and builds a graph of modules and functions.

    A value is a node of the new graph, or, where it depends on no image, a tensor or number that is there already.
    """

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.graph, self.parts = fx.Graph(), dict[str, Any]()  # modules and tensors, by qualified name
        self.values: dict[fx.Node, Any] = {}
        self.origins: dict[int, str] = {}  # names of the parameters that constants come from, by id
        self.alive: list[Any] = []  # so that an id means one object
        self.known = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        self.names: dict[tuple[Any, ...], str] = {}  # of modules, by what they are made of
        signature = program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in sources:
                self._constant(node, self._tensor(program, sources[node.name]), sources[node.name])
            elif node.op == "placeholder" and node.name in constants:
                self._constant(node, program.constants[constants[node.name]], constants[node.name])
            elif node.op == "placeholder":
                self.values[node] = self.graph.placeholder(node.name)
            elif node.op == "output":
                (result,) = self._mapped(node.args[0])
                self.graph.output(self._as_node(result))
            else:
                self._take(node)

    def module(self) -> fx.GraphModule:
        for name in [name for name in self.parts if any(other.startswith(f"{name}.") for other in self.parts)]:
            # A weight beside layers of its own module: no layer may be inside another.
            own = self._free(f"{name}.weight")
            self.parts[own] = self.parts.pop(name)
            for node in self.graph.nodes:
                node.target = own if node.target == name else node.target
        module = fx.GraphModule(self.parts, self.graph).eval()
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    @staticmethod
    def _tensor(program: torch.export.ExportedProgram, name: str) -> Tensor:
        found = program.state_dict.get(name)
        return (program.constants[name] if found is None else found).detach()

    def _constant(self, node: fx.Node, value: Any, origin: str) -> None:
        self.values[node] = value
        self.alive.append(value)
        if origin:
            self.origins[id(value)] = origin

    def _take(self, node: fx.Node) -> None:
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        given = [self.values[one] for one in node.all_input_nodes]
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        first_of_norm = node.target is operator.getitem and node.args[0].target is BATCH_NORMS[0]  # type: ignore[union-attr]
        if node.target in SAME or first_of_norm:
            self.values[node] = args[0]
        elif not any(isinstance(one, fx.Node) for one in given) and not random:
            origin = next((self.origins[id(one)] for one in given if id(one) in self.origins), "")
            self._constant(node, node.target(*args, **kwargs), origin)  # type: ignore[operator]
        else:
            self.values[node] = self._layer(node, args, kwargs) or self._function(node, args, kwargs)

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node | None:
        """The call of a module; None where an operation is none, or its weights depend on the images."""
        target: Any = node.target
        packet = getattr(target, "overloadpacket", None)
        if packet not in (*CONVOLUTIONS, aten.linear) and target not in (*BATCH_NORMS, aten.layer_norm.default):
            return None
        if target in BATCH_NORMS:
            args = args[:5] + (args[-2:] if target is BATCH_NORMS[0] else args[6:8])
            dims = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
            return self._call(node, args[0], _batch_norm, (BATCH_NORM_OF[dims], *args[1:]))
        if any(isinstance(tensor, fx.Node) for tensor in args[1:3]):
            return None
        if packet is aten.linear:
            return self._call(node, args[0], _linear, args[1:])
        if packet in CONVOLUTIONS:
            values, padding = self._padded(args)
            options = [*args[1:], *(None, 1, 0)[len(args) - 2 :]]
            return self._call(node, values, _convolution, (CONVOLUTIONS[packet], *options[:3], padding, *options[4:]))
        weight = args[2] if len(args) > 2 else None
        return None if weight is None else self._call(node, args[0], _layer_norm, args[1:5])

    def _padded(self, args: Any) -> tuple[fx.Node, Any]:
        """What a convolution takes, and its padding: zeros before it that are the same on both sides become its own."""
        values, own = args[0], args[4] if len(args) > 4 else 0
        if isinstance(own, str) or values.target is not F.pad or (values.args[2:] or ("constant",))[0] != "constant":
            return values, own
        sides, dims = values.args[1], args[1].dim() - 2
        if len(sides) != 2 * dims or sides[::2] != sides[1::2] or min(sides) < 0 or any(values.args[3:4]):
            return values, own
        numbers = own if isinstance(own, list) else [own] * dims
        return values.args[0], [mine + its for mine, its in zip(numbers, sides[::2][::-1], strict=True)]

    def _call(self, node: fx.Node, values: Any, make: Callable[..., nn.Module], options: Any) -> fx.Node:
        """The same module for the same weights and options: a layer that is called more than once is one."""
        key = (make, *((id(one) if isinstance(one, Tensor) else str(one)) for one in options))
        if key not in self.names:
            self.alive.append(options)
            self.names[key] = self._free(self._name_of(node, options))
            self.parts[self.names[key]] = make(*options)
        return self.graph.call_module(self.names[key], (self._as_node(values),))

    def _name_of(self, node: fx.Node, options: Any) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and stack[-1][0] in self.known:
            return str(stack[-1][0])
        origin = next((self.origins[id(one)] for one in options if id(one) in self.origins), node.name)
        parent = origin.rpartition(".")[0]
        if parent in self.known:
            return parent
        # attention's bare `in_proj_weight` is what the clean-up calls `in_proj`; parametrizations hold the parts
        return re.sub(r"(\.parametrizations)?[._](weight|running_mean)(\.\w+)?$", "", origin)

    def _free(self, name: str) -> str:
        """The name, or where it is taken another one; `weight` of the model itself is no name of a module."""
        found, number = name, 1
        while found in self.parts:
            found, number = f"{name}_{number}", number + 1
        return found

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        target: Any = node.target
        if target in LIMITS and (limited := _limited(args)):
            return self.graph.call_function(limited, (self._as_node(args[0]),))
        if target is aten.prelu.default and isinstance(args[1], Tensor):
            return self._call(node, args[0], _prelu, args[1:])
        method = METHODS.get(target)
        if method == "reshape":
            sizes = node.meta["val"].shape
            if sum(isinstance(size, torch.SymInt) for size in sizes) == 1:
                args = (args[0], [-1 if isinstance(size, torch.SymInt) else size for size in sizes])
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_node)
        if method:
            return self.graph.call_method(method, args, kwargs)
        return self.graph.call_function(FUNCTIONS.get(target, target), args, kwargs)

    def _as_node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = next((name for name, part in self.parts.items() if part is value), None)
        if name is None:
            name = self._free(self.origins.get(id(value), "constant"))
            self.parts[name] = value
        return self.graph.get_attr(name)

    def _mapped(self, given: Any) -> Any:
        return fx.node.map_arg(given, lambda node: self.values[node])


def _limited(args: Any) -> Callable[..., Any] | None:
    low, high = (args[place] if len(args) > place else None for place in (1, 2))
    return (F.relu6 if high == 6 else F.relu if high is None else None) if low == 0 else None


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight, bias)


def _convolution(
    kind: Any, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> nn.Module:
    inputs, kernel = weight.shape[1] * groups, tuple(weight.shape[2:])
    numbers = [tuple(one) if isinstance(one, list) else one for one in (stride, padding, dilation)]
    layer = kind(inputs, weight.shape[0], kernel, *numbers, groups=groups, bias=bias is not None, device="meta")
    return _with(layer, weight, bias)


def _batch_norm(kind: Any, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> nn.Module:
    layer = kind(len(mean), eps, momentum, affine=weight is not None, device="meta")
    layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, torch.tensor(0)
    return _with(layer, weight, bias)


def _layer_norm(shape: Any, weight: Tensor, bias: Any = None, eps: float = 1e-5) -> nn.Module:
    layer = nn.LayerNorm(shape, eps, bias=bias is not None, device="meta")
    return _with(layer, weight, bias)


def _prelu(weight: Tensor) -> nn.Module:
    return _with(nn.PReLU(weight.numel(), device="meta"), weight, None)


def _with(layer: Any, weight: Any, bias: Any) -> nn.Module:
    if weight is not None:
        layer.weight = _frozen(weight)
    if bias is not None:
        layer.bias = _frozen(bias)
    return layer
