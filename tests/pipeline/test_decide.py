"""What counts as a float, and the accuracy of bf16."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import latency_row, with_rows

from qexp.config import Config, GateConfig, parse_yaml
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import Accuracy, predict_logits
from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyResult
from qexp.models.classifier import Classifier
from qexp.pipeline import measure
from qexp.pipeline.decide import judge
from qexp.pipeline.measure import LocalVersions, ToTime, measure_bf16
from qexp.report.results import Bf16Evidence, Evidence, InRuntime
from qexp.tracking.results import Fp32
from qexp.training.train import TrainResult

CONFIG = parse_yaml("data: {image_size: 16}")


@pytest.fixture
def host(evidence: Evidence) -> Host:
    return replace(evidence.measured.host, features=("AVX512-BF16",))


@pytest.fixture
def fp32(trained: tuple[Classifier, TrainResult], digits: Dataset) -> Fp32:
    model, nothing = trained[0].eval(), cast(Any, None)
    return Fp32(model, nothing, nothing, {"test": predict_logits(model, digits.test.images)})


def _measure(config: Config, host: Host, digits: Dataset, fp32: Fp32) -> dict[str, Bf16Evidence]:
    return measure_bf16(config, host, digits, fp32.model, fp32.logits["test"])


def test_bf16_is_compared_with_fp32_on_the_test_images(fp32: Fp32, digits: Dataset, host: Host) -> None:
    before = {name: tensor.clone() for name, tensor in fp32.model.state_dict().items()}
    found = _measure(CONFIG, host, digits, fp32)
    weights = sum(parameter.numel() for parameter in fp32.model.parameters())
    assert 2 * weights < found["bf16"].size_bytes < 2.5 * weights
    assert 4 * weights < found["bf16_openvino"].size_bytes < 4.5 * weights
    right = fp32.logits["test"].argmax(1) == digits.test.labels
    for one in found.values():
        drop = 100 * right.double().mean().item() - one.accuracy.top1_percent
        assert one.accuracy.images == len(digits.test) and one.top1_drop_points == pytest.approx(drop)
        assert one.top1_drop_low_points < drop < one.top1_drop_high_points and abs(drop) < 3
    assert all(torch.equal(before[name], tensor) for name, tensor in fp32.model.state_dict().items())


def test_the_gate_judges_the_runtime_that_won(evidence: Evidence) -> None:
    """With its own accuracy; the figures of the other one stay beside them."""
    first = evidence.int8
    worse = replace(first.comparison["test"], top1_drop_points=7.0, top1_drop_low_points=6.0, top1_drop_high_points=8.0)
    other = InRuntime({"test": replace(first.accuracy["test"], top1_percent=87.0)}, {"test": worse})
    quantized = replace(first.quantize, engine="onnx")
    int8 = replace(first, quantize=quantized, runtime="onnxruntime", runtimes={"openvino": other})
    rows = [latency_row(1, {"fp32": 8.0, "int8_onnx": 2.0, "int8_onnx_openvino": 1.0})]
    for won, figures, gate in (("int8_onnx", first, "passed"), ("int8_onnx_openvino", other, "failed")):
        lost = "int8_onnx_openvino" if won == "int8_onnx" else "int8_onnx"
        measured = replace(with_rows(evidence, *rows).measured, names={int8.version_uri: (won, lost)})
        found = judge(CONFIG, evidence.fp32, int8, measured)
        assert (found.name, found.gate.word) == (won, gate)
        assert (found.int8.accuracy, found.int8.comparison) == (figures.accuracy, figures.comparison)
        (kept,) = found.int8.runtimes
        assert {found.int8.runtime, kept} == {"onnxruntime", "openvino"}
        assert found.int8.in_runtime(kept).in_runtime(found.int8.runtime) == found.int8


def test_a_runtime_that_cannot_be_timed_is_said(
    evidence: Evidence, host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not installed, its accuracy is not known, or the sweep's process could not load the file."""

    def time_models(*given: Any) -> LatencyResult:
        timed = [model.name for model in given[3] if model.name not in breaks]
        rows = (latency_row(1, {"fp32": 8.0} | dict(zip(timed, (2.0, 1.0), strict=False))),)
        return replace(evidence.latency, rows=rows, models_left_out=dict.fromkeys(breaks, "broken"))

    def names(int8: ToTime) -> tuple[tuple[str, ...], dict[str, str]]:
        found = measure.time_versions(CONFIG, host, files, {"b": int8}, {}, {})
        return found.names["b"], found.latency.models_left_out

    monkeypatch.setattr(measure, "time_models", time_models)
    monkeypatch.setattr(measure, "has_openvino", lambda: installed)
    files, breaks, installed, other = (
        LocalVersions("a", Path("w"), {"a": "a", "b": "b"}),
        list[str](),
        True,
        "int8_onnx_openvino",
    )
    assert names(ToTime("onnx")) == ((other, "int8_onnx"), {})
    unknown = ToTime.of(replace(evidence.int8, quantize=replace(evidence.int8.quantize, engine="onnx")))
    why = "its accuracy there was not measured when the version was made"
    assert names(unknown) == (("int8_onnx",), {other: why})
    breaks = [other]
    assert names(ToTime("onnx")) == (("int8_onnx",), {other: "broken"})
    breaks, installed, _ = [], False, capsys.readouterr()
    why = "OpenVINO is not installed: pip install 'qexp[openvino]'"
    assert names(ToTime("onnx")) == (("int8_onnx",), {other: why})
    assert capsys.readouterr().err.splitlines() == [f"{other} is left out: {why}"]


