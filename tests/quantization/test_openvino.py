"""One ONNX file, fast in two runtimes: which roundings stand in it, and what OpenVINO makes of them."""

import gc
import platform
import signal
from collections import Counter
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.measurement.host import read_host
from qexp.models.openvino_file import OpenvinoClassifier, for_openvino
from qexp.quantization import quantize_model
from qexp.quantization.engines.onnx import _computed_with_a_convolution, _restore_hard_swish
from qexp.quantization.equivalence import sqnr_db
from qexp.quantization.result import QuantizedModel

PAIR = ("QuantizeLinear", "DequantizeLinear")


class _Gated(nn.Module):
    """Squeeze-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3), keepdim=True)
        return maps * nn.functional.hardsigmoid(self.second(torch.relu(self.first(pooled))))


class _Attention(nn.Module):
    """Over the pixels of a map, with a sum around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        return (tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Hardswish(), depthwise, nn.Hardswish(), _Gated(16),
        nn.Conv2d(16, 16, 1), nn.SiLU(), nn.Conv2d(16, 16, 1), nn.GELU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        _Attention(16), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)  # so that the logits depend on the image
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    brightness = torch.linspace(0.1, 1, 32).view(-1, 1, 1, 1)
    return brightness * torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def int8(images: Tensor) -> QuantizedModel:
    return quantize_model(_network(), (255 * images).byte(), QuantizeConfig(engine="onnx", observer="minmax"), False)


def test_activations_are_whole_and_every_layer_is_int8(int8: QuantizedModel) -> None:
    kinds = Counter(node.op_type for node in int8.stored.graph.node)
    assert kinds["HardSwish"] == 2 and kinds["HardSigmoid"] == 1 and int8.float_layers == ()
    ours = Counter(node.op_type for node in onnx.load_from_string(for_openvino(int8.stored_bytes())).graph.node)
    assert {kind: count - ours[kind] for kind, count in kinds.items() if count != ours[kind]} == dict.fromkeys(PAIR, 6)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="which processors have int8 kernels is told for x86")
def test_openvino_computes_convolutions_and_their_activations_in_int8(int8: QuantizedModel, images: Tensor) -> None:
    model = OpenvinoClassifier(int8.stored_bytes())
    model(images[:1])
    (request,) = model.compiled.values()
    nodes = [node.get_rt_info() for node in request.get_compiled_model().get_runtime_model().get_ops()]
    layers = [node for node in nodes if node["layerType"].astype(str) in ("Convolution", "GroupConvolution")]
    assert len(layers) == 7 and {node["runtimePrecision"].astype(str) for node in layers} <= {"u8", "i8"}
    assert not {node["layerType"].astype(str) for node in nodes} & {"HSwish", "Swish", "Gelu", "Eltwise"}


def test_both_runtimes_are_as_close_to_fp32(int8: QuantizedModel, images: Tensor) -> None:
    with torch.no_grad():
        fp32 = _network()(images)
    there = int8.in_openvino()
    assert there.tags()["runtime"] == "openvino" and int8.tags()["runtime"] == "onnxruntime"
    assert sqnr_db(fp32, there(images)) > sqnr_db(fp32, int8(images)) - 1 > 12
    assert torch.equal(there.as_by_mlflow()(images), int8(images)), "MLflow takes ONNX Runtime"


def test_a_signal_arrives_after_models_are_gone(int8: QuantizedModel, images: Tensor) -> None:
    """Each `openvino.Core` sets a stack for signals; two of them, dropped in the order made, leave none that exists."""
    stored, arrived = int8.stored_bytes(), []
    first, second = OpenvinoClassifier(stored), OpenvinoClassifier(stored)
    assert torch.equal(first(images[:1]), second(images[:1]))
    del first
    del second
    gc.collect()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: arrived.append(number))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert arrived == [signal.SIGUSR1]


def test_what_stays_float_may_be_bf16(int8: QuantizedModel, images: Tensor) -> None:
    """A layer that was kept in fp32, or a layer norm; of the network above all products are int8."""

    def of(network: nn.Module, **options: Any) -> QuantizedModel:
        settings = QuantizeConfig(engine="onnx", observer="minmax", **options)
        return quantize_model(network, (255 * images).byte(), settings, False)

    normalized = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.LayerNorm(16), nn.Linear(16, 5)).eval()
    kept = of(_network(), keep_fp32=["9"])
    assert kept.float_layers == ("9",)
    assert (int8.computes_in_float, kept.computes_in_float, of(normalized).computes_in_float) == (False, True, True)
    exact, rounded = kept.in_openvino(), kept.in_openvino(bf16=True)
    assert (rounded.result.load_backend, rounded.tags()["runtime"]) == ("openvino_bf16",) * 2
    if read_host(1).has_bf16:  # without it OpenVINO may take fp32
        assert 15 < sqnr_db(exact.module(images), rounded.module(images)) < 80, "as bf16 rounds, and not as fp32"


def test_what_another_engine_makes_is_no_file_for_openvino(images: Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, 5)).eval()
    made = quantize_model(plain, (255 * images).byte(), QuantizeConfig(engine="fx", observer="minmax"), False)
    with pytest.raises(InputError, match="engine fx makes no ONNX file"):
        made.in_openvino()


def _graph(*nodes: tuple[str, list[str], str]) -> onnx.GraphProto:
    make = onnx.helper.make_node
    found = [make(kind, given, [made], f"n{place}") for place, (kind, given, made) in enumerate(nodes)]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    return onnx.helper.make_graph(found, "g", [], [output])


def test_a_rounding_stays_where_it_clips_or_feeds_another_layer() -> None:
    """ONNX Runtime's tools take out a Relu or Clip whose range the rounding after it has."""
    conv = ("Conv", ["x", "w"], "a")
    silu = [("Sigmoid", ["a"], "s"), ("Mul", ["a", "s"], "y")]
    assert _computed_with_a_convolution(_graph(conv, *silu)) == {"a", "s"}
    assert _computed_with_a_convolution(_graph(conv, ("HardSwish", ["a"], "y"))) == {"a"}
    relu = ("Relu", ["a"], "b")
    assert not _computed_with_a_convolution(_graph(conv, relu, ("HardSwish", ["b"], "y")))
    assert not _computed_with_a_convolution(_graph(conv, ("HardSwish", ["a"], "h"), ("Conv", ["a", "v"], "y")))
    gate = [("Sigmoid", ["a"], "s"), ("Mul", ["maps", "s"], "y")]  # of other maps: the product has an int8 kernel
    assert _computed_with_a_convolution(_graph(conv, *gate)) == {"a"}


def test_hard_swish_is_restored_only_where_it_was_one() -> None:
    def restored(alpha: float, factor: str, *more: tuple[str, list[str], str]) -> list[str]:
        graph = _graph(("HardSigmoid", ["a"], "s"), ("Mul", ["s", factor], "y"), *more)
        graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", alpha))
        _restore_hard_swish(graph)
        return [node.op_type for node in graph.node]

    divided = ["HardSigmoid", "Mul"]
    assert restored(1 / 6, "a") == ["HardSwish"]
    assert restored(0.2, "a") == restored(1 / 6, "b") == divided
    assert restored(1 / 6, "a", ("Relu", ["s"], "z")) == [*divided, "Relu"]
