"""Torchvision's classifiers with each engine: all convolutions and linear layers in int8, and the logits that follow.

`make test` takes a network of each family that is built of the family's blocks and has few of them; `make test-long`
takes those that people know by name. Weights are untrained, but batch norm has statistics. The projections of
attention, which are no layers of the original model, are in int8 as well.
"""

import importlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
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
from qexp.models.vision import torchvision  # first: the import that works beside a CPU build of torch
from qexp.quantization import QuantizedModel, quantize_model
from qexp.quantization.equivalence import sqnr_db
from qexp.quantization.sensitivity import simulated_logits

models = torchvision.models
convnext, efficientnet, googlenet, mobilenetv3, regnet, resnet = (
    importlib.import_module(f"torchvision.models.{name}")
    for name in ("convnext", "efficientnet", "googlenet", "mobilenetv3", "regnet", "resnet")
)

ENGINES = ("fx", "pt2e", "onnx")
# Classifier: image size; convolutions and matrix products with weights in a pass.
NAMED = {
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


def _resnet(block: Any) -> nn.Module:
    """Two stages of one block each, in place of four."""
    model = resnet.ResNet(block, [1, 1, 0, 0], 10)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 10)
    return model


def _squeezenet() -> nn.Module:
    """The first two blocks of eight."""
    model = models.squeezenet1_1(num_classes=10, dropout=0)
    model.features, model.classifier[1] = model.features[:5], nn.Conv2d(128, 10, 1)
    return model


def _inception() -> nn.Module:
    """One block of GoogLeNet, of four branches, between its kinds of stem and head."""
    block = googlenet.Inception(16, 8, 8, 16, 4, 8, 8)
    stem = [googlenet.BasicConv2d(3, 16, kernel_size=3, stride=2), nn.MaxPool2d(3, 2, ceil_mode=True)]
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))