def test_it_is_measured_where_it_is_timed(fp32: Fp32, digits: Dataset, host: Host) -> None:
    assert _measure(CONFIG, replace(host, features=("AVX512-VNNI",)), digits, fp32) == {}
    assert _measure(parse_yaml("latency: {baselines: [fp32_traced]}"), host, digits, fp32) == {}


def test_a_model_that_does_not_run_in_bf16_is_said(
    fp32: Fp32, digits: Dataset, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    class OnlyFloat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(images.flatten(1)[:, :4].reshape(-1, 2, 2)).flatten(1)

    broken = replace(fp32, model=OnlyFloat())  # type: ignore[arg-type]
    assert _measure(parse_yaml("latency: {baselines: [bf16]}"), host, digits, broken) == {}
    assert "the accuracy of bf16 is not measured: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "high", "counts"),
    [
        (GateConfig(), 1.9, True),
        (GateConfig(), 2.1, False),
        (GateConfig(max_top1_drop=0.5), 1.9, False),
        (GateConfig(min_top1=80.0), 1.9, True),
        (GateConfig(min_top1=93.0), 1.9, False),  # 93.9 % of 359 images: its interval begins at 91
    ],
)
def test_bf16_counts_where_it_keeps_the_limits_on_accuracy(
    evidence: Evidence, limits: GateConfig, high: float, counts: bool
) -> None:
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, high)
    floats = replace(evidence.measured, bf16=bf16).fair_floats(limits)
    assert floats == ("fp32", "fp32_traced", *(["bf16"] if counts else []), "fp32_onnx")


def test_bf16_of_unknown_accuracy_does_not_count(evidence: Evidence) -> None:
    assert evidence.measured.fair_floats(GateConfig()) == ("fp32", "fp32_traced", "fp32_onnx")


def test_the_gate_asks_for_more_than_the_registered_program_gives(evidence: Evidence) -> None:
    """int8 in a quarter of fp32's time, but slower than the same weights in another runtime."""
    strict = CONFIG.model_copy(update={"gate": GateConfig(min_speedup=3.0)})
    found = judge(strict, evidence.fp32, evidence.int8, evidence.measured).gate
    assert found.failed_limits == ("min_speedup",) and "over fp32_onnx at batch size 1" in found.summary
    row = evidence.latency.rows[0]
    alone = replace(row, stats={name: row.stats[name] for name in ("fp32", "int8_fx")})
    latency = replace(evidence.measured, latency=replace(evidence.latency, rows=(alone,)))
    assert judge(strict, evidence.fp32, evidence.int8, latency).gate.passed
    unverified = replace(evidence.int8, verified=False)
    assert not judge(CONFIG, evidence.fp32, unverified, evidence.measured).gate.passed


def test_the_accuracy_of_bf16_stands_for_what_is_compiled_in_bf16(evidence: Evidence) -> None:
    row = evidence.latency.rows[0]
    timed = {"fp32": 1.0, "bf16_compiled": 0.2, "bf16_compiled_folded": 0.1, "int8_fx": 0.1}
    rows = (replace(row, stats={name: row.stats["fp32"] for name in timed}),)
    measured = replace(evidence.measured, latency=replace(evidence.latency, rows=rows))
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)
    assert measured.fair_floats(GateConfig()) == ("fp32",)
    assert replace(measured, bf16=bf16).fair_floats(GateConfig()) == ("fp32", "bf16_compiled")
    folded = replace(measured, folded_bf16={"bf16_folded": bf16})
    assert folded.fair_floats(GateConfig()) == ("fp32", "bf16_compiled_folded")


def test_a_compiled_float_is_timed_where_it_is_asked_for_and_a_compiler_is_there(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(host, features=("AVX2",))
    (tmp_path / "mine").touch(mode=0o755)
    for found, why in ((str(tmp_path / "mine"), ""), (str(tmp_path / "gone"), "no C++ compiler is installed")):
        monkeypatch.setenv("CXX", found)
        assert measure.why_not_timed("fp32_compiled", CONFIG, old).startswith(why)
        assert bool(measure.why_not_timed("fp32_compiled", CONFIG, old)) == bool(why)
        assert measure.why_not_timed("bf16_compiled", CONFIG, old)
        asked = parse_yaml("latency: {baselines: [fp32_compiled]}")
        assert measure.why_not_timed("bf16_compiled", asked, host) == "it is not among --baselines"
