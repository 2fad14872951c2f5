"""What stays fp32 between layers that stay fp32: of a graph, and in the int8 models of all engines."""

import pytest
import torch
from conftest import build_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import to_float
from qexp.quantization import quantize_model
from qexp.quantization.fp32_layers import between_kept

ENGINES = ("fx", "pt2e", "onnx")


def test_operations_of_kept_layers_alone() -> None:
    graph = [
        ("image", (), None),
        ("scale", ("image",), None),
        ("first", ("scale",), True),
        ("relu", ("first",), None),
        ("second", ("relu",), False),
        ("sum", ("relu", "second"), None),
        ("mean", ("relu",), None),
        ("join", ("mean", "image"), None),
        ("last", ("sum",), True),
        ("logits", ("last",), None),
    ]
    assert between_kept(graph) == {"relu", "mean", "join", "logits"}  # the image is rounded for nobody
    assert between_kept([("layer", (), False), ("relu", ("layer",), None)]) == set()


class _Residual(nn.Module):
    """A shared ReLU, functions, methods and a sum between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.relu, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.relu(self.one(images))
        values = self.pool(first + F.relu(self.two(first)))
        return self.last(torch.relu(self.three(values)).flatten(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["residual", "smallnet"])
def test_with_all_layers_kept_nothing_is_rounded(kind: str, engine: str, tiny: Dataset) -> None:
    torch.manual_seed(0)
    model: nn.Module = _Residual().eval() if kind == "residual" else build_tiny(tiny).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    images, inputs = tiny.train.images[:32], to_float(tiny.validation.images)
    coarse = {"engine": engine, "observer": "percentile", "percentile": 70.0}  # which cuts off what is above
    with torch.no_grad():
        fp32 = model(inputs)
        kept = quantize_model(model, images, QuantizeConfig(**coarse, keep_fp32=names), False)
        assert torch.allclose(kept.module(inputs), fp32, atol=1e-4 * float(fp32.abs().max()))
        assert kept.result.int8_layers == () and set(kept.result.float_layers) == set(names)
        if kind == "smallnet":  # with batch norm and pools
            return
        some = quantize_model(model, images, QuantizeConfig(**coarse, keep_fp32=names[:2]), False)
        none = quantize_model(model, images, QuantizeConfig(**coarse), False)
        errors = [(made.module(inputs) - fp32).abs().mean() for made in (some, none)]
    assert some.result.float_layers == tuple(names[:2])
    assert errors[0] < errors[1]