# The same of a network with few of a family's blocks; what builds it for ten classes.
FEW_BLOCKS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    # A plain block, and one with stride 2 and a convolution in its skip.
    "resnet, basic blocks": (32, 7, lambda: _resnet(resnet.BasicBlock)),
    "resnet, bottlenecks": (32, 10, lambda: _resnet(resnet.Bottleneck)),
    "mobilenet v2": (
        32,
        11,
        lambda: models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [4, 24, 2, 2]], dropout=0),
    ),
    # ReLU with squeeze and excitation, hard-swish without, hard-swish with both; a skip around the last.
    "mobilenet v3": (
        64,
        16,
        lambda: mobilenetv3.MobileNetV3(
            [
                mobilenetv3.InvertedResidualConfig(32, 3, 32, 32, True, "RE", 2, 1, 1),
                mobilenetv3.InvertedResidualConfig(32, 5, 96, 40, False, "HS", 2, 1, 1),
                mobilenetv3.InvertedResidualConfig(40, 5, 96, 40, True, "HS", 1, 1, 1),
            ],
            last_channel=128, num_classes=10, dropout=0,
        ),
    ),
    "efficientnet": (
        32,
        17,
        lambda: efficientnet.EfficientNet(
            [efficientnet.MBConvConfig(1, 3, 1, 16, 16, 1), efficientnet.MBConvConfig(4, 5, 2, 16, 24, 2)],
            dropout=0, num_classes=10, last_channel=96,
        ),
    ),
    "squeezenet": (32, 8, _squeezenet),
    "shufflenet": (64, 21, lambda: models.ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256], 10)),
    "densenet": (64, 19, lambda: models.DenseNet(12, (2, 2, 1, 2), 24, num_classes=10)),
    "regnet": (
        64,
        25,
        lambda: models.RegNet(regnet.BlockParams.from_init_params(4, 24, 24, 2.5, 8, se_ratio=0.25), 10),
    ),
    "convnext": (
        32,
        12,
        lambda: models.ConvNeXt(
            [convnext.CNBlockConfig(24, 48, 1), convnext.CNBlockConfig(48, None, 2)], layer_scale=0.1, num_classes=10
        ),
    ),
    "inception": (32, 8, _inception),
    "vit": (32, 10, lambda: models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)),
    "swin": (32, 15, lambda: models.SwinTransformer([4, 4], 24, [2, 1], [2, 4], [4, 4], num_classes=10)),
}  # fmt: skip
# Sums, and a convolution at the end, have tests with each engine in test_rewrites.py.
WITH_EACH_ENGINE = ("mobilenet v3", "shufflenet", "convnext", "vit")
LEAST_SQNR_DB = 15  # of the logits; a scale that is wrong in one layer leaves less than 5
MOST_LOST_DB = 6  # of an engine against the simulation of each layer
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
    size = _row(name)[0]
    torch.manual_seed(0)
    images, inputs = patches(8, size), to_float(patches(7, size))
    built = "squeezenet1_1" if name in FEW_BLOCKS else name
    model = build_classifier(ModelSpec(built, tuple("abcdefghij"), squashed(size)), images)
    if name in FEW_BLOCKS:
        model.network = FEW_BLOCKS[name][2]()
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():  # the last layer of a fresh ViT: all logits would be 0
            nn.init.trunc_normal_(parameter, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # those of the next pass
    if norms:
        with torch.no_grad():
            model.train()(to_float(patches(32, size)))
    return Prepared(model.eval(), images[: 2 if size > 100 else 4 if name in FEW_BLOCKS else 8], inputs)


def _row(name: str) -> tuple[int, int]:
    return NAMED[name] if name in NAMED else FEW_BLOCKS[name][:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_BLOCKS)
def test_family_of_classifiers(name: str) -> None:
    """With each engine, or with the default one where the operations are those of other families."""
    run_apart(check, name, *(ENGINES if name in WITH_EACH_ENGINE else ["fx"]))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_classifier(name: str) -> None:
    """In a process of its own: the largest need more memory than a test process may have."""
    run_apart(check, name, *ENGINES)


def check(name: str, *engines: str) -> None:
    """Quantize a classifier with each of these engines."""
    fp32 = prepare(name)
    for engine in engines:
        print(f"{name} with {engine}", file=sys.stderr)
        check_engine(name, fp32, engine)


def check_engine(name: str, fp32: Prepared, engine: str) -> None:
    """Quantize one classifier with one engine, and compare it with what the table says."""
    size, products = _row(name)
    made = quantize_model(fp32.model, fp32.images, QuantizeConfig(engine=engine, observer="minmax"), False)
    assert made.result.float_layers == ()
    cost = measure_cost(fp32.model, (3, size, size), [1], made.result.int8_layers)
    assert cost.int8_macs == cost.conv_linear_macs  # what is left has no weights: products inside attention
    assert (cost.no_layer_percent > 0) is name.startswith(("vit", "swin"))
    assert _count_int8_products(made) == products
    with torch.no_grad():
        logits = made.module(fp32.inputs)
        if name in FEW_BLOCKS:
            noise = (fp32.model(fp32.inputs) - logits).square().mean() / logits.var()
            assert -10 * noise.log10() > LEAST_SQNR_DB
        else:
            _check_against_simulation(made, fp32, engine)
        for batch_size in (1, 2):
            assert torch.equal(made.module(fp32.inputs[:batch_size]), logits[:batch_size])
        assert torch.equal(_reload(made)(fp32.inputs), logits)
    assert _time_s(made, fp32.inputs[:1]) > 0


def _check_against_simulation(made: QuantizedModel, fp32: Prepared, engine: str) -> None:
    """Of fifty layers with random weights, rounding leaves little of the logits: as much as in a simulation of them."""
    options = QuantizeConfig(engine=engine, observer="minmax")
    simulated = simulated_logits(made.source, fp32.images, fp32.inputs, made.int8_layers, options, False)
    assert simulated is not None
    exact, found = fp32.model(fp32.inputs), made.module(fp32.inputs)
    assert sqnr_db(exact, found) > sqnr_db(exact, simulated) - MOST_LOST_DB


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
