"""What is said where ranges are reduced, and when OpenVINO runs a file too; the stage itself is in test_jobs.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config import Config, QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import measure_accuracy, predict_logits
from qexp.measurement.host import read_host
from qexp.pipeline import quantize
from qexp.pipeline.quantize import warn_of_reduced_range


@pytest.mark.parametrize(("flags", "warned"), [("avx2 avx_vnni", True), ("avx2 avx512f avx512_vnni", False)])
def test_a_cpu_whose_products_saturate_is_named(
    tmp_path: Path, flags: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name: A CPU\nflags: {flags}\n")
    warn_of_reduced_range(read_host(1, file))
    said = capsys.readouterr().err
    assert said.startswith("warning: A CPU has no int8 dot product: sums of two products") is warned
    assert ("so all weights have 7 bits" in said) is warned


def test_openvino_is_left_out_unless_it_computes_the_same_and_as_well(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    fp32 = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).eval()
    exact = {"test": predict_logits(fp32, digits.test.images)}

    def rounded(images: Tensor) -> Tensor:
        return (fp32(images) * 32).round() / 32

    class InOpenvino:
        def __call__(self, images: Tensor) -> Tensor:
            return self.module(images)

        def module(self, images: Tensor) -> Tensor:
            found: Tensor = computes(images)
            return found

    def fails(images: Tensor) -> Tensor:
        raise RuntimeError("unsupported operation\nmore of it")

    int8: Any = SimpleNamespace(flavor="onnx", module=rounded, source=fp32, in_openvino=InOpenvino)

    def found(config: Config = Config()) -> Any:  # noqa: B008
        logits = {"test": predict_logits(rounded, digits.test.images)}
        return quantize._other_runtimes(config, int8, digits.train, digits, exact, logits)

    computes: Any = rounded
    runtimes, left_out = found()
    logits = predict_logits(rounded, digits.test.images)
    assert runtimes["openvino"].accuracy["test"] == measure_accuracy(logits, digits.test.labels)
    assert not left_out and found(Config(quantize=QuantizeConfig(backend="onnxruntime"))) == ({}, {})
    computes = fails
    assert "unsupported operation" in found()[1]["openvino"] and "more of it" not in found()[1]["openvino"]
    computes = lambda images: -fp32(images)  # noqa: E731
    assert "its int8 kernels compute something else" in found()[1]["openvino"]
    monkeypatch.setattr(quantize, "check_kernels", lambda *given: 0.0)
    computes = lambda images: torch.full((len(images), 10), torch.nan)  # noqa: E731
    assert "points below that in ONNX Runtime" in found()[1]["openvino"]
    monkeypatch.setattr(quantize, "has_openvino", lambda: False)
    assert found() == ({}, {})
