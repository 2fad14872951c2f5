"""Quantization with FX: all layers int8, the traced module, options, layers that stay fp32, odd calibration images."""

import copy
import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import build_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.pt2e import observer as torchao_observer

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.errors import StageError
from qexp.measurement.accuracy import predict_logits, to_float
from qexp.measurement.host import read_host
from qexp.models.classifier import Classifier
from qexp.models.vision import torchvision  # first: the import that works beside a CPU build of torch
from qexp.quantization import QuantizedModel, quantize_model
from qexp.quantization.engines import fx
from qexp.quantization.observers import observer_class
from qexp.training.train import TrainResult

LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))


@pytest.fixture(scope="module")
def model(trained: tuple[Classifier, TrainResult]) -> Classifier:
    return trained[0]


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    """Calibration images, uint8."""
    return digits.train.images[:32]


@pytest.fixture(scope="module")
def inputs(digits: Dataset) -> Tensor:
    """Test images, float."""
    return to_float(digits.test.images[:128])


def _quantize(model: nn.Module, images: Tensor, reduce_range: bool | None = None, **options: object) -> QuantizedModel:
    """As the quantize stage does it: the range is reduced where the CPU's products saturate."""
    if reduce_range is None:
        reduce_range = not read_host(None).has_int8_dot_product
    return quantize_model(model, images, QuantizeConfig(**options), reduce_range)


@pytest.fixture(scope="module")
def int8(model: Classifier, images: Tensor) -> QuantizedModel:
    return _quantize(model, images)


def test_every_convolution_and_linear_layer_is_int8(int8: QuantizedModel, model: Classifier) -> None:
    assert int8.result.int8_layers == LAYERS
    assert int8.result.float_layers == ()
    kinds = [node.kind() for node in int8.module.inlined_graph.nodes()]
    assert kinds.count("quantized::conv2d_relu") == 6 and kinds.count("onednn::qlinear_pointwise") == 1
    assert not {"aten::conv2d", "aten::_convolution", "aten::linear", "aten::batch_norm"} & set(kinds)


def test_result_says_how_the_model_was_quantized(model: Classifier, images: Tensor) -> None:
    result = _quantize(model, images[:9], True, observer="minmax", per_channel=False, backend="onednn").result
    assert (result.engine, result.backend, result.observer) == ("fx", "onednn", "minmax")
    assert (result.per_channel, result.reduce_range, result.calibration_images) == (False, True, 9)
    assert result.duration_s > 0


def test_int8_answers_like_fp32(int8: QuantizedModel, model: Classifier, digits: Dataset) -> None:
    fp32 = predict_logits(model, digits.test.images)
    quantized = predict_logits(int8.module, digits.test.images)
    assert (fp32.argmax(1) == quantized.argmax(1)).double().mean() > 0.95
    assert (fp32 - quantized).abs().mean() < 0.2 * fp32.std()
    assert not torch.equal(fp32, quantized)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_logits_do_not_depend_on_the_batch(int8: QuantizedModel, inputs: Tensor, batch_size: int) -> None:
    with torch.no_grad():
        whole = int8.module(inputs[:7])
        logits = int8.module(inputs[:batch_size])
    assert logits.dtype == torch.float32 and logits.shape == (batch_size, 10)
    assert torch.equal(logits, whole[:batch_size])


