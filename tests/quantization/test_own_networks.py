"""Networks as people write them: forward hooks, layers that are never called or called twice, tied weights, paddings by
name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.measurement.accuracy import to_float
from qexp.quantization import QuantizedModel, quantize_model
from qexp.quantization.equivalence import sqnr_db

ENGINES = ("fx", "pt2e", "onnx")


class Network(nn.Module):
    """Three layers; `between` comes after the first one."""

    def __init__(self, between: nn.Module, padding: Any = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=padding)
        self.between = between
        self.last = nn.Linear(8, 5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.between(self.first(images).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """The error of 8 bits is below a hundredth of the signal's power; what computes something else is far above it."""
    return bool((found - expected).square().sum() < 0.01 * expected.square().sum())


def _quantized(model: nn.Module, images: Tensor, engine: str) -> QuantizedModel:
    """The int8 model, whose reloaded logits are near those of fp32."""
    quantized = quantize_model(model, images, QuantizeConfig(engine=[engine], observer="minmax"), reduce_range=False)
    with torch.no_grad():
        expected = model(to_float(images))
        assert torch.allclose(quantized.source(to_float(images)), expected, atol=1e-5)
        assert _is_near(quantized.module(to_float(images)), expected)
        assert _is_near(quantized.reloaded()(to_float(images)), expected)
    return quantized


def _hooked(changes: bool) -> Network:
    network = Network(nn.Identity())
    network.first.register_forward_hook(lambda layer, given, output: 1 - 2 * output if changes else None)
    return network


@pytest.mark.parametrize("engine", ["fx", "onnx"])
def test_hooks_that_change_logits_are_kept(images: Tensor, engine: str) -> None:
    assert _quantized(_hooked(True), images, engine).result.int8_layers == ("first", "last")


def test_hooks_that_only_watch_are_no_matter(images: Tensor) -> None:
    assert _quantized(_hooked(False), images, "fx").result.int8_layers == ("first", "last")


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_that_forward_never_calls_are_in_no_list(images: Tensor, engine: str) -> None:
    network = Network(nn.Identity())
    network.spare = nn.Linear(8, 5)
    before = network.spare.weight.clone()
    found = _quantized(network, images, engine).result
    assert found.int8_layers == ("first", "last") and found.float_layers == ()
    assert torch.equal(network.spare.weight, before)


def test_a_network_in_training_keeps_its_statistics(images: Tensor) -> None:
    """Though it is run, to see which layers it uses."""
    network = Network(nn.BatchNorm2d(8))
    network.spare = nn.Linear(8, 5)
    before = {name: value.clone() for name, value in network.train().state_dict().items()}
    found = quantize_model(network, images, QuantizeConfig(observer="minmax"), reduce_range=False)
    assert found.int8_layers == ("first", "last") and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_two_layers_with_tied_weights_are_both_int8(images: Tensor, engine: str) -> None:
    one, other = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    other.weight = one.weight
    found = _quantized(Network(nn.Sequential(one, nn.ReLU(), other)), images, engine).result
    assert found.int8_layers == ("first", "between.0", "between.2", "last") and found.float_layers == ()


class _Twice(nn.Module):
    """A convolution and an activation, called for small and for large numbers, or two of each with equal weights."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        for layer in (self.first, self.shared, self.last):
            nn.init.kaiming_normal_(layer.weight)  # so that the logits depend on the image
        self.act = nn.Hardswish()
        self.again, self.act_again = self.shared, self.act
        if modules == 2:
            self.again, self.act_again = copy.deepcopy(self.shared), copy.deepcopy(self.act)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.shared(self.act(self.first(images))))
        return self.last(self.act_again(self.again(8 * maps)).mean((2, 3)))


def test_what_is_called_twice_has_the_range_of_each_call(images: Tensor) -> None:
    """In engine fx, whose int8 modules have one; the others have no modules."""
    images = (images * torch.linspace(0.1, 1, 32).view(-1, 1, 1, 1)).byte()  # of different brightness
    options, inputs = QuantizeConfig(engine=["fx"], observer="minmax"), to_float(images)
    once, twice = (quantize_model(_Twice(modules), images, options, reduce_range=False) for modules in (2, 1))
    assert twice.int8_layers == ("first", "shared", "last") and not twice.float_layers
    with torch.no_grad():
        expected = _Twice(1)(inputs)
        found, apart = (sqnr_db(expected, one.reloaded()(inputs)) for one in (twice, once))
    assert found > apart - 1 > 15
    kept = quantize_model(_Twice(1), images, options.model_copy(update={"keep_fp32": ["shared"]}), reduce_range=False)
    assert kept.int8_layers == ("first", "last") and kept.float_layers == ("shared",)


@pytest.mark.parametrize(("padding", "engine"), [*(("same", engine) for engine in ENGINES), ("valid", "fx")])
def test_paddings_by_name(images: Tensor, engine: str, padding: str) -> None:
    assert _quantized(Network(nn.Identity(), padding), images, engine).result.int8_layers == ("first", "last")


@pytest.mark.parametrize("engine", ENGINES)
def test_prelu_with_a_weight_a_channel(images: Tensor, engine: str) -> None:
    steps = nn.Sequential(nn.Conv2d(8, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        steps[1].weight.uniform_(-1, 1)  # type: ignore[union-attr,operator]
    found = _quantized(Network(steps), images, engine).result
    assert found.int8_layers == ("first", "between.0", "between.2", "last")


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.along(maps.flatten(2))[..., None].relu()


def test_a_convolution_along_one_axis_reloads(images: Tensor) -> None:
    """The file is loaded and compared before it counts."""
    for engine in ("fx", "onnx"):
        _quantized(Network(Rows()), images, engine)
    options = QuantizeConfig(engine=["pt2e"], allow_float=True)
    model = Network(Rows())
    quantized = quantize_model(model, images, options, reduce_range=False)
    with torch.no_grad():
        assert _is_near(quantized.reloaded()(to_float(images)), model(to_float(images)))
