"""Quantization with PT2E: int8 kernels in a module that any process can load, equal bits after that, any batch size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.errors import StageError
from qexp.measurement.accuracy import predict_logits, to_float
from qexp.models.classifier import Classifier
from qexp.quantization import QuantizedModel, quantize_model
from qexp.training.train import TrainResult

LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))
CLEAN = """
import sys, torch
module = torch.jit.load(sys.argv[1])
images, logits = torch.load(sys.argv[2])
print(torch.equal(module(images), logits), any(name.startswith(("qexp", "torchao")) for name in sys.modules))
"""


def _quantize(model: nn.Module, images: Tensor, reduce_range: bool = False, **options: object) -> QuantizedModel:
    return quantize_model(model, images, QuantizeConfig(engine="pt2e", **options), reduce_range)


@pytest.fixture(scope="module")
def model(trained: tuple[Classifier, TrainResult]) -> Classifier:
    return trained[0]


@pytest.fixture(scope="module")
def int8(model: Classifier, digits: Dataset) -> QuantizedModel:
    return _quantize(model, digits.train.images[:32])


def _kernels(module: torch.jit.ScriptModule) -> list[str]:
    return [node.kind() for node in module.inlined_graph.findAllNodes("onednn::qconv_pointwise")] + [
        node.kind() for node in module.inlined_graph.findAllNodes("onednn::qlinear_pointwise")
    ]


def test_every_convolution_and_linear_layer_runs_an_int8_kernel(int8: QuantizedModel) -> None:
    assert int8.result.engine == "pt2e" and int8.result.int8_layers == LAYERS and int8.result.float_layers == ()
    called = [name for name, _ in int8.module.named_children() if name.startswith("int8_")]
    assert len(called) == len(LAYERS)
    kinds = {node.kind() for node in int8.module.graph.nodes()}
    assert not {"aten::conv2d", "aten::_convolution", "aten::linear", "aten::addmm", "aten::batch_norm"} & kinds
    assert "quantized::max_pool2d" in kinds  # pools take integers as they are


def test_int8_answers_like_fp32(int8: QuantizedModel, model: Classifier, digits: Dataset) -> None:
    fp32, quantized = predict_logits(model, digits.test.images), predict_logits(int8.module, digits.test.images)
    assert (fp32.argmax(1) == quantized.argmax(1)).double().mean() > 0.95
    assert not torch.equal(fp32, quantized)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_logits_do_not_depend_on_the_batch(int8: QuantizedModel, digits: Dataset, batch_size: int) -> None:
    inputs = to_float(digits.test.images[:7])
    with torch.no_grad():
        assert torch.equal(int8.module(inputs[:batch_size]), int8.module(inputs)[:batch_size])


def test_file_is_small_and_loads_bit_for_bit_in_a_clean_subprocess(
    int8: QuantizedModel, digits: Dataset, tmp_path: Path
) -> None:
    images = to_float(digits.test.images[:5])
    with torch.no_grad():
        torch.save((images, int8.module(images)), tmp_path / "logits.pt")
    torch.jit.save(int8.module, str(tmp_path / "int8.pt"))
    assert (tmp_path / "int8.pt").stat().st_size < 0.3 * 4 * 427_178
    command = [sys.executable, "-W", "ignore", "-c", CLEAN, str(tmp_path / "int8.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
    again = tmp_path / "again.pt"
    torch.jit.save(torch.jit.load(str(tmp_path / "int8.pt")), str(again))
    with torch.no_grad():
        assert torch.equal(torch.jit.load(str(again))(images), int8.module(images))


def test_what_cannot_be_exported_is_said() -> None:
    class Branches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(StageError, match=r"engine pt2e cannot quantize .* \(at test_pt2e.py:\d+: .*images.sum\(\) > 0"):
        _quantize(Branches(), images)


def test_an_fp32_layer_may_feed_a_sum() -> None:
    """The first layer of a ResNet gives the first block what it adds to its output."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            found = self.first(images)
            return self.last(torch.relu(self.second(found) + found).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        int8 = _quantize(model, images, keep_fp32=["first"])
        expected, found = model(to_float(images)), int8.module(to_float(images))
    assert int8.result.float_layers == ("first",) and int8.result.int8_layers == ("second", "last")
    assert (expected - found).square().mean() / expected.var() < 10**-1.5  # 15 dB