def test_a_batch_in_another_memory_format_gives_the_same(int8: QuantizedModel, inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(
            int8.module(inputs[:7]), int8.module(inputs[:7].contiguous(memory_format=torch.channels_last))
        )


def test_saved_and_loaded_module_gives_equal_bits(int8: QuantizedModel, inputs: Tensor, tmp_path: Path) -> None:
    file = str(tmp_path / "int8.pt")
    torch.jit.save(int8.module, file)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        for batch_size in (1, 128):
            assert torch.equal(loaded(inputs[:batch_size]), int8.module(inputs[:batch_size]))


def test_quantizing_again_gives_equal_bits(
    int8: QuantizedModel, model: Classifier, images: Tensor, inputs: Tensor
) -> None:
    again = _quantize(model, images)
    with torch.no_grad():
        assert torch.equal(again.module(inputs), int8.module(inputs))


def test_observers_choose_different_ranges(model: Classifier, images: Tensor, inputs: Tensor) -> None:
    observers = ("histogram", "minmax", "batch_average")
    with torch.no_grad():
        logits = [
            _quantize(model, images, observer=name, calibration_batch_size=8).module(inputs) for name in observers
        ]
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(logits[first], logits[second])
        assert all((found.argmax(1) == model(inputs).argmax(1)).double().mean() > 0.9 for found in logits)


@pytest.mark.parametrize("kinds", [torch.ao.quantization.observer, torchao_observer], ids=["torch", "torchao"])
def test_percentile_leaves_out_the_ends(kinds: ModuleType) -> None:
    """All of the values at 100; below that, an outlier counts for no more than its share."""
    torch.manual_seed(0)
    values = torch.cat([torch.rand(9_999), torch.tensor([50.0])])

    def largest(percentile: float) -> float:
        watch = observer_class(kinds, QuantizeConfig(observer="percentile", percentile=percentile))(dtype=torch.quint8)
        for batch in values.split(2_500):
            watch(batch)
        scale, zero = watch.calculate_qparams()
        return float(scale) * (255 - int(zero))

    assert largest(100) == pytest.approx(50, rel=0.01)
    assert largest(99) == pytest.approx(1, abs=0.1)
    assert largest(60) < largest(99) + 1e-6


class Small(nn.Module):
    """Two convolutions and a linear layer, whose first output has weights fifty times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3)
        self.last = nn.Linear(32, 10)
        self.last.weight.data[0] *= 50
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.norm(self.first(images))))).mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return Small()


@pytest.mark.parametrize("engine", ["fx", "pt2e", "onnx"])
def test_options_reach_every_engine(engine: str, small: nn.Module, images: Tensor, inputs: Tensor) -> None:
    """A percentile, one scale a layer, seven bits: each against the whole range with a scale a channel."""

    def make(reduce_range: bool = False, **options: object) -> QuantizedModel:
        return _quantize(small, images, reduce_range, **{"engine": engine, "observer": "minmax"} | options)

    usual, reduced, per_layer = make(), make(True), make(per_channel=False)
    clipped = make(observer="percentile", percentile=98)
    with torch.no_grad():
        fp32 = small(inputs)
        noise = {
            name: (made.module(inputs) - fp32)[:, 1:].abs().mean()
            for name, made in (("usual", usual), ("per layer", per_layer), ("reduced", reduced))
        }
        assert (clipped.module(inputs) - usual.module(inputs)).abs().mean() > 3 * (
            usual.module(inputs) - fp32
        ).abs().mean()
    assert noise["per layer"] > 3 * noise["usual"], "the others lose their bits to the first output"
    assert noise["usual"] != noise["reduced"] < 5 * noise["usual"]
    assert (usual.result.reduce_range, reduced.result.reduce_range) == (False, True)
    largest = [[max(weight.max(), -weight.min()) for weight in _int8_weights(made)] for made in (usual, reduced)]
    assert [len(of_layers) for of_layers in largest] == [3, 3]
    assert min(largest[0]) > 64 >= max(largest[1])  # of 7 bits: a sum of two products then fits into 16


def _int8_weights(made: QuantizedModel) -> list[np.ndarray]:
    """Of all layers, as integers that do not overflow when they are negated."""
    if made.flavor == "onnx":
        tensors = [onnx.numpy_helper.to_array(one) for one in made.stored.graph.initializer]
        return [one.astype(int) for one in tensors if one.dtype.name == "int8" and one.ndim > 1]
    loaded: Any = made.reloaded()
    packed = [module.weight.to_dense() for module in loaded.modules() if hasattr(module, "factors")]
    constants = [node.output() for node in made.stored.graph.nodes() if node.kind() == "prim::Constant"]
    kept = [value.toIValue().unpack()[0] for value in constants if "PackedParams" in str(value.type())]
    return [weight.int().numpy() for weight in (*packed, *(weight.int_repr() for weight in kept))]


def test_calibration_images_set_the_ranges(
    int8: QuantizedModel, model: Classifier, digits: Dataset, inputs: Tensor
) -> None:
    other = _quantize(model, digits.train.images[32:64])
    with torch.no_grad():
        assert not torch.equal(other.module(inputs), int8.module(inputs))


def test_backends_give_equal_outputs(int8: QuantizedModel, model: Classifier, images: Tensor, inputs: Tensor) -> None:
    onednn = _quantize(model, images, backend="onednn")
    with torch.no_grad():
        for batch_size in (1, 7, 128):
            assert torch.equal(onednn.module(inputs[:batch_size]), int8.module(inputs[:batch_size]))


def test_many_groups_do_not_saturate(images: Tensor, inputs: Tensor) -> None:
    """FBGEMM's kernels, the default ones for more than 100 groups, sum pairs of products in 16 bits."""
    torch.manual_seed(0)
    groups, found = 128, {}
    layers = (nn.Conv2d(3, groups, 1), nn.ReLU(), nn.Conv2d(groups, groups, 3, groups=groups), nn.ReLU())
    wide = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(groups, 10)).eval()
    with torch.no_grad():
        for parameter in wide[2].parameters():
            parameter.abs_()  # whose sums are as large as they can be
        for backend in ("x86", "onednn"):
            int8 = _quantize(wide, images, backend=backend, observer="minmax")
            assert int8.result.saturating_layers == ("2",)
            found[backend] = int8.reloaded()(inputs[:64])
        expected = wide(inputs[:64])
    assert torch.equal(found["x86"], found["onednn"])
    noise = (expected - found["x86"]).square().mean() / expected.var()
    assert -10 * noise.log10() > 25
    assert _quantize(wide, images, keep_fp32=["2"]).result.saturating_layers == ()


