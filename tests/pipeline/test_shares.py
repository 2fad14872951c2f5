"""Evaluation by several processes: what one sends, another computes bit for bit; who does not lead only helps."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qexp.config import Config, QuantizeConfig
from qexp.models.classifier import ModelSpec, build_classifier
from qexp.models.onnx_input import read_onnx
from qexp.models.preprocessing import squashed
from qexp.models.taken import wrap
from qexp.pipeline import jobs, unregistered
from qexp.pipeline.shares import _loaded, _packed
from qexp.quantization import quantize_model
from qexp.training.distributed import Group

IMAGES = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SPEC = ModelSpec("smallnet", ("a", "b", "c"), squashed(16))


def _onnx_file(folder: Path) -> Any:
    weight = numpy_helper.from_array(torch.randn(3, 3, 16, 16).numpy(), "weight")
    nodes = [helper.make_node("Conv", ["x", "weight"], ["maps"]), helper.make_node("Flatten", ["maps"], ["y"])]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 3, 16, 16))
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 3))
    graph = helper.make_graph(nodes, "net", [given], [found], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    return read_onnx(folder / "net.onnx", squashed(16))


@pytest.mark.parametrize("kind", ["smallnet", "module", "onnx", "int8 fx", "int8 onnx"])
def test_what_is_sent_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = build_classifier(SPEC, IMAGES).eval()
    if kind == "module":
        model = wrap(nn.Sequential(nn.Conv2d(3, 3, 16), nn.Flatten()), SPEC)
    elif kind == "onnx":
        model = _onnx_file(tmp_path)
    elif kind.startswith("int8"):
        model = quantize_model(model, IMAGES.float() / 255, QuantizeConfig(engine=[kind.removeprefix("int8 ")]))
    name, content, backend = _packed(model, IMAGES)
    (folder := tmp_path / "sent").mkdir()
    (folder / name).write_bytes(content)
    floats = IMAGES.float() / 255
    with torch.no_grad():
        found: Tensor = _loaded(folder, name, backend)(floats)
        assert torch.equal(found, model(floats))


@pytest.mark.parametrize("module", [unregistered, jobs])
def test_a_process_that_does_not_lead_only_helps(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a registry, and where a registered version is quantized: it would do the whole job once more."""
    helped: list[Any] = []
    dataset: Any = object()
    monkeypatch.setattr(module, "read_group", lambda: Group(rank=1, size=2))
    monkeypatch.setattr(module, "prepare", lambda *given, **more: jobs.Setup(Config(), None, dataset))  # type: ignore[arg-type]
    monkeypatch.setattr(module, "with_quantization_checked", lambda config, dataset: config)
    name = "follow" if module is unregistered else "follow_evaluation"
    monkeypatch.setattr(module, name, helped.append)
    if module is unregistered:
        assert unregistered.check_unregistered(Config()) is None
    else:
        assert jobs.run_quantize(Config(), "models:/a/1") is None
        assert jobs.whole_job(Config(), model_uri="models:/a/1") is None
    assert helped and all(one is dataset for one in helped)
