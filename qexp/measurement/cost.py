"""Parameters and multiply-accumulates (MACs) of a model, and the share of MACs that runs in int8."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
import torchinfo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qexp.foundation.quantities import Number, Some
from qexp.foundation.tables import Shown, Table
from qexp.models.exported import as_layers
from qexp.models.preprocessing import Shape

FLOP_COUNTER, TORCHINFO, ONNX_SHAPES = "torch.utils.flop_counter", "torchinfo", "the shapes of the ONNX graph"
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
IN_PROJECTION = "in_proj"  # the layer that quantization makes of the first projection of nn.MultiheadAttention
MATRIX_VECTOR: dict[Any, Any] = {  # for which torch's counter has no formula
    torch.ops.aten.mv: lambda a, b, **more: 2 * a[0] * a[1],
    torch.ops.aten.addmv: lambda bias, a, b, **more: 2 * a[0] * a[1],
    torch.ops.aten.dot: lambda a, b, **more: 2 * a[0],
}


@dataclass(frozen=True)
class Cost(Shown):
    """Multiply-accumulates of one forward pass of one batch, by batch size.

    `macs` are those of all convolutions and matrix products, the products inside attention included: half of the
    floating-point operations that torch.utils.flop_counter counts. Additions of a bias, normalisation, pooling and
    activations are none. `conv_linear_macs` are those that belong to a layer with weights (Conv2d, Linear, the
    projections of attention); what they leave of `macs` are products of activations with each other, or with weights
    that are in no such layer. `int8_macs` are those of the layers that run in int8.

    `counted_by` is "torchinfo" in results of earlier versions, whose `macs` hold bias and batch norm too, but a Linear
    layer on tokens only once, and nothing of attention.
    """

    parameters: Number
    macs: dict[Some, Number]
    conv_linear_macs: dict[Some, Number]
    int8_macs: dict[Some, Number]
    counted_by: str = TORCHINFO

    def check(self) -> None:
        """Raise ValueError where counts are missing or contradict each other: they were changed."""
        if not self.macs.keys() == self.conv_linear_macs.keys() == self.int8_macs.keys():
            raise ValueError("the multiply-accumulates of a batch size are missing")
        if any(self.int8_macs[size] > self.conv_linear_macs[size] for size in self.macs):
            raise ValueError("more multiply-accumulates are in int8 than layers with weights have")

    @property
    def int8_percent(self) -> float:
        """Share of all multiply-accumulates that run in int8, in percent."""
        counted = self.conv_linear_macs if self.counted_by == TORCHINFO else self.macs
        return _percent(self.int8_macs, counted)

    @property
    def no_layer_percent(self) -> float:
        """Share of the multiply-accumulates that belong to no layer with weights, in percent: those of attention."""
        return 0.0 if self.counted_by == TORCHINFO else 100 - _percent(self.conv_linear_macs, self.macs)

    def tables(self) -> tuple[Table, ...]:
        columns = ("batch size", "MACs", "in Conv2d and Linear", "in int8")
        counts = (self.macs, self.conv_linear_macs, self.int8_macs)
        rows = tuple((str(size), *(f"{found[size]:,}" for found in counts)) for size in self.macs)
        title = f"{self.parameters:,} parameters; {self.int8_percent:.1f} % of the multiply-accumulates in int8"
        return (Table(title, columns, rows),)


def measure_cost(model: nn.Module, shape: Shape, batch_sizes: Sequence[int], int8_layers: Sequence[str]) -> Cost:
    """Count on the fp32 `model`.

    Args:
        model: takes images [N, *shape]; a module, or an `OnnxNetwork`.
        int8_layers: qualified names of the layers that the int8 model runs in int8; `….in_proj` is the first
            projection of an nn.MultiheadAttention. A function in `forward` has the name of its weight, or of the module
            that calls it.
    """
    in_onnx: Any = model if hasattr(model, "onnx_layers") else None
    count = _onnx_count if in_onnx else _module_count
    counted = model if in_onnx else _with_functions_as_layers(model, shape, int8_layers)
    counts = _counts(lambda size: count(counted, size, shape), tuple(batch_sizes))
    layers = {name for _, by_layer in counts.values() for names in by_layer for name in names}
    int8 = {name for name in layers if name in int8_layers or _parent(name) in set(int8_layers) - layers}
    parameters = in_onnx.parameter_count if in_onnx else sum(parameter.numel() for parameter in model.parameters())
    return Cost(
        parameters=parameters,
        macs={size: total for size, (total, _) in counts.items()},
        conv_linear_macs={size: sum(by_layer.values()) for size, (_, by_layer) in counts.items()},
        int8_macs={
            size: sum(macs for names, macs in by_layer.items() if int8 & set(names))
            for size, (_, by_layer) in counts.items()
        },
        counted_by=ONNX_SHAPES if in_onnx else FLOP_COUNTER,
    )


def _with_functions_as_layers(model: nn.Module, shape: Shape, int8_layers: Sequence[str]) -> nn.Module:
    """`model`, or the same computation rebuilt from layers, where some of its int8 layers are functions in a `forward`
    and no modules."""
    modules = dict(model.named_modules())
    known = (isinstance(modules.get(name.removesuffix(f".{IN_PROJECTION}")), LAYERS) for name in int8_layers)
    if all(known):
        return model
    try:
        return as_layers(model, torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    except Exception:  # whatever torch.export raises: those functions then belong to no layer
        return model


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def layer_table(model: nn.Module, shape: Shape) -> str:
    """torchinfo's table of the layers for one image: output shapes and parameters.

    Its MACs are left out: of a Linear layer on tokens it counts one token.
    """
    if hasattr(model, "onnx_layers"):
        in_onnx: Any = model
        return str(in_onnx.layer_table())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchinfo 1.8 reads a tensor's typed storage, which torch wants to drop
        summary = torchinfo.summary(
            model, input_size=(1, *shape), verbose=0, device="cpu", mode="eval", depth=8,
            col_names=("input_size", "output_size", "kernel_size", "num_params"), row_settings=("var_names",),
        )  # fmt: skip
    return "\n".join(line for line in str(summary).splitlines() if not line.startswith("Total mult-adds"))


Names = tuple[str, ...]  # of one layer; several where it is registered, or its weights are used, under several names
Count = tuple[int, dict[Names, int]]  # MACs of one forward pass: all, and those of each layer with weights
FEW = (1, 2, 3)  # images


def _counts(count: Callable[[int], Count], batch_sizes: tuple[int, ...]) -> dict[int, Count]:
    """By batch size, of which `count` counts one. What grows by the same with the second image as with the third is
    not counted at larger ones: with 128 images of 224 px each count would take many seconds."""
    if sum(batch_sizes) <= sum(FEW):
        return {size: count(size) for size in batch_sizes}
    (one, by_one), (two, by_two), (three, by_three) = map(count, FEW)
    same_names = by_one.keys() == by_two.keys() == by_three.keys()
    if (
        three - two != two - one
        or not same_names
        or any(by_three[names] - by_two[names] != by_two[names] - by_one[names] for names in by_one)
    ):
        return {size: count(size) for size in batch_sizes}
    return {
        size: (
            one + (size - 1) * (two - one),
            {names: by_one[names] + (size - 1) * (by_two[names] - by_one[names]) for names in by_one},
        )
        for size in batch_sizes
    }


def _onnx_count(network: Any, size: int, shape: Shape) -> Count:
    """Of an `OnnxNetwork` (models/onnx_input.py), which has one size of images."""
    by_layer: dict[Names, int] = {}
    products = network.product_macs(size)
    for _, layer, macs, _ in products:
        if layer:
            by_layer[layer,] = by_layer.get((layer,), 0) + macs
    return sum(macs for _, _, macs, _ in products), by_layer


def _module_count(model: nn.Module, size: int, shape: Shape) -> Count:
    return _count(model, torch.zeros(size, *shape))


def _count(model: nn.Module, images: Tensor) -> Count:
    """MACs of one forward pass: all, and those of each layer with weights."""
    was_training = [module for module in model.modules() if module.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # Of fused attention on a CPU, the counter has no formula: it is computed as the products that it consists of.
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=MATRIX_VECTOR) as counter,
            _LayerCounter(model, counter) as layers,
        ):
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in was_training:
            module.training = True
    return counter.get_total_flops() // 2, {names: flops // 2 for names, flops in layers.flops.items()}


class _LayerCounter(TorchDispatchMode):
    """Splits what `counter`, entered before, counts by the layers of `model`: `flops`.

    A product belongs to the Conv2d or Linear in whose forward it is computed, whatever it computes its weights from;
    else to the layer that owns one of its operands, since modules like nn.MultiheadAttention use the weights of layers
    that they never call; else to none.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.flops: dict[Names, int] = {}
        self._counter = counter
        self._entered: list[Names] = []  # the layers whose forward runs, the innermost last
        self._owners: dict[int, Names] = {}  # by the address of the weights' memory, which transposed views share
        self._layers: dict[nn.Module, Names] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                self._layers[module] = (*self._layers.get(module, ()), name)
                self._own(name, module.weight)
            elif isinstance(module, nn.MultiheadAttention):
                for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                    self._own(f"{name}.{IN_PROJECTION}", getattr(module, part))

    def _own(self, name: str, weight: Tensor | None) -> None:
        if weight is not None:
            address = weight.untyped_storage().data_ptr()
            self._owners[address] = (*self._owners.get(address, ()), name)

    def __enter__(self) -> Self:
        self._hooks = ExitStack()
        for module, names in self._layers.items():
            enter = module.register_forward_pre_hook(lambda *_, names=names: self._entered.append(names))
            leave = module.register_forward_hook(lambda *_: self._leave())
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)
        return super().__enter__()

    def _leave(self) -> None:
        self._entered.pop()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if flops := self._counter.get_total_flops() - before:
            if names := self._entered[-1] if self._entered else self._owner((args, kwargs)):
                self.flops[names] = self.flops.get(names, 0) + flops
        return result

    def _owner(self, operands: Any) -> Names:
        tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)]
        found = (self._owners.get(tensor.untyped_storage().data_ptr()) for tensor in tensors)
        return next(filter(None, found), ())


def _percent(part: dict[int, int], whole: dict[int, int]) -> float:
    return 100 * sum(part.values()) / max(1, sum(whole.values()))
