"""Models with operations that no engine, or not every one, has int8 kernels for: nothing stays fp32 without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import StageError
from qexp.measurement.accuracy import to_float
from qexp.quantization import QuantizedModel, quantize_model

ENGINES = ("fx", "pt2e", "onnx")


class _Odd(nn.Module):
    """A convolution, `body`, a linear layer."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **more: Any) -> None:
        super().__init__()
        self.body = body
        self.conv, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.weights = nn.Parameter(torch.randn(16, 16) * 0.3)
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(self, self.conv(images).relu()).flatten(1)[:, :16])


class _OwnConv(nn.Conv2d):
    """The same by another name."""


class _OwnLinear(nn.Linear):
    """One that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _quantize(model: nn.Module, images: Tensor, engine: str) -> QuantizedModel:
    return quantize_model(model.eval(), images, QuantizeConfig(engine=engine, observer="minmax"), False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("body", "more"),
    [
        (lambda net, values: net.odd(values), lambda: nn.ConvTranspose2d(16, 16, 2, 2)),
        (lambda net, values: net.odd(values.flatten(2).transpose(1, 2))[0][:, -1], lambda: nn.LSTM(16, 16)),
    ],
    ids=["transposed convolution", "lstm"],
)
def test_what_has_no_int8_kernel_is_named(engine: str, body: Any, more: Any, images: Tensor) -> None:
    with pytest.raises(StageError, match=rf"engine {engine}.*(not quantized: odd stayed fp32|cannot quantize)"):
        _quantize(_Odd(body, odd=more()), images, engine)


@pytest.mark.parametrize("engine", ["fx", "pt2e"])
@pytest.mark.parametrize(
    "body",
    [
        lambda net, values: values.mean((2, 3)).matmul(net.weights),
        lambda net, values: values.mean((2, 3)) @ net.weights.t(),
        lambda net, values: torch.tensordot(values.mean((2, 3)), net.weights, 1),
        lambda net, values: net.odd(values.mean((2, 3)), values.mean((2, 3))),
    ],
    ids=["method", "transposed", "function", "bilinear"],
)
def test_products_with_weights_outside_of_layers_are_named(engine: str, body: Any, images: Tensor) -> None:
    with pytest.raises(StageError, match=f"engine {engine}: not quantized: .* stayed fp32"):
        _quantize(_Odd(body, odd=nn.Bilinear(16, 16, 16)), images, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_of_own_classes_are_the_layers_that_they_are(engine: str, images: Tensor) -> None:
    model = _Odd(lambda net, values: net.odd(values).mean((2, 3)), odd=_OwnConv(16, 16, 1))
    made = _quantize(model, images, engine)
    assert set(made.result.int8_layers) == {"conv", "odd", "last"} and type(model.odd) is _OwnConv
    with torch.no_grad():
        fp32, int8 = model(to_float(images)), made.module(to_float(images))
    assert (fp32 - int8).square().mean() < 0.01 * fp32.var()


def test_a_layer_that_computes_something_else_stays_what_it_is(images: Tensor) -> None:
    model = _Odd(lambda net, values: net.odd(values.mean((2, 3))), odd=_OwnLinear(16, 16))
    with torch.no_grad():
        expected = model.eval()(to_float(images))
        for engine in ("pt2e", "onnx"):
            int8 = _quantize(model, images, engine).module(to_float(images))
            assert (expected - int8).square().mean() < 0.01 * expected.var()


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_of_a_plain_sequence_are_found(engine: str, images: Tensor) -> None:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), *pool, nn.Linear(16, 10))
    assert set(_quantize(model, images, engine).result.int8_layers) == {"0", "2", "5"}


def test_a_model_that_takes_one_batch_size_alone_is_refused(images: Tensor) -> None:
    model = _Odd(lambda net, values: net.odd(values).mean((2, 3)), odd=nn.GroupNorm(4, 16))
    with pytest.raises(StageError, match=r"pt2e.*does not take a batch of 1 \(RuntimeError: "):
        _quantize(model, images, "pt2e")
    assert _quantize(model, images, "fx").module(to_float(images[:1])).shape == (1, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reason_is_in_the_error_in_one_plain_line(engine: str, images: Tensor) -> None:
    with pytest.raises(StageError) as refused:
        _quantize(_Odd(lambda net, values: values if values.sum() > 0 else -values), images, engine)
    said = str(refused.value)
    assert "control flow" in said or "ata-dependent" in said
    assert "test_odd_models.py" in said and "\n" not in said and "\x1b" not in said


def test_weights_that_cannot_be_copied(images: Tensor) -> None:
    model = _Odd(lambda net, values: values.mean((2, 3)) * net.product)
    model.product = model.weights[0] * 2  # no parameter, as those of torch's old weight_norm
    with pytest.raises(StageError, match="this model cannot be copied: Only Tensors created explicitly"):
        _quantize(model, images, "fx")