def test_only_the_weights_of_depthwise_layers_have_seven_bits(images: Tensor) -> None:
    torch.manual_seed(0)
    depthwise = [nn.Conv2d(wide, wide, 3, groups=wide, padding=1) for wide in (64, 128)]
    grouped = nn.Conv2d(128, 256, 3, groups=64)
    layers = [nn.Conv2d(3, 64, 1), depthwise[0], nn.Conv2d(64, 128, 1), nn.Hardswish(), depthwise[1], grouped]
    int8 = _quantize(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval(), images, False
    )
    assert int8.result.saturating_layers == ("4",) and not int8.result.reduce_range
    largest = {weight.shape: abs(weight).max() for weight in _int8_weights(int8)}
    assert largest.pop((128, 1, 3, 3)) <= 64
    assert len(largest) == 5 and min(largest.values()) > 100


@pytest.mark.slow
def test_a_depthwise_network_is_as_exact_as_with_eight_bits(
    images: Tensor, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without saturation, which oneDNN's kernels do not have either; the weights' bit costs next to nothing."""
    torch.manual_seed(0)
    kinds, expanded = torchvision.models.mobilenetv3, 120  # groups: from 101 on, FBGEMM's kernels are taken
    blocks = [
        kinds.InvertedResidualConfig(16, 3, expanded, 16, True, "RE", 2, 1, 1),
        kinds.InvertedResidualConfig(16, 5, expanded, 16, False, "HS", 1, 1, 1),
    ]
    net = kinds.MobileNetV3(blocks, last_channel=64, num_classes=10, dropout=0).train()
    with torch.no_grad():
        for _ in range(15):
            net(to_float(images))  # batch norm's statistics
        expected = net.eval()(inputs)
        made = {
            backend: _quantize(net, images, False, backend=backend, observer="minmax") for backend in ("x86", "onednn")
        }
        x86, onednn = (int8.reloaded()(inputs) for int8 in made.values())
        monkeypatch.setattr(fx, "saturating_layers", lambda model, options: ())
        whole = _quantize(net, images, False, backend="onednn", observer="minmax").reloaded()(inputs)
    assert _sqnr_db(onednn, x86) > 40 and _sqnr_db(expected, x86) > _sqnr_db(expected, whole) - 2
    assert len(made["x86"].result.saturating_layers) == 2


def _sqnr_db(expected: Tensor, found: Tensor) -> float:
    return float(10 * (expected.var() / (expected - found).square().mean()).log10())


class _Limited(nn.Module):
    """ReLU6 after each layer, as a module or a function; most outputs lie outside of what it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 10)
        self.limit = nn.ReLU6()
        self.one.weight.data *= 30
        self.two.weight.data *= 3
        self.last.weight.data *= 4

    def forward(self, images: Tensor) -> Tensor:
        return self.limit(self.last(F.relu6(self.two(self.limit(self.one(images)))).mean((2, 3))))


