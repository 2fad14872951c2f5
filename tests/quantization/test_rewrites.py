"""What engines rewrite is still the network: odd skip connections, the check of the kernels, logits in float."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_classifiers import patches
from torch import Tensor, nn
from torch.nn import functional as F

from qexp import quantization
from qexp.config import QuantizeConfig
from qexp.errors import StageError
from qexp.measurement.accuracy import to_float
from qexp.quantization import ENGINES, quantize_model
from qexp.quantization.cleanup import clean
from qexp.quantization.engines import lowering
from qexp.quantization.equivalence import check_kernels, check_sense, sqnr_db
from qexp.quantization.result import QuantizedModel

Forward = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """Four convolutions of eight channels and two heads, put together by a function of the test."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(inputs, 8, 3, 1, 1) for inputs in (3, 8, 8, 8))
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 10, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.head = nn.Linear(8, 10)
        self.function = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self, images)

    def two(self, one: Tensor, other: Tensor) -> Tensor:
        """Logits of two feature maps of eight channels each."""
        return self.last(torch.cat([one, other], 1).mean((2, 3)))


def read_again_after_its_sum(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    return net.two(F.relu(net.b(y) + y), y)


def one_skip_for_two_sums(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    z = F.relu(net.b(y))
    return net.head((F.relu(net.c(z) + y) + F.relu(net.d(z) + y)).mean((2, 3)))


def added_to_in_place(net: Any, images: Tensor) -> Tensor:
    x = F.relu(net.a(images))
    y = net.b(F.relu(net.c(x)))
    y += x
    return net.two(F.relu(y), x)


def activation_in_place(net: Any, images: Tensor) -> Tensor:
    y = net.a(images)
    z = net.b(F.relu(y, inplace=True))
    return net.two(F.relu(z + y), y)


def views_of_a_skip(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    left, right = y.chunk(2, 1)
    z = F.relu(net.b(torch.cat([right, left], 1)) + y)
    return net.two(z, torch.cat([left, right], 1))


def the_input_as_a_skip(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    return net.two(y, net.depthwise(F.hardswish(y)) + y) + images.mean((1, 2, 3))[:, None]


def the_same_layer_again(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    z = F.relu(net.b(y) + y)
    return net.two(F.relu(net.b(z) + z + y), z)


def squeeze_and_excitation(net: Any, images: Tensor) -> Tensor:
    y = F.silu(net.a(images))
    gate = torch.sigmoid(net.excite(F.relu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))))
    return net.two(net.b(y * gate) + y, y)


def linear_layers_that_skip(net: Any, images: Tensor) -> Tensor:
    y = net.first(F.relu(net.a(images)).mean((2, 3)))
    z = net.second(F.relu(y)) + y
    return net.last(F.relu(net.second(z) + z) + y)


def the_sum_is_the_result(net: Any, images: Tensor) -> Tensor:
    y = net.first(F.relu(net.a(images)).mean((2, 3)))
    return torch.cat([net.second(F.relu(y)) + y, y], 1)


def a_factor_in_a_sum(net: Any, images: Tensor) -> Tensor:
    y = F.relu(net.a(images))
    return net.two(torch.add(net.b(F.relu(net.c(y))), y, alpha=2), y)


SKIPS = (
    read_again_after_its_sum, one_skip_for_two_sums, added_to_in_place, activation_in_place, views_of_a_skip,
    the_input_as_a_skip, the_same_layer_again, squeeze_and_excitation, linear_layers_that_skip, the_sum_is_the_result,
    a_factor_in_a_sum,
)  # fmt: skip


def network(forward: Forward) -> Network:
    torch.manual_seed(0)
    return Network(forward).eval()


def some_images() -> tuple[Tensor, Tensor]:
    """For calibration, uint8, and others, float."""
    torch.manual_seed(1)
    return patches(16, 12), to_float(patches(40, 12))


def make(engine: str, model: nn.Module, images: Tensor) -> QuantizedModel:
    source = clean(model, to_float(images[:2]), False)
    return ENGINES[engine](source, images, QuantizeConfig(engine=engine, observer="minmax"), False)


@pytest.mark.parametrize(
    ("forward", "engine"),
    [*((forward, engine) for forward in SKIPS for engine in ("fx", "pt2e")), *((kind, "onnx") for kind in SKIPS[::2])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_skips_compute_what_the_quantized_program_does(forward: Forward, engine: str) -> None:
    """Half of them with engine onnx, whose exporter knows no change in place and whose kernels are not ours."""
    model, (images, inputs) = network(forward), some_images()
    made = make(engine, model, images)
    with torch.no_grad():
        exact, program, int8 = (function(inputs) for function in (model, made.reference, made.module))
        assert sqnr_db(exact, int8) > max(sqnr_db(exact, program) - 3, 5)
        for size in (1, 3):
            assert torch.allclose(made.module(inputs[:size]), int8[:size], atol=1e-6)
    check_kernels(engine, made.module, made.reference, model, images)


def test_a_tensor_changed_under_another_name() -> None:
    """torch.fx loses that `z` is `x`: engine fx takes what torch.export sees instead."""

    def forward(net: Any, images: Tensor) -> Tensor:
        x = z = F.relu(net.a(images))
        x += net.b(x)
        return net.two(F.relu(net.c(x)), z)

    model, (images, inputs) = network(forward), some_images()
    for engine in ("fx", "pt2e", "onnx"):
        int8 = quantize_model(model, images, QuantizeConfig(engine=engine, allow_float=True), False).module
        with torch.no_grad():
            assert sqnr_db(model(inputs), int8(inputs)) > 8  # of the network that torch.fx sees: below 0


def test_only_what_is_read_again_is_copied() -> None:
    """A copy costs time: an ordinary residual block has none."""

    def copies(forward: Forward) -> int:
        images = some_images()[0]
        module = make("pt2e", network(forward), images).stored
        return len(module.inlined_graph.findAllNodes("aten::clone"))

    def residual(net: Any, images: Tensor) -> Tensor:
        y = F.relu(net.a(images))
        z = F.relu(net.c(F.relu(net.b(y))) + y)
        return net.head(F.relu(net.b(F.relu(net.d(z))) + z).mean((2, 3)))

    assert copies(residual) == 0
    assert copies(read_again_after_its_sum) == copies(one_skip_for_two_sums) == 1


def test_a_wrong_lowering_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_is_last_reader", lambda program, layer: True)
    images, options = some_images()[0], QuantizeConfig(engine="pt2e", allow_float=True)
    for forward in (read_again_after_its_sum, one_skip_for_two_sums):
        with pytest.raises(
            StageError, match=r"^engine pt2e: .* is -?\d+\.\d dB instead of .* dB; use another"
        ) as found:
            quantize_model(network(forward), images, options, False)
        assert "\n" not in str(found.value)
    assert quantize_model(network(squeeze_and_excitation), images, options, False)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_another_network_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the engine had mixed up two outputs of the last layer."""
    model, other = network(read_again_after_its_sum), network(read_again_after_its_sum)
    with torch.no_grad():
        other.last.weight[:2] = model.last.weight[:2].flip(0)
    images = some_images()[0]
    wrong = make(engine, other, images)
    right = ENGINES[engine]
    swapped = lambda *given: replace(right(*given), module=wrong.module, stored=wrong.stored)  # noqa: E731
    monkeypatch.setitem(quantization.ENGINES, engine, swapped)
    with pytest.raises(StageError, match=f"^engine {engine}: its int8 kernels compute something else"):
        quantize_model(model, images, QuantizeConfig(engine=engine, allow_float=True), False)


def test_a_program_that_is_wrong_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and program agree, and have nothing to do with the network."""
    model, other, images = network(squeeze_and_excitation), network(squeeze_and_excitation), some_images()[0]
    with torch.no_grad():
        other.last.weight.neg_()
    wrong, right = make("fx", other, images), ENGINES["fx"]
    parts = {"module": wrong.module, "stored": wrong.stored, "reference": wrong.reference}
    monkeypatch.setitem(quantization.ENGINES, "fx", lambda *given: replace(right(*given), **parts))
    with pytest.raises(
        StageError, match=r"^engine fx: its int8 model does not compute .* -\d+\.\d dB, where .* gives \d+"
    ):
        quantize_model(model, images, QuantizeConfig(engine="fx"), False)


def test_a_network_that_int8_is_too_coarse_for_is_not_refused() -> None:
    """Its logits are as bad in the simulation of the layers; and without one nothing can be said."""
    images, exact = some_images()[0], nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 10)).eval()
    noise = 30 * torch.randn(64, 10)
    check_sense("fx", -9.0, exact, lambda some: exact(to_float(some)) + noise[: len(some)], images)
    check_sense("fx", -9.0, exact, lambda some: None, images)
    with pytest.raises(StageError, match=r"is -9\.0 dB, where quantizing each layer gives \d"):
        check_sense("fx", -9.0, exact, lambda some: exact(to_float(some)) + noise[: len(some)] / 300, images)


def test_check_by_hand() -> None:
    """Rounding may move the logits by as much as quantization has; ten times the power is too much."""
    images, exact = some_images()[0], nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 10)).eval()
    torch.manual_seed(2)
    noises = 0.01 * torch.randn(2, 16, 10)

    def off(noise: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda batch: exact(batch) + noise[: len(batch)]

    check_kernels("fx", off(noises[1]), off(noises[0]), exact, images)
    check_kernels("fx", off(0 * noises[1]), off(0 * noises[0]), exact, images)
    with pytest.raises(StageError, match=r"is -?\d+.\d dB instead of -?\d+.\d dB"):
        check_kernels("fx", off(5 * noises[1]), off(noises[0]), exact, images)
    with pytest.raises(StageError, match="depend on the size of the batch, 3 or 16 images"):
        check_kernels("fx", lambda batch: exact(batch) + float(len(batch) == 3), off(noises[0]), exact, images)
    with pytest.raises(StageError, match="instead of"):
        check_kernels("fx", lambda batch: exact(batch) * float("nan"), off(noises[0]), exact, images)


ENDS: dict[str, Forward] = {
    "linear": lambda net, images: net.last(net.first(F.relu(net.a(images)).mean((2, 3)))),
    "linear, relu": lambda net, images: F.relu(net.last(net.first(F.relu(net.a(images)).mean((2, 3))))),
    "two heads": lambda net, images: read_again_after_its_sum(net, images) + net.head(net.a(images).mean((2, 3))),
    "convolution, relu, pool": lambda net, images: F.relu(net.pointwise(F.relu(net.a(images)))).mean((2, 3)),
    "pool, convolution": lambda net, images: net.pointwise(F.adaptive_avg_pool2d(net.a(images), 1)).flatten(1),
    "log_softmax": lambda net, images: F.log_softmax(net.head(net.a(images).mean((2, 3))), 1),
}


@pytest.mark.parametrize("engine", ["pt2e", "onnx"])
@pytest.mark.parametrize("end", ENDS)
def test_logits_are_floats_of_an_int8_layer(end: str, engine: str) -> None:
    """Nearly as many values as there are logits, where 8 bits have 256."""
    model, (images, inputs) = network(ENDS[end]), some_images()
    made = make(engine, model, images)
    with torch.no_grad():
        exact, logits = model(inputs), made.module(inputs)
    found = logits[logits != 0]  # which a ReLU gives many times
    assert found.unique().numel() > 0.9 * found.numel() > 100
    assert made.float_layers == () and {"head", "last", "pointwise"} & set(made.int8_layers)
    assert sqnr_db(exact, logits) > 10
    if engine == "onnx":
        makers = {output: node for node in made.stored.graph.node for output in node.output}
        last = max(place for place, node in enumerate(made.stored.graph.node) if node.op_type in ("Gemm", "MatMul"))
        assert makers[made.stored.graph.output[0].name].op_type != "DequantizeLinear"
        assert not [node for node in made.stored.graph.node[last:] if node.op_type == "QuantizeLinear"]


def test_a_last_convolution_of_more_than_one_pixel_stays_int8_in_onnx() -> None:
    forward: Forward = lambda net, images: F.relu(net.b(F.relu(net.a(images)))).mean((2, 3))  # noqa: E731
    model, (images, inputs) = network(forward), some_images()
    made = make("onnx", model, images)
    assert made.float_layers == () and set(made.int8_layers) == {"a", "b"}
    with torch.no_grad():
        assert sqnr_db(model(inputs), made.module(inputs)) > 15
