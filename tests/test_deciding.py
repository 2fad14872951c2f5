"""The accuracy of the baseline bf16, and which int8 version is chosen where none passes the gate."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from qexp.config import parse_yaml
from qexp.data import Dataset
from qexp.deciding import _able, measure_bf16
from qexp.evaluation import predict_logits
from qexp.evidence import Evidence, Judged
from qexp.gate import GateResult
from qexp.host import Host
from qexp.models import Classifier
from qexp.stages import Fp32
from qexp.training import TrainResult

CONFIG = parse_yaml("data: {image_size: 16}")


@pytest.fixture
def host(evidence: Evidence) -> Host:
    return replace(evidence.measured.host, features=("AVX512-BF16",))


@pytest.fixture
def fp32(trained: tuple[Classifier, TrainResult], digits: Dataset) -> Fp32:
    model, nothing = trained[0].eval(), cast(Any, None)
    return Fp32(model, nothing, nothing, {"test": predict_logits(model, digits.test.images)})


def test_bf16_is_compared_with_fp32_on_the_test_images(fp32: Fp32, digits: Dataset, host: Host) -> None:
    before = {name: tensor.clone() for name, tensor in fp32.model.state_dict().items()}
    found = measure_bf16(CONFIG, host, digits, fp32)
    assert found and found.accuracy.images == len(digits.test)
    weights = sum(parameter.numel() for parameter in fp32.model.parameters())
    assert 2 * weights < found.size_bytes < 2.5 * weights
    right = fp32.logits["test"].argmax(1) == digits.test.labels
    drop = 100 * right.double().mean().item() - found.accuracy.top1_percent
    assert found.top1_drop_points == pytest.approx(drop)
    assert found.top1_drop_low_points < drop < found.top1_drop_high_points and abs(drop) < 3
    assert all(torch.equal(before[name], tensor) for name, tensor in fp32.model.state_dict().items())


def test_of_versions_that_all_failed_accuracy_comes_first(evidence: Evidence) -> None:
    failed = GateResult(False, ("speed-up 0.9",))

    def judged(name: str, drop: float) -> Judged:
        found = replace(evidence.int8.comparison["test"], top1_drop_points=drop, top1_drop_high_points=drop + 0.5)
        return Judged(replace(evidence.int8, comparison={"test": found}), name, failed)

    fast, good, bad = judged("fast", 47.0), judged("good", 0.5), judged("bad", 3.0)
    assert _able(CONFIG, [fast, good, bad]) == [good]
    assert _able(CONFIG, [fast, bad]) == [bad]
    passed = replace(fast, gate=GateResult(True, ()))
    assert _able(CONFIG, [good, passed]) == [passed]


def test_it_is_measured_where_it_is_timed(fp32: Fp32, digits: Dataset, host: Host) -> None:
    assert measure_bf16(CONFIG, replace(host, features=("AVX512-VNNI",)), digits, fp32) is None
    assert measure_bf16(parse_yaml("latency: {baselines: [fp32_traced]}"), host, digits, fp32) is None


def test_a_model_that_does_not_run_in_bf16_is_said(
    fp32: Fp32, digits: Dataset, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    class OnlyFloat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(images.flatten(1)[:, :4].reshape(-1, 2, 2)).flatten(1)

    broken = replace(fp32, model=OnlyFloat())  # type: ignore[arg-type]
    assert measure_bf16(CONFIG, host, digits, broken) is None
    assert "the accuracy of bf16 is not measured: " in capsys.readouterr().err
