"""Quantization of what is odd but allowed: one calibration image, constant ones, a layer without weights, batch 1."""

import copy
import io

import onnx
import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import to_float
from qexp.models.onnx_file import OnnxClassifier
from qexp.quantization import QuantizedModel, quantize_model
from qexp.quantization.equivalence import sqnr_db

LAYERS = ("0", "3", "6", "9")
ENGINES = ("fx", "pt2e", "onnx")


def _quantize(model: nn.Module, images: Tensor, engine: str, observer: str) -> QuantizedModel:
    return quantize_model(model, images, QuantizeConfig(engine=engine, observer=observer), False)


def _check(made: QuantizedModel, inputs: Tensor) -> Tensor:
    """All layers int8, finite logits that depend neither on the batch nor on being saved; gives the logits."""
    assert made.result.int8_layers == LAYERS and made.result.float_layers == ()
    with torch.no_grad():
        logits = made.module(inputs)
        assert logits.isfinite().all() and logits.shape == (len(inputs), 10)
        assert torch.equal(made.module(inputs[:1]), logits[:1])
        assert torch.equal(_reload(made, inputs), logits)
    return logits


def _reload(made: QuantizedModel, inputs: Tensor) -> Tensor:
    if made.flavor == "onnx":
        return OnnxClassifier(onnx.load_from_string(made.stored.SerializeToString()))(inputs)
    file = io.BytesIO()
    torch.jit.save(made.stored, file)
    file.seek(0)
    return torch.jit.load(file)(inputs)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Three convolutions, one with a batch norm of odd statistics, a pool, a linear layer."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), norm, nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def inputs(digits: Dataset) -> Tensor:
    return to_float(digits.test.images[:7])


@pytest.mark.parametrize("engine", ENGINES)
def test_one_calibration_image(model: nn.Module, digits: Dataset, inputs: Tensor, engine: str) -> None:
    """With other observers: test_quantization.py."""
    logits = _check(_quantize(model, digits.train.images[:1], engine, "histogram"), inputs)
    with torch.no_grad():
        assert sqnr_db(model(inputs), logits) > 2  # what lies outside of the range of one image is cut off


@pytest.mark.parametrize("engine", ["pt2e", "onnx"])  # fx: test_quantization.py
@pytest.mark.parametrize(("value", "observer"), [(0, "histogram"), (255, "minmax")])
def test_constant_calibration_images(
    model: nn.Module, digits: Dataset, inputs: Tensor, engine: str, value: int, observer: str
) -> None:
    _check(_quantize(model, torch.full_like(digits.train.images[:3], value), engine, observer), inputs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("places", "observer"), [((3,), "histogram"), ((3, 4, 9), "batch_average")])
def test_dead_layers(
    model: nn.Module, digits: Dataset, inputs: Tensor, engine: str, places: tuple[int, ...], observer: str
) -> None:
    """A convolution without weights, alone; with its batch norm and the last layer, too, all logits are zero."""
    dead = copy.deepcopy(model)
    for place in places:
        for parameter in dead.get_submodule(str(place)).parameters():
            nn.init.zeros_(parameter)
    logits = _check(_quantize(dead, digits.train.images[:8], engine, observer), inputs)
    with torch.no_grad():
        expected = dead(inputs)
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_one_image_and_calibration_one_by_one(
    model: nn.Module, digits: Dataset, inputs: Tensor, engine: str
) -> None:
    options = QuantizeConfig(engine=engine, observer="batch_average", calibration_batch_size=1)
    _check(quantize_model(model, digits.train.images[:5], options, False), inputs[:1])
