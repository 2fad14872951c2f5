"""What is in a model's file, of each format."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from qexp.models.contents import read_contents
from qexp.models.onnx_file import export

WEIGHTS = 4 * (3 * 16 * 9 + 16 + 16 * 10 + 10)  # bytes of the parameters, fp32


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(images).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ["pth", "frozen.pth", "pt2", "onnx"])
def test_contents(kind: str, tmp_path: Path) -> None:
    model, example, file = _Net().eval(), torch.rand(4, 3, 8, 8), tmp_path / f"model.{kind}"
    if kind == "onnx":
        export(model, example, file)
        assert len(onnx.load(file).graph.initializer) >= 4
    elif kind == "pt2":
        torch.export.save(torch.export.export(model, (example,)), file)
    else:
        traced = torch.jit.trace(model, example)
        torch.jit.save(torch.jit.freeze(traced) if kind == "frozen.pth" else traced, file)
    found = read_contents(file)
    assert found.weights_bytes + found.code_bytes + found.other_bytes == file.stat().st_size
    assert WEIGHTS <= found.weights_bytes < WEIGHTS + 100  # shapes and axes are tensors, too
    assert found.code_bytes > 100 and found.other_bytes > 100


def test_int8_weights_take_a_quarter(tmp_path: Path) -> None:
    file, sizes = tmp_path / "model.pth", []
    for kind in (torch.float32, torch.int8):
        module = nn.Identity()
        module.register_buffer("weights", torch.ones(100, 100).to(kind))
        torch.jit.save(torch.jit.script(module), file)
        sizes.append(read_contents(file).weights_bytes)
    assert sizes == [40_000, 10_000]
