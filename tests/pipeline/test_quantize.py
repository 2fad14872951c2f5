"""What is said where ranges are reduced, and when OpenVINO runs a file too; the stage itself is in test_jobs.py."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import latency_row
from torch import Tensor, nn

from qexp.config import Config, GateConfig, QuantizeConfig, parse_yaml
from qexp.data.datasets import Dataset
from qexp.measurement import sweep_models
from qexp.measurement.accuracy import measure_accuracy, predict_logits
from qexp.measurement.host import read_host
from qexp.measurement.latency import LatencyResult
from qexp.measurement.sweep import SweepRequest
from qexp.measurement.sweep_models import SweepModel, folded_baselines, load, prepare_baseline
from qexp.models.classifier import ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.pipeline import measure, quantize
from qexp.pipeline.decide import decide
from qexp.pipeline.jobs import quantize_all
from qexp.pipeline.measure import ToTime, measure_bf16, time_versions
from qexp.pipeline.quantize import foldings, other_runtimes, warn_of_reduced_range
from qexp.pipeline.setup import Setup
from qexp.pipeline.unregistered import Unregistered
from qexp.report.results import Evidence
from qexp.tracking.results import Fp32


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
        def __init__(self, bf16: bool) -> None:
            assert not bf16

        def __call__(self, images: Tensor) -> Tensor:
            return self.module(images)

        def module(self, images: Tensor) -> Tensor:
            found: Tensor = computes(images)
            return found

    def fails(images: Tensor) -> Tensor:
        raise RuntimeError("unsupported operation\nmore of it")

    int8: Any = SimpleNamespace(flavor="onnx", module=rounded, source=fp32, in_openvino=InOpenvino)

    def found() -> Any:
        logits = {"test": predict_logits(rounded, digits.test.images)}
        return quantize._in_runtime("openvino", int8, digits.train, digits, exact, logits)

    computes: Any = rounded
    logits = predict_logits(rounded, digits.test.images)
    assert found().accuracy["test"] == measure_accuracy(logits, digits.test.labels)
    computes = fails
    assert "unsupported operation" in found() and "more of it" not in found()
    computes = lambda images: -fp32(images)  # noqa: E731
    assert "its int8 kernels compute something else" in found()
    monkeypatch.setattr(quantize, "check_kernels", lambda *given: 0.0)
    computes = lambda images: torch.full((len(images), 10), torch.nan)  # noqa: E731
    assert "points below that in ONNX Runtime" in found()


def test_the_runtimes_beside_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is tried where the CPU has it and the file computes in float what int8 has no kernels for."""

    def others(backend: Any = None, flavor: str = "onnx", floats: bool = True, features: str = "AMX-bf16") -> Any:
        int8: Any = SimpleNamespace(flavor=flavor, computes_in_float=floats)
        config = Config(quantize=QuantizeConfig(backend=backend))
        return other_runtimes(config, replace(read_host(1), features=(features,)), int8)

    assert others() == ("openvino", "openvino_bf16")
    assert others(floats=False) == others(features="AVX512-VNNI") == others("openvino") == ("openvino",)
    assert others("openvino_bf16", floats=False) == ("openvino_bf16",)
    assert others("onnxruntime") == others(flavor="pytorch") == ()
    monkeypatch.setattr(quantize, "has_openvino", lambda: False)
    assert others() == ()