@pytest.mark.parametrize(
    ("kept", "observer"),
    [
        *((None, observer) for observer in ("minmax", "histogram", "percentile", "batch_average")),
        *(([layer], "histogram") for layer in ("one", "two", "last")),
    ],
)
def test_relu6_is_the_end_of_the_range(
    kept: list[str] | None, observer: str, images: Tensor, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = _Limited().eval()
    int8 = _quantize(net, images, False, observer=observer, keep_fp32=kept)
    with torch.no_grad():
        expected, logits = net(inputs), int8.reloaded()(inputs)
        assert torch.equal(int8.source(inputs), expected)
        monkeypatch.setattr(fx, "_fuse_limits", lambda model, kept: {})
        unfused = _quantize(net, images, False, observer=observer, keep_fp32=kept).module(inputs)
    gained = _sqnr_db(expected, logits) - _sqnr_db(expected, unfused)
    assert _sqnr_db(expected, logits) > 25 and gained > (-1 if kept else 3)
    assert 0 <= float(logits.min()) and 5 < float(logits.max()) <= 6
    assert logits.unique().numel() > 0.9 * expected.unique().numel()


@pytest.mark.parametrize("engine", ["fx", "onnx"])  # torch.export, which pt2e uses, keeps some of what it has seen
def test_nothing_holds_a_model_that_was_quantized(engine: str, tiny: Dataset) -> None:
    """A search quantizes hundreds of times in one process."""

    def modules_left() -> int:
        _quantize(build_tiny(tiny).eval(), tiny.train.images[:8], engine=engine, observer="minmax")
        gc.collect()
        return sum(isinstance(one, nn.Module) for one in gc.get_objects())

    modules_left()  # what is kept once
    assert modules_left() == modules_left()


# --- logits in float


class _Ending(nn.Module):
    """A convolution with ReLU, then what `end` computes of it and of three further layers."""

    def __init__(self, end: Callable[["_Ending", Tensor], Tensor]) -> None:
        super().__init__()
        self.end = end
        self.conv, self.map = nn.Conv2d(3, 32, 3, stride=2), nn.Conv2d(32, 10, 1)
        self.one, self.two = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self, self.conv(images).relu())


ENDS: dict[str, tuple[Callable[[_Ending, Tensor], Tensor], set[str]]] = {
    "linear": (lambda net, x: net.one(x.mean((2, 3))), {"conv", "one"}),
    "map, relu and pool": (lambda net, x: F.adaptive_avg_pool2d(net.map(x).relu(), 1).flatten(1), {"conv", "map"}),
    "two heads": (lambda net, x: net.one(x.mean((2, 3))) + net.two(x.amax((2, 3))), {"conv", "one", "two"}),
    "shared head": (lambda net, x: net.one(x.mean((2, 3))) + net.one(x.amax((2, 3))), {"conv", "one"}),
    "with a skip": (lambda net, x: net.one(x.mean((2, 3))) + x.amax((2, 3))[:, :10], {"conv", "one"}),
    "activation": (lambda net, x: F.hardswish(net.one(x.mean((2, 3)))) * 3 + 1, {"conv", "one"}),
    "function": (lambda net, x: F.linear(x.mean((2, 3)), net.one.weight, net.one.bias), {"conv"}),
    "joined": (lambda net, x: torch.cat([net.one(h := x.mean((2, 3)))[:, :5], net.two(h)[:, :5]], 1), {"conv"}),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_logits_are_not_rounded(end: str, per_channel: bool, images: Tensor, inputs: Tensor) -> None:
    """Calibrated with dark images, a rounded output would also be cut off where the logits of bright ones are."""
    torch.manual_seed(0)
    body, layers = ENDS[end]
    net = _Ending(body).eval()
    int8 = _quantize(net, images, False, observer="minmax", per_channel=per_channel, allow_float=True)
    assert set(int8.result.int8_layers) >= layers
    with torch.no_grad():
        expected, logits = net(inputs), int8.reloaded()(inputs)
        assert torch.equal(int8.module(inputs[:3]), logits[:3])
    assert logits.unique().numel() > 0.9 * expected.unique().numel()
    assert _sqnr_db(expected, logits) > 25
    ends = [torch.stack([values.amin(), values.amax()]) for values in (expected, logits)]
    assert torch.allclose(ends[0], ends[1], atol=0.05 * float(expected.std()))


def test_with_the_last_layer_in_fp32_the_logits_are_those_of_it(model: Classifier, images: Tensor) -> None:
    int8 = _quantize(model, images, keep_fp32=[LAYERS[-1]])
    assert int8.result.float_layers == LAYERS[-1:] and int8.result.int8_layers == LAYERS[:-1]
    with torch.no_grad():
        assert int8.reloaded()(to_float(images)).unique().numel() > 300


def test_trained_logits_are_nearly_all_different(int8: QuantizedModel, model: Classifier, digits: Dataset) -> None:
    logits, fp32 = (predict_logits(found, digits.test.images) for found in (int8.module, model))
    assert logits.unique().numel() > 0.98 * logits.numel()
    assert float(logits.max()) > float(logits.flatten().topk(2).values[1])  # none cut off at the same value
    assert abs(float(logits.max() - fp32.max())) < 0.1 * float(fp32.max())


@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_the_process_keeps_its_engine(model: Classifier, images: Tensor, backend: str) -> None:
    before = torch.backends.quantized.engine
    other = "onednn" if before != "onednn" else "x86"
    torch.backends.quantized.engine = other
    try:
        _quantize(model, images[:2], backend=backend)
        assert torch.backends.quantized.engine == other
        with pytest.raises(StageError):
            _quantize(_Silent(), images[:2], backend=backend)
        assert torch.backends.quantized.engine == other
    finally:
        torch.backends.quantized.engine = before


def test_the_model_stays_as_it_is(model: Classifier, images: Tensor, inputs: Tensor) -> None:
    original = copy.deepcopy(model).train()
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    _quantize(original, images)
    assert original.training
    assert [type(module) for module in original.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in original.state_dict().items())
    assert all(parameter.requires_grad for parameter in original.parameters())


def test_a_model_in_training_mode_is_quantized_for_evaluation(
    int8: QuantizedModel, model: Classifier, images: Tensor, inputs: Tensor
) -> None:
    training = copy.deepcopy(model).train()
    with torch.no_grad():
        assert torch.equal(_quantize(training, images).module(inputs), int8.module(inputs))


class _Attention(nn.Module):
    """Attention of another shape than the clean-up knows, so that its projections stay fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).permute(2, 0, 1)
        return self.last(self.attention(tokens, tokens, tokens)[0].mean(0))


@pytest.mark.slow
def test_layer_that_stays_fp32_is_named(images: Tensor, inputs: Tensor) -> None:
    model, layer = _Attention().eval(), "attention.out_proj, attention"
    with pytest.raises(StageError, match=f"not quantized: {layer} stayed fp32.*--allow-float true"):
        _quantize(model, images, engine="pt2e")
    allowed = _quantize(model, images, engine="pt2e", allow_float=True)
    assert allowed.result.float_layers == tuple(layer.split(", "))
    assert allowed.result.int8_layers == ("conv", "last")
    with torch.no_grad():
        fp32 = model(inputs)
        assert (allowed.module(inputs) - fp32).abs().max() < 0.2 * fp32.abs().max()


class _Branching(nn.Module):
    """Takes a decision that depends on pixels, which tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.mean((2, 3)) if images.mean() > 0 else images.amax((2, 3)))


