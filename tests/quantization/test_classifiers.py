"""Torchvision's classifiers with each engine: all convolutions and linear layers in int8, and the logits that follow.

Weights are untrained, but batch norm has statistics. The projections of attention, which are no layers of the original
model, are in int8 as well.
"""

import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from forked import run_apart
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.measurement.accuracy import to_float
from qexp.measurement.cost import measure_cost
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.onnx_file import OnnxClassifier
from qexp.models.preprocessing import squashed
from qexp.quantization import QuantizedModel, quantize_model

ENGINES = ("fx", "pt2e", "onnx")
# Classifier: image size; convolutions and matrix products with weights in a pass.
TABLE = {
    "resnet18": (64, 21),
    "resnet50": (64, 54),
    "mobilenet_v2": (64, 53),
    "mobilenet_v3_small": (64, 54),
    "efficientnet_b0": (64, 82),
    "squeezenet1_1": (64, 26),
    "shufflenet_v2_x1_0": (64, 57),
    "densenet121": (64, 121),
    "googlenet": (64, 58),
    "regnet_y_400mf": (64, 86),
    "convnext_tiny": (64, 59),
    "vit_b_16": (224, 50),  # 38 layers, and the first projection of attention in 12 blocks
    "swin_t": (64, 53),
}
# One network of each kind of block with every engine; the others, whose blocks are alike, with one, and in
# `make test-long` with every engine.
ALWAYS = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "convnext_tiny")
LEAST_SQNR_DB = 15  # of the logits; a scale that is wrong in one layer leaves less than 5
INT8 = (
    "quantized::conv2d", "quantized::conv2d_relu", "quantized::linear", "quantized::linear_relu",
    "onednn::qconv_pointwise", "onednn::qlinear_pointwise",
)  # fmt: skip
FP32 = ("aten::conv2d", "aten::_convolution", "aten::linear", "aten::addmm", "aten::mm", "aten::matmul", "aten::bmm")
# With the place of the weight among their inputs.
INT8_OF_ONNX = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "MatMulIntegerToFloat": 1}
FP32_OF_ONNX = ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "FusedGemm")


@dataclass(frozen=True)
class Prepared:
    """A classifier with its calibration images, uint8, and seven others, float."""

    model: Classifier
    images: Tensor
    inputs: Tensor


def patches(count: int, size: int) -> Tensor:
    """Coloured patches with noise, uint8: unlike plain noise, each of them gives other logits."""
    smooth = nn.functional.interpolate(torch.rand(count, 3, 5, 5), (size, size), mode="bicubic")
    return (255 * (smooth + 0.1 * torch.randn_like(smooth))).clamp(0, 255).to(torch.uint8)


def prepare(name: str) -> Prepared:
    size = TABLE[name][0]
    torch.manual_seed(0)
    images, inputs = patches(8, size), to_float(patches(7, size))
    model = build_classifier(ModelSpec(name, tuple("abcdefghij"), squashed(size)), images)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():  # the last layer of a fresh ViT: all logits would be 0
            nn.init.trunc_normal_(parameter, std=0.02)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.train()
        with torch.no_grad():
            for _ in range(15):  # batch norm's statistics
                model(to_float(images))
    return Prepared(model.eval(), images[: 4 if size < 100 else 2], inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in TABLE]
)
def test_classifier(name: str) -> None:
    """In a process of its own: the largest need more memory than a test process may have."""
    run_apart(check, name, *ENGINES)


@pytest.mark.slow
def test_vision_transformer() -> None:
    """With the engine that quantizes it best, the one that people will take."""
    run_apart(check, "vit_b_16", "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if name not in (*ALWAYS, "vit_b_16")])
def test_classifier_with_the_default_engine(name: str) -> None:
    run_apart(check, name, "fx")


def check(name: str, *engines: str) -> None:
    """Quantize a classifier with each of these engines."""
    fp32 = prepare(name)
    for engine in engines:
        print(f"{name} with {engine}", file=sys.stderr)
        check_engine(name, fp32, engine)


def check_engine(name: str, fp32: Prepared, engine: str) -> None:
    """Quantize one classifier with one engine, and compare it with what the table says."""
    size, products = TABLE[name]
    made = quantize_model(fp32.model, fp32.images, QuantizeConfig(engine=engine, observer="minmax"), False)
    assert made.result.float_layers == ()
    cost = measure_cost(fp32.model, (3, size, size), [1], made.result.int8_layers)
    assert cost.int8_macs == cost.conv_linear_macs  # what is left has no weights: products inside attention
    assert (cost.no_layer_percent > 0) is (name in ("vit_b_16", "swin_t")) and cost.no_layer_percent < 5
    assert _count_int8_products(made) == products
    with torch.no_grad():
        logits = made.module(fp32.inputs)
        noise = (fp32.model(fp32.inputs) - logits).square().mean() / logits.var()
        assert -10 * noise.log10() > LEAST_SQNR_DB
        for batch_size in (1, 2):
            assert torch.equal(made.module(fp32.inputs[:batch_size]), logits[:batch_size])
        assert torch.equal(_reload(made)(fp32.inputs), logits)
    assert _time_s(made, fp32.inputs[:1]) > 0


def _reload(made: QuantizedModel) -> Any:
    if made.flavor == "onnx":
        return OnnxClassifier(onnx.load_from_string(made.stored.SerializeToString()))
    file = io.BytesIO()
    torch.jit.save(made.stored, file)
    file.seek(0)
    return torch.jit.load(file)


def _count_int8_products(made: QuantizedModel) -> int:
    """Convolutions and matrix products with weights that run in int8; asserts that none runs in fp32."""
    if made.flavor == "onnx":
        return _count_in_onnx(made.stored)
    graph = made.stored.inlined_graph
    assert not [kind for kind in FP32 if graph.findAllNodes(kind)]
    packed = [name for name, _ in made.stored.named_children() if name.startswith("int8_")]
    return len(packed) or sum(len(graph.findAllNodes(kind)) for kind in INT8)  # as modules in pt2e, inlined in fx


def _count_in_onnx(model: onnx.ModelProto) -> int:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(Path(options.optimized_model_filepath)).graph
    weights = {tensor.name for tensor in graph.initializer}
    fp32 = [node for node in graph.node if node.op_type in FP32_OF_ONNX and weights & {*node.input[:2]}]
    assert not fp32, fp32
    return sum(node.input[INT8_OF_ONNX[node.op_type]] in weights for node in graph.node if node.op_type in INT8_OF_ONNX)


def _time_s(made: QuantizedModel, inputs: Tensor) -> float:
    with torch.no_grad():
        made.module(inputs)
        started = time.perf_counter()
        made.module(inputs)
    return time.perf_counter() - started
