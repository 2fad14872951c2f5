"""Training in bf16: kernel taps that see only padding get no gradient from oneDNN, and another one from memory."""

import pytest
import torch
from forked import run_apart
from torch import Tensor, nn

from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.training.bf16 import convolutions_that_see_padding, has_unused_tap, padding_seen_in_fp32

IMAGES = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _build(name: str, size: int = 16) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ModelSpec(name, tuple("abcdefghij"), squashed(size)), IMAGES)


@pytest.mark.parametrize(
    ("size", "positions", "kernel", "stride", "padding", "dilation", "unused"),
    [
        (1, 1, 3, 2, 1, 1, True),  # resnet18's last stage at 16 px: the tap in the middle alone sees the map
        (1, 1, 3, 1, 1, 1, True),
        (1, 1, 1, 2, 0, 1, False),
        (2, 1, 3, 2, 1, 1, True),  # taps at -1, 0 and 1
        (2, 2, 3, 1, 1, 1, False),
        (3, 2, 3, 2, 1, 1, False),  # -1, 0, 1 and 1, 2, 3
        (2, 2, 5, 1, 2, 1, True),
        (2, 2, 3, 1, 2, 2, True),
    ],
)
def test_taps_that_see_only_padding(
    size: int, positions: int, kernel: int, stride: int, padding: int, dilation: int, unused: bool
) -> None:
    assert has_unused_tap(size, positions, kernel, stride, padding, dilation) is unused
    # The same by torch: the gradient of such a tap is 0, that of no other.
    layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation, bias=False)
    result = layer(torch.ones(1, 1, size))
    assert result.shape[2] == positions
    result.sum().backward()
    assert bool((layer.weight.grad == 0).any()) is unused  # type: ignore[union-attr]


def test_networks_with_large_maps_have_none() -> None:
    assert convolutions_that_see_padding(_build("smallnet")) == []
    assert convolutions_that_see_padding(_build("smallnet", 32)) == []
    model = _build("resnet18")
    names = {module: name for name, module in model.named_modules()}
    found = [names[module] for module in convolutions_that_see_padding(model)]
    assert "network.layer4.0.conv1" in found and "network.conv1" not in found
    assert not any("downsample" in name for name in found)


def _leave_in_memory(value: float) -> None:
    """What the next tensors without values are likely to find there."""
    blocks = [torch.full((512 * 256 * 9,), value) for _ in range(6)]
    del blocks


def check_the_same_step() -> None:
    model = _build("resnet18").train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: list[Tensor] = []
    with padding_seen_in_fp32(model, True):
        for value in (float("nan"), 7.0, -1e30):
            model.zero_grad()
            _leave_in_memory(value)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(IMAGES.float() / 255).float().logsumexp(1).mean()
            loss.backward()
            found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
    assert torch.isfinite(found[0]).all() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert "forward" not in vars(model.network.get_submodule("layer4.0.conv1"))  # type: ignore[union-attr]


def test_the_same_step_gives_the_same_gradient_whatever_was_in_memory() -> None:
    """Apart, since it is about what a process has in memory."""
    run_apart(check_the_same_step)
