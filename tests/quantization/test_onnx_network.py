"""An ONNX file as the fp32 model: engine onnx quantizes its graph, the others say that they need a module."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.measurement.accuracy import to_float
from qexp.measurement.cost import layer_table, measure_cost
from qexp.models.onnx_file import export
from qexp.models.onnx_input import OnnxNetwork, read_onnx
from qexp.models.preprocessing import Preprocessing
from qexp.quantization import quantize_model
from qexp.quantization.equivalence import sqnr_db
from qexp.quantization.sensitivity import measure_sensitivity

LAYERS = ("first", "depthwise", "last")


class WrittenOut(nn.Module):
    """A hard-swish made of Add, Clip, Mul and Div, as Paddle writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x + 3).clamp(0, 6) / 6


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.swish = nn.Conv2d(3, 8, 3, stride=2, padding=1), WrittenOut()
        self.norm, self.depthwise = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.depthwise(self.swish(self.norm(self.first(images))))
        return self.last(maps.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Of very different brightness, so that the logits tell them apart."""
    generator = torch.Generator().manual_seed(0)
    dark = torch.linspace(0.1, 1, 32).view(-1, 1, 1, 1)
    return (torch.rand(32, 3, 12, 16, generator=generator) * dark * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> OnnxNetwork:
    file = tmp_path_factory.mktemp("files") / "network.onnx"
    export(Network().eval(), torch.rand(2, 3, 12, 16), file)
    return read_onnx(file, Preprocessing(12, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))


def _options(**more: object) -> QuantizeConfig:
    return QuantizeConfig(engine=["onnx"], observer="minmax", **more)


def test_the_graph_itself_is_quantized(network: OnnxNetwork, images: Tensor) -> None:
    made = quantize_model(network, images, _options(), reduce_range=False)
    fp32, int8 = network(to_float(images)), made(to_float(images))
    with torch.no_grad():
        expected = Network().eval()((to_float(images) - 0.5) / 0.25)
    assert torch.allclose(fp32, expected, atol=1e-4)
    assert sqnr_db(fp32, int8) > 20
    assert made.source is network and set(made.int8_layers) == set(LAYERS) and not made.float_layers


def test_of_a_constant_that_nothing_uses_nobody_is_warned(
    network: OnnxNetwork, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = copy.copy(network)
    copied.canonical = copy.deepcopy(network.canonical)
    copied.canonical.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "unused"))
    made = quantize_model(copied, images, _options(), reduce_range=False)
    assert set(made.int8_layers) == set(LAYERS) and "unused" not in capfd.readouterr().err


def test_layers_stay_fp32_by_the_names_of_their_weights(network: OnnxNetwork, images: Tensor) -> None:
    assert set(network.onnx_layers) == set(LAYERS)
    result = quantize_model(network, images, _options(keep_fp32=["depthwise"]), reduce_range=False).result
    assert result.float_layers == ("depthwise",) and set(result.int8_layers) == {"first", "last"}
    with pytest.raises(InputError, match=r"--keep-fp32 second: not among the layers first, depthwise, last"):
        quantize_model(network, images, _options(keep_fp32=["second"]), reduce_range=False)


def test_what_needs_a_module_says_so(network: OnnxNetwork, images: Tensor) -> None:
    for engine in ("fx", "pt2e"):
        with pytest.raises(
            InputError, match=rf"engine {engine}: needs a PyTorch module, and .*network\.onnx is an ONNX"
        ):
            quantize_model(network, images, QuantizeConfig(engine=[engine]), reduce_range=False)
    with pytest.raises(InputError, match="the layers of an ONNX file cannot be tried one by one"):
        measure_sensitivity(network, images, images, torch.zeros(32, dtype=torch.long), _options(), False)


def test_cost_is_that_of_the_module_that_was_exported(network: OnnxNetwork) -> None:
    found = measure_cost(network, (3, 12, 16), [1, 64], ["first", "last"])
    same = measure_cost(Network().eval(), (3, 12, 16), [1, 64], ["first", "last"])
    first, depthwise, last = 6 * 8 * 8 * 27, 4 * 6 * 8 * 9, 8 * 5
    assert found.macs == same.macs == {1: first + depthwise + last, 64: 64 * (first + depthwise + last)}
    assert found.int8_macs == same.int8_macs == {1: first + last, 64: 64 * (first + last)}
    assert found.conv_linear_macs == found.macs
    assert found.parameters == same.parameters - 16  # the exporter has folded the batch norm
    assert [line.split()[0] for line in layer_table(network, (3, 12, 16)).splitlines()] == ["layer", *LAYERS]


def test_the_text_direction_classifier_of_paddle() -> None:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    (file,) = Path(*package.submodule_search_locations or ()).glob("models/*cls*.onnx")
    network = read_onnx(file, Preprocessing(48, 192, mean=(0.5,) * 3, std=(0.5,) * 3))
    images = (torch.rand(16, 3, 48, 192, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    made = quantize_model(network, images, _options(), reduce_range=False)
    assert (network.classes, len(made.int8_layers), made.float_layers) == (2, 54, ())
