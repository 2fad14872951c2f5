"""A work-around for oneDNN in bf16 training on a CPU: gradients of kernel taps that see only padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qexp.models.classifier import Classifier


@contextmanager
def padding_seen_in_fp32(model: Classifier, enabled: bool) -> Iterator[None]:
    """Within the block, convolutions with kernel taps that see nothing but padding compute in fp32 under autocast.

    A 3x3 kernel on a map of 1x1 has eight such taps; their gradient is 0. oneDNN (as of torch 2.13) does not write it
    for a bf16 convolution with a stride of 2: it is what was in memory before, another at every run, and at times no
    finite number. The last stage of resnet18 at 16 px is such a place.

    Args:
        enabled: nothing is done otherwise.
    """
    changed = convolutions_that_see_padding(model) if enabled else []
    for convolution in changed:
        convolution.forward = partial(_in_fp32, convolution)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for convolution in changed:
            del convolution.forward


def _in_fp32(convolution: nn.Conv2d, values: Tensor) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return type(convolution).forward(convolution, values.float())


def convolutions_that_see_padding(model: Classifier) -> list[nn.Conv2d]:
    """The convolutions with taps that lie outside the map at every position, at the size of the model's images."""
    found: list[nn.Conv2d] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        sizes = zip(inputs[0].shape[2:], output.shape[2:], _geometry(module), strict=True)
        if module not in found and any(
            has_unused_tap(size, positions, *geometry) for size, positions, geometry in sizes
        ):
            found.append(module)

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    was_training, weight = model.training, next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *model.spec.shape, device=weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _geometry(convolution: nn.Conv2d) -> list[tuple[int, int, int, int]]:
    """Kernel size, stride, padding before the map and dilation, for height and width."""
    before = convolution._reversed_padding_repeated_twice  # of width, then of height: before and after
    padding = before[2], before[0]
    return list(zip(convolution.kernel_size, convolution.stride, padding, convolution.dilation, strict=True))


def has_unused_tap(size: int, positions: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether a tap of the kernel is outside a map of `size` at each of its positions, along one axis."""
    return any(
        all(not 0 <= position * stride - padding + tap * dilation < size for position in range(positions))
        for tap in range(kernel)
    )
