"""Quantization of what is odd but allowed: one calibration image, constant ones, a layer without weights, batch 1."""

import io

import onnx
import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier, build_classifier
from qexp.models.onnx_file import OnnxClassifier
from qexp.quantization import QuantizedModel, quantize_model
from qexp.training.train import TrainResult

LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))
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
def model(trained: tuple[Classifier, TrainResult]) -> Classifier:
    return trained[0]


@pytest.fixture(scope="module")
def inputs(digits: Dataset) -> Tensor:
    return to_float(digits.test.images[:7])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("observer", ["histogram", "percentile"])
def test_one_calibration_image(model: Classifier, digits: Dataset, inputs: Tensor, engine: str, observer: str) -> None:
    logits = _check(_quantize(model, digits.train.images[:1], engine, observer), inputs)
    with torch.no_grad():
        assert (logits.argmax(1) == model(inputs).argmax(1)).double().mean() > 0.5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("value", "observer"), [(0, "histogram"), (0, "percentile"), (255, "minmax")])
def test_constant_calibration_images(
    model: Classifier, digits: Dataset, inputs: Tensor, engine: str, value: int, observer: str
) -> None:
    _check(_quantize(model, torch.full_like(digits.train.images[:3], value), engine, observer), inputs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("places", "observer"), [((10,), "histogram"), ((10, 11, 22), "batch_average")])
def test_dead_layers(
    model: Classifier, digits: Dataset, inputs: Tensor, engine: str, places: tuple[int, ...], observer: str
) -> None:
    """A convolution without weights, alone; with its batch norm and the last layer, too, all logits are zero."""
    dead = build_classifier(model.spec, digits.train.images)
    dead.load_state_dict(model.state_dict())
    for place in places:
        for parameter in dead.network.get_submodule(str(place)).parameters():
            nn.init.zeros_(parameter)
    logits = _check(_quantize(dead.eval(), digits.train.images[:8], engine, observer), inputs)
    with torch.no_grad():
        expected = dead(inputs)
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_one_image_and_calibration_one_by_one(
    model: Classifier, digits: Dataset, inputs: Tensor, engine: str
) -> None:
    options = QuantizeConfig(engine=engine, observer="batch_average", calibration_batch_size=1)
    _check(quantize_model(model, digits.train.images[:5], options, False), inputs[:1])