class _Narrow(nn.Module):
    """As a VGG at 32 px: a pool that repeats a 1x1 map before the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.MaxPool2d(4))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(nn.Linear(8 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def test_where_a_pool_folds_away_there_are_two_versions_and_folded_floats(
    digits: Dataset, evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own name, size and MACs; and nothing more where nothing folds, or nobody wants it."""
    few = "{engine: fx, backend: x86, observer: minmax, calibration_samples: 8, sensitivity_images: 0}"
    config = parse_yaml(f"data: {{image_size: 16}}\nquantize: {few}\nlatency: {{baselines: [fp32_eager, bf16]}}")
    host = replace(read_host(1), features=("AVX512-BF16",))
    torch.manual_seed(0)
    model = build_classifier(ModelSpec("smallnet", digits.classes, squashed(16)), digits.train.images)
    some = replace(digits, test=digits.test.subset(torch.arange(20)))
    job = Unregistered(host, tmp_path, model)

    def fp32() -> Fp32:
        nothing: Any = SimpleNamespace(uri="fp32", run_id="")
        return Fp32(model, nothing, nothing, {"test": predict_logits(model, some.test.images)})

    assert foldings(config, fp32()) == (False,), "a SmallNet has no such pool"
    model.network = _Narrow()
    model.eval()
    as_told = {fold: config.quantize.with_folding(fold) for fold in (True, False)}
    for fold, options in as_told.items():
        assert foldings(config.model_copy(update={"quantize": options}), fp32()) == (fold,)
    found = quantize_all(job, Setup(config, host, some), fp32())
    plain, small = found.int8s
    assert (plain.quantize.label, small.quantize.label) == ("fx", "fx_folded") and not found.failed
    assert plain.version_uri != small.version_uri
    assert plain.size_bytes - small.size_bytes > 48 * 8 * 32 * 0.9, "a byte for each weight that is gone"
    assert plain.cost == plain.fp32_cost == small.fp32_cost
    assert plain.cost.macs[1] - small.cost.macs[1] == plain.cost.parameters - small.cost.parameters == 48 * 8 * 32
    assert small.accuracy["test"].top1_percent == pytest.approx(plain.accuracy["test"].top1_percent, abs=10)

    bf16 = measure_bf16(config, host, some, model, fp32().logits["test"], folded=True)
    assert bf16["bf16"].size_bytes - bf16["bf16_folded"].size_bytes > 2 * 48 * 8 * 32 * 0.9
    asked = list[SweepRequest]()

    def sweep(request: SweepRequest, environment: dict[str, str]) -> LatencyResult:
        asked.append(request)
        times = {one.name: 1.0 for one in request.models} | {"int8_fx_folded": 0.5}
        return LatencyResult("fp32", (latency_row(1, times),), (), 1)

    monkeypatch.setattr(measure, "run_sweep", sweep)
    monkeypatch.setattr(sweep_models, "load_classifier", lambda file: copy.deepcopy(model))
    job.places["fp32"], job.weights = tmp_path, tmp_path / "weights.safetensors"
    times = {one.version_uri: ToTime.of(one) for one in found.int8s}
    with job.files("fp32", *times) as files:
        latency = time_versions(config, host, files, times, bf16, {})
        time_versions(config, host, files, {plain.version_uri: times[plain.version_uri]}, bf16, {})
    both, alone = ([one.name for one in request.models] for request in asked)
    assert alone == ["fp32", "fp32_eager", "bf16", "int8_fx"]
    assert both == ["fp32", "fp32_eager", "bf16", "bf16_folded", "int8_fx", "int8_fx_folded"]
    assert latency.fair_floats(GateConfig(max_top1_drop=99)) == ("fp32", "fp32_eager", "bf16", "bf16_folded")
    assert latency.fair_floats(GateConfig(max_top1_drop=-99)) == ("fp32", "fp32_eager")
    judged = decide(config, evidence.fp32, found.int8s, latency).versions
    assert {one.name: one.int8 for one in judged} == {"int8_fx": plain, "int8_fx_folded": small}

    images = some.test.pixels()[:4].float() / 255
    with torch.no_grad():
        for name in folded_baselines(["fp32_openvino", "bf16"]) + folded_baselines(["fp32_eager"]):
            if name.startswith("fp32_o"):
                pytest.importorskip("openvino")
            prepare_baseline(job.weights, tmp_path, name, (3, 16, 16), tmp_path)
            logits = load(SweepModel(name, str(tmp_path)), tmp_path)(images)
            assert torch.allclose(logits, model(images), atol=0.05 if name == "bf16_folded" else 1e-5), name
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "fp32_onnx_folded.onnx").stat().st_size < weights / 3
