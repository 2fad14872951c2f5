"""int8 layers with weights in the layout of oneDNN's kernels, as TorchScript: saved as plain int8, packed at load.

A packed weight is an opaque tensor that no file format of torch takes. TorchScript calls `__getstate__` and
`__setstate__` of a script module when it saves and loads it, in any process, whether or not that knows this package.
"""

from typing import Any, List, Optional, Union  # noqa: UP035

import torch
from torch import Tensor

SCALAR_TYPES = {torch.uint8: 0, torch.int8: 1, torch.float32: 6, torch.bfloat16: 15}  # c10's numbers, for TorchScript


# Plain tuples, since TorchScript saves nothing else in a state.
# Input scale and zero point; weight scales and zero points, one an output channel; fp32 bias.
Factors = tuple[float, int, Tensor, Tensor, Tensor | None]
# Stride, padding, dilation, groups of a convolution, and the shape of its input: oneDNN chooses the layout of the
# weights by it. At another height or width it converts them at each call, and the results are the same.
Geometry = tuple[list[int], list[int], list[int], int, list[int]]
# Scale, zero point and type of the result; operation ("none", "sum", …), scale and zero point of what is added; then
# the operation after it ("none", "relu", …), its numbers and its variant.
Output = tuple[float, int, int, str, float, int, str, list[float | None], str]


class PackedConv(torch.jit.ScriptModule):
    """Integers [N, C, H, W] to integers or floats; `weight` is int8 [out, in / groups, kernel]."""

    def __init__(self, weight: Tensor, factors: Factors, geometry: Geometry, output: Output) -> None:
        super().__init__()
        self.factors: Any = torch.jit.Attribute(factors, Factors)
        self.geometry: Any = torch.jit.Attribute(geometry, Geometry)
        self.output: Any = torch.jit.Attribute(output, Output)
        self.weight = torch.ops.onednn.qconv_prepack(weight, factors[2], factors[0], factors[1], *geometry)

    @torch.jit.script_method
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x_scale, x_zero, w_scale, w_zero, bias = self.factors
        stride, padding, dilation, groups, _ = self.geometry
        scale, zero, dtype, other_op, other_scale, other_zero, post, values, variant = self.output
        scalars = torch.jit.annotate(List[Optional[Union[int, float, complex]]], [])  # noqa: UP006, UP007, UP045
        for value in values:
            scalars.append(value)
        if other is not None:
            return torch.ops.onednn.qconv2d_pointwise(
                x, x_scale, x_zero, self.weight, w_scale, w_zero, other, bias, stride, padding, dilation, groups,
                scale, zero, dtype, other_scale, other_zero, other_op, 1.0, post, scalars, variant,
            )  # fmt: skip
        return torch.ops.onednn.qconv_pointwise(
            x, x_scale, x_zero, self.weight, w_scale, w_zero, bias, stride, padding, dilation, groups,
            scale, zero, dtype, post, scalars, variant,
        )  # fmt: skip

    @torch.jit.script_method
    def __getstate__(self) -> tuple[Tensor, Factors, Geometry, Output, bool]:
        return self.weight.to_dense(), self.factors, self.geometry, self.output, self.training

    @torch.jit.script_method
    def __setstate__(self, state: tuple[Tensor, Factors, Geometry, Output, bool]) -> None:
        weight, self.factors, self.geometry, self.output, self.training = state
        x_scale, x_zero, w_scale, _, _ = self.factors
        stride, padding, dilation, groups, x_shape = self.geometry
        self.weight = torch.ops.onednn.qconv_prepack(
            weight, w_scale, x_scale, x_zero, stride, padding, dilation, groups, x_shape
        )


class PackedLinear(torch.jit.ScriptModule):
    """Integers [N, in] to integers or floats [N, out]; `weight` is int8 [out, in]."""

    def __init__(self, weight: Tensor, factors: Factors, x_shape: list[int], output: Output) -> None:
        super().__init__()
        self.factors: Any = torch.jit.Attribute(factors, Factors)
        self.x_shape: Any = torch.jit.Attribute(x_shape, list[int])
        self.output: Any = torch.jit.Attribute(output, Output)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, x_shape)

    @torch.jit.script_method
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x_scale, x_zero, w_scale, w_zero, bias = self.factors
        scale, zero, dtype, other_op, other_scale, other_zero, post, values, variant = self.output
        scalars = torch.jit.annotate(List[Optional[Union[int, float, complex]]], [])  # noqa: UP006, UP007, UP045
        for value in values:
            scalars.append(value)
        if other is not None:
            return torch.ops.onednn.qlinear_pointwise(
                x, x_scale, x_zero, self.weight, w_scale, w_zero, other, bias, scale, zero, dtype,
                other_scale, other_zero, other_op, 1.0, post, scalars, variant,
            )  # fmt: skip
        return torch.ops.onednn.qlinear_pointwise(
            x, x_scale, x_zero, self.weight, w_scale, w_zero, bias, scale, zero, dtype, post, scalars, variant
        )

    @torch.jit.script_method
    def __getstate__(self) -> tuple[Tensor, Factors, list[int], Output, bool]:
        return self.weight.to_dense().t().contiguous(), self.factors, self.x_shape, self.output, self.training

    @torch.jit.script_method
    def __setstate__(self, state: tuple[Tensor, Factors, list[int], Output, bool]) -> None:
        weight, self.factors, self.x_shape, self.output, self.training = state
        self.weight = torch.ops.onednn.qlinear_prepack(weight, self.x_shape)


def pack(
    target: Any, arguments: tuple[Any, ...], weight: Tensor, x_shape: list[int]
) -> tuple[torch.jit.ScriptModule, tuple[Any, ...]]:
    """The module that does what a call of oneDNN's operation does, and the graph nodes that it is called with.

    Args:
        target: `torch.ops.onednn.qconv_pointwise.default` and its like.
        arguments: of the operation; graph nodes in place of activations, tensors in place of constants.
        weight: what was packed.
        x_shape: of the activations; the batch of one of them stands for all others.
    """
    x, input_scale, input_zero, _, scale, zero, *rest = arguments
    binary = target._overloadname == "binary"
    other = rest.pop(0) if binary else None
    bias = rest.pop(0)
    convolution = target._schema.name.startswith("onednn::qconv")
    geometry: Any = (*(list(rest.pop(0)) for _ in range(3)), rest.pop(0), x_shape) if convolution else None
    y_scale, y_zero, dtype = (rest.pop(0) for _ in range(3))
    other_scale, other_zero, other_op, alpha = (rest.pop(0) for _ in range(4)) if binary else (1.0, 0, "none", 1.0)
    assert alpha in (1, None)
    post, scalars, algorithm = rest
    output: Output = (
        float(y_scale), int(y_zero), SCALAR_TYPES[dtype], other_op, float(other_scale), int(other_zero),
        post or "none", [None if value is None else float(value) for value in scalars], algorithm or "",
    )  # fmt: skip
    factors = float(input_scale), int(input_zero), scale, zero, bias
    inputs = (x, other) if binary else (x,)
    if geometry:
        return PackedConv(weight, factors, geometry, output), inputs
    return PackedLinear(weight, factors, x_shape, output), inputs