class _Silent(_Branching):
    """Fails without a word."""

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(("kind", "words"), [(_Branching, "control flow"), (_Silent, "NotImplementedError")])
def test_model_that_cannot_be_traced(kind: type[nn.Module], words: str, images: Tensor) -> None:
    with pytest.raises(StageError, match=f"engine fx cannot quantize this model: .*{words}") as failed:
        _quantize(kind(), images, allow_float=True)
    assert "\n" not in str(failed.value)
    code = "images.mean() > 0" if kind is _Branching else "raise NotImplementedError"
    assert re.search(rf"\(at test_quantization.py:\d+: .*{re.escape(code)}", str(failed.value))


@pytest.mark.parametrize("observer", ["histogram", "minmax", "batch_average", "percentile"])
def test_one_calibration_image_is_enough(small: nn.Module, images: Tensor, inputs: Tensor, observer: str) -> None:
    quantized = _quantize(small, images[:1], observer=observer)
    assert quantized.result.calibration_images == 1
    with torch.no_grad():
        logits = quantized.module(inputs[:7])
        assert logits.shape == (7, 10) and logits.isfinite().all()
        assert torch.equal(logits[:1], quantized.module(inputs[:1]))


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("observer", ["histogram", "minmax", "batch_average", "percentile"])
def test_constant_calibration_images_work(
    small: nn.Module, images: Tensor, inputs: Tensor, value: int, observer: str
) -> None:
    quantized = _quantize(small, torch.full_like(images[:3], value), observer=observer)
    with torch.no_grad():
        assert quantized.module(inputs[:7]).isfinite().all()


def test_every_calibration_batch_counts(model: Classifier, images: Tensor, inputs: Tensor) -> None:
    """Smallest and largest values are those of all images, whatever the batches they come in."""
    with torch.no_grad():
        one_by_one, at_once, first_only = (
            _quantize(model, part, observer="minmax", calibration_batch_size=size).module(inputs)
            for part, size in ((images, 1), (images, 32), (images[:1], 1))
        )
    # fp32 sums differ in the last bit with the batch, so the ranges and the logits do not agree exactly.
    assert (one_by_one - at_once).abs().mean() < 0.1 * (first_only - at_once).abs().mean()
