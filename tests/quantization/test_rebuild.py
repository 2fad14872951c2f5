"""Layers that torch.fx does not find: engine fx rebuilds the network from its exported program, by the same names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.measurement.accuracy import to_float
from qexp.measurement.cost import measure_cost
from qexp.models.exported import as_layers
from qexp.models.program import load_program
from qexp.pipeline.quantize import layer_order
from qexp.quantization import quantize_model
from qexp.quantization.rebuild import calls_functions, with_layers
from qexp.quantization.sensitivity import measure_sensitivity


class Same(nn.Conv2d):
    """Pads as TensorFlow does, by numbers that depend on the size of the map."""

    def forward(self, input: Tensor) -> Tensor:
        size, stride, kernel = input.shape[-1], self.stride[0], self.kernel_size[0]
        more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        if more > 0:
            input = F.pad(input, [more // 2, more - more // 2] * 2)
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and deviation 1, computed anew in each forward."""

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return F.conv2d(input, rows.view_as(self.weight), self.bias, padding=self.padding)


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / 2, self.bias)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = Halved(8, 8)

    def forward(self, maps: Tensor) -> Tensor:
        return self.mixing(maps.mean((2, 3)))[:, :, None, None]


class Functional(nn.Module):
    """A convolution and a linear layer whose weights are in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mixing = nn.Parameter(torch.randn(8, 8, 3, 3) / 8), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.hardswish(F.conv2d(maps, self.weight, padding=1))
        return F.relu(F.linear(maps.mean((2, 3)), self.mixing))[:, :, None, None]


class Shared(nn.Module):
    """One layer called twice, with batch norm after it and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = Same(8, 8, 3), nn.BatchNorm2d(8)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.twice(F.relu6(self.norm(self.twice(maps))))


class Network(nn.Module):
    def __init__(self, between: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = nn.Conv2d(3, 8, 3, padding=1), between(), nn.Linear(8, 5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.between(self.first(images).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _quantized(model: nn.Module, images: Tensor, engine: str = "fx", **options: Any) -> Any:
    made = quantize_model(model, images, QuantizeConfig(engine=[engine], observer="minmax", **options), False)
    with torch.no_grad():
        expected, found = model(to_float(images)), made(to_float(images))
    assert (found - expected).square().sum() < 0.01 * expected.square().sum()
    return made


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "padding in forward": (lambda: nn.Sequential(Same(8, 16, 3, stride=2), nn.SiLU(), Same(16, 8, 1)), ("0", "2")),
    "depthwise": (lambda: nn.Sequential(Same(8, 8, 5, stride=2, groups=8), nn.BatchNorm2d(8), nn.ReLU6()), ("0",)),
    "standardised": (lambda: nn.Sequential(Standardised(8, 8, 3, padding=1)), ("0",)),
    "linear": (Mixed, ("mixing",)),
    "functional": (Functional, ("weight", "mixing")),
    "shared": (Shared, ("twice",)),
    "reflected": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=4)), ("0",)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))), ("0",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NETWORKS)
def test_engine_fx_takes_layers_of_other_classes_and_functions(case: str, images: Tensor) -> None:
    between, names = NETWORKS[case]
    model = Network(between)
    with torch.no_grad():
        before = model(to_float(images))
        made = _quantized(model, images)
        assert torch.equal(model(to_float(images)), before)
    assert set(made.int8_layers) == {"first", *(f"between.{name}".rstrip(".") for name in names), "last"}
    assert not made.float_layers
    assert measure_cost(model, (3, 16, 16), [1], made.int8_layers).int8_percent == 100
    assert calls_functions(model, to_float(images[:2])) == (case == "functional")


def test_functions_are_ranked_and_cannot_be_kept(images: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    model = Network(Functional)
    layers = with_layers(model, to_float(images[:2]), False)
    assert layers is not None
    options = QuantizeConfig(observer="minmax")
    found = measure_sensitivity(layers, images, images, torch.zeros(len(images), dtype=torch.int64), options, False)
    assert {layer.layer for layer in found.layers} == {"first", "between.weight", "between.mixing", "last"}
    assert set(layer_order(model, found)) == {"first", "last"}
    assert "functions in `forward` and no modules, which cannot be kept in fp32" in capfd.readouterr().err


def test_engine_onnx_names_the_module_that_calls_functions(images: Tensor) -> None:
    model = Network(Functional)
    made = _quantized(model, images, "onnx")
    assert made.int8_layers == ("first", "last", "between") and not made.float_layers
    assert measure_cost(model, (3, 16, 16), [1], made.int8_layers).int8_percent == 100


def test_a_rebuilt_layer_stays_fp32_if_asked(images: Tensor) -> None:
    made = _quantized(Network(NETWORKS["padding in forward"][0]), images, keep_fp32=["between.0"])
    assert made.float_layers == ("between.0",) and set(made.int8_layers) == {"first", "between.2", "last"}


class _Expanded(nn.Module):
    """A map beside one of its columns, expanded to as many images, and a convolution that torch.fx does not find."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Same(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.mix(x)) * x[..., :1].expand_as(x)


def test_a_rebuilt_network_expands_to_any_batch(images: Tensor) -> None:
    made = _quantized(Network(_Expanded), images)
    assert not made.float_layers and made.module(to_float(images[:3])).shape[0] == 3


def test_rebuilt_networks_give_the_same_logits(images: Tensor) -> None:
    """Those of other networks, too: `as_layers` compares them itself."""
    for case in ("shared", "functional"):
        model = Network(NETWORKS[case][0])
        rebuilt = as_layers(model, to_float(images[:2]))
        with torch.no_grad():
            assert torch.allclose(rebuilt(to_float(images)), model(to_float(images)), atol=1e-5)


@pytest.mark.parametrize("engine", ["fx", "pt2e", "onnx"])
def test_an_exported_program_is_a_module_of_layers(engine: str, images: Tensor, tmp_path: Path) -> None:
    model, batch = Network(NETWORKS["depthwise"][0]), {0: torch.export.Dim("n", min=1, max=64)}
    program = torch.export.export(model, (torch.rand(4, 3, 16, 16),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = load_program(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.allclose(loaded(to_float(images)), model(to_float(images)), atol=1e-5)
    assert set(_quantized(loaded, images, engine).int8_layers) == {"first", "between.0", "last"}


def test_what_is_no_exported_program_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("<html>")
    with pytest.raises(InputError, match=r"text\.pt2: not an exported program, which torch\.export\.save writes$"):
        load_program(tmp_path / "text.pt2")
