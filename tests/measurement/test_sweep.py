"""The latency sweep as a process of its own, what it compares with, and what happens when it fails."""

import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import cast

import mlflow
import pytest
import torch
from conftest import Finished
from torch import Tensor, nn

from qexp.config import LatencyConfig
from qexp.data.datasets import Dataset
from qexp.errors import StageError
from qexp.measurement import sweep, sweep_models
from qexp.measurement.accuracy import to_float
from qexp.measurement.child import in_fork
from qexp.measurement.compiled import has_compiler
from qexp.measurement.latency import StartUp
from qexp.measurement.sweep import Started, SweepRequest, expected_s, fitting, run_sweep
from qexp.measurement.sweep_models import Predict, SweepModel, backend_in, int8_models
from qexp.models.names import RUNTIMES
from qexp.models.preprocessing import Shape
from qexp.models.program import load_program
from qexp.pipeline.loading import local_files
from qexp.quantization.equivalence import sqnr_db
from qexp.tracking import registry

BASELINES = ["fp32_eager", "fp32_traced", "bf16", "fp32_onnx", "fp32_openvino", "bf16_openvino"]
OPTIONS = LatencyConfig(batch_sizes=[1, 4], baselines=BASELINES, warmup=1, loads=3, min_repeats=6, min_seconds=0.0)


def _request(fp32: str, int8: str, weights: Path, options: LatencyConfig = OPTIONS) -> SweepRequest:
    floats = [SweepModel(name, fp32) for name in ("fp32", *options.baselines)]
    int8s = int8_models(int8, "fx", ("x86", "onednn"))
    return SweepRequest((*floats, *int8s), int8s[0].name, str(weights), (3, 16, 16), 1, options)


def test_sweep_of_registered_versions(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    baselines = ["fp32_eager", "fp32_onnx", "bf16_openvino"]
    names = ["fp32", *baselines, "int8_fx", "int8_fx_onednn"]
    fp32, int8 = finished.summary["fp32"], finished.summary["int8"]
    with local_files(fp32, int8) as files:
        options = OPTIONS.model_copy(update={"baselines": baselines})
        request = _request(files.folders[fp32], files.folders[int8], files.weights, options)
        result = run_sweep(request, registry.child_environment(1))
    assert result.threads == 1 and result.baseline == "fp32" and [row.batch_size for row in result.rows] == [1, 4]
    for row in result.rows:
        assert list(row.stats) == list(row.speedups) == names and set(row.round_ms) == set(names)
        assert all(len(times) == 6 and min(times) > 0 for times in row.round_ms.values())
        assert all(stats.repeats >= 6 and stats.p50_ms > 0 for stats in row.stats.values())
        assert row.loads == (2, 2, 2) and row.enough and row.comparisons == 2 * (len(names) - 1)
        assert row.activity is None or row.activity.own_cpu_s > 0 < row.activity.wall_s
        assert row.noise.low <= row.noise.median <= row.noise.high
        assert row.speedups["int8_fx"] == row.ratio("fp32", "int8_fx") and row.speedups["fp32"].median == 1
    assert [found.model for found in result.startups] == names
    for found in result.startups:
        assert 0 < found.load_s < 300 and found.first_call_ms > 0 and found.peak_memory_mb > 50


def test_a_sweep_that_fails_is_a_stage_error_that_names_its_models(tmp_path: Path) -> None:
    few = OPTIONS.model_copy(update={"baselines": []})
    request = _request(str(tmp_path), str(tmp_path), tmp_path / "model.safetensors", few)
    with pytest.raises(StageError, match=r"latency sweep of fp32, int8_fx, int8_fx_onednn failed with exit code 1"):
        run_sweep(request, registry.child_environment(1))


def test_baselines_compute_what_the_registered_fp32_version_computes(
    finished: Finished, digits: Dataset, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(finished.uri)
    fp32 = finished.summary["fp32"]
    images = to_float(digits.test.images[:32])
    with torch.no_grad(), local_files(fp32) as files:
        for name in BASELINES:
            sweep_models.prepare_baseline(files.weights, Path(files.fp32_folder), name, (3, 16, 16), tmp_path)
        folder = files.folders[fp32]
        expected = sweep_models.load(SweepModel("fp32", folder), tmp_path)(images)
        found = {name: sweep_models.load(SweepModel(name, folder), tmp_path)(images) for name in BASELINES}
    for name in ("fp32_traced", "fp32_onnx", "fp32_eager", "fp32_openvino"):
        assert torch.allclose(found[name], expected, atol=1e-4), name
    for name in ("bf16", "bf16_openvino"):
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], expected, atol=0.3)
        assert (found[name].argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert not torch.equal(found["bf16"], expected)


class _AsksForTheBatch(nn.Module):
    """Its shapes hold the number of images, as those of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.first = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        count, length, width = tokens.shape
        heads = tokens.transpose(0, 1).reshape(length, count * 2, width // 2).transpose(0, 1)
        mixed = heads.softmax(1).reshape(count, 2, length, width // 2).transpose(1, 2).reshape(count, length, width)
        return self.last(torch.cat([self.first.expand(count, -1, -1), mixed], 1).mean(1))


def test_an_exported_program_is_traced_for_batches_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(_AsksForTheBatch().eval(), (torch.rand(2, 3, 16, 16),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    model, images = load_program(tmp_path / "model.pt2"), torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        traced = sweep_models.freeze(model, (3, 16, 16), torch.float32)
        assert torch.allclose(traced(images), expected, atol=1e-6)


def test_batch_sizes_end_where_a_pass_of_the_slowest_model_takes_longer_than_a_second() -> None:
    vgg16_at_32_px = {1: 0.023, 2: 0.027, 4: 0.048, 8: 0.073, 16: 0.1, 32: 0.15, 64: 0.28, 128: 0.62}
    assert fitting(vgg16_at_32_px) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert fitting({1: 0.1, 2: 0.2, 4: 0.9, 8: 1.01}) == [1, 2, 4]
    assert fitting({1: 7.0}) == [1], "one is always timed"


@pytest.mark.parametrize("chosen", [True, False])
def test_large_batch_sizes_are_left_out_unless_they_are_chosen(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(model: SweepModel, size: int, options: LatencyConfig, folder: Path) -> Started:
        factor = {"fp32": 0.01, "int8_fx": 0.03}.get(model.name, 0.001)  # at 32 and 64 images: int8 is the slowest
        sizes = [size for size in options.batch_sizes if factor * size <= 2]
        largest = sizes[-1] if options.fits_batch_sizes else options.batch_sizes[-1]
        return Started(StartUp(model.name, 1.0, 1.0, largest), {size: factor * size for size in sizes})

    monkeypatch.setattr(sweep, "_start_up", start)
    given = LatencyConfig(baselines=[], fit_batch_sizes=False if chosen else None)
    able, options, because, _ = sweep._start_all(_request("a", "b", tmp_path, given), tmp_path)
    assert [one.name for one in able] == ["fp32", "int8_fx", "int8_fx_onednn"]
    if chosen:
        assert options == given and not because and capsys.readouterr().err == ""
        return
    assert options.batch_sizes == [1, 2, 4, 8, 16, 32]
    assert {one.startup.peak_memory_mb for one in able.values()} == {32}, "memory is that of the largest size timed"
    assert because == "one pass of int8_fx at batch size 64 takes 1.9 s"
    assert f"batch sizes left out: 64, 128: {because}" in capsys.readouterr().err


def test_the_expected_time_is_that_of_rounds_loads_and_warm_up() -> None:
    options = LatencyConfig(batch_sizes=[1, 8], warmup=3, loads=2, min_repeats=10, min_seconds=0.0)
    slow = {1: 0.5, 8: 4.0}
    found = expected_s([slow, slow], 1.5, options)
    assert found[1] == pytest.approx(10 * 2 * 0.52 + 4 * 1.0 + 2 * 1.5)
    assert found[8] == pytest.approx(10 * 2 * 4.02 + 4 * 8.0 + 2 * 1.5)
    fast = expected_s([{1: 1e-4, 8: 1e-3}], 0.0, options)
    assert fast[1] == pytest.approx(10 * 0.06, rel=0.01), "a round of a fast model has a least length"


def test_what_is_compiled_is_timed_where_it_may_be_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compiled for the largest batch size alone, as long as another float is clearly faster there."""

    def prepare(weights: Path, stored: Path, name: str, shape: Shape, folder: Path, batch_sizes: list[int]) -> None:
        if name == "bf16_compiled_folded":
            raise ValueError("no such operator")
        for size in batch_sizes:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / str(size)).touch()

    def load(model: SweepModel, folder: Path) -> Predict:
        return lambda images: time.sleep(pass_s[model.name])

    pass_s = {
        "fp32": 0.03, "bf16": 0.01, "fp32_onnx": 0.02, "fp32_onnx_folded": 0.01, "bf16_folded": 0.005, "int8_fx": 0.001,
        "fp32_compiled": 0.01, "bf16_compiled": 0.02, "fp32_compiled_folded": 0.02, "bf16_compiled_folded": 0.001,
    }  # fmt: skip
    floats = tuple(SweepModel(name, "a") for name in pass_s if name != "int8_fx")
    options = LatencyConfig(batch_sizes=[1, 2, 4], fit_batch_sizes=False)
    request = SweepRequest((*floats, SweepModel("int8_fx", "b")), "int8_fx", "weights", (3, 8, 8), 1, options)
    monkeypatch.setattr(sweep, "prepare_baseline", prepare)
    monkeypatch.setattr(sweep, "load", load)
    monkeypatch.setattr(sweep, "TRIAL_ROUNDS", 2)
    able, _, _, gone = sweep._start_all(request, tmp_path)
    left_out = ["bf16_compiled", "fp32_compiled_folded", "bf16_compiled_folded"]
    assert [one.name for one in able] == [one.name for one in request.models if one.name not in left_out]
    assert sorted(os.listdir(tmp_path / "fp32_compiled")) == ["1", "2", "4"]
    assert not any((tmp_path / name).exists() for name in left_out)
    assert gone.pop("bf16_compiled_folded") == "no such operator"
    for name, rival in (("bf16_compiled", "bf16"), ("fp32_compiled_folded", "fp32_onnx_folded")):
        found = re.fullmatch(rf"at batch size 4 it takes (.*) times as long as {rival}", gone.pop(name))
        assert found and 1.5 < float(found[1]) < 2.5
    assert not gone
    said = capsys.readouterr().err
    assert "compiling fp32_compiled and bf16_compiled for batch size 4\n" in said
    assert "compiling fp32_compiled for batch size 1, 2\n" in said and said.count("compiling") == 3


@pytest.mark.long  # half a minute of compilation
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler is installed")
def test_a_compiled_float_computes_the_same_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 it is no farther from fp32 than what TorchScript makes, whose accuracy stands for it."""
    monkeypatch.delenv("CXX")  # which inductor has read when it was imported
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "g++"))
    assert has_compiler()
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Hardswish(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    monkeypatch.setattr(sweep_models, "load_classifier", lambda file: model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    for name, sizes in (("fp32_compiled", [1, 30]), ("bf16_compiled", [30]), ("bf16", [])):
        made = partial(sweep_models.prepare_baseline, tmp_path / "weights", tmp_path, name, (3, 8, 8), tmp_path)
        in_fork(partial(made, sizes))
    assert sorted(os.listdir(tmp_path / "fp32_compiled")) == ["1.pt2", "30.pt2"]
    names = ("fp32_compiled", "bf16_compiled", "bf16")
    compiled, rounded, traced = (sweep_models.load(SweepModel(name, ""), tmp_path) for name in names)
    with torch.no_grad():
        for size in (1, 30):
            images = torch.rand(size, 3, 8, 8)
            assert torch.allclose(cast(Tensor, compiled(images)), model(images), atol=1e-5)
        found = [sqnr_db(model(images), cast(Tensor, run(images))) for run in (rounded, traced)]
    assert 60 > found[0] > found[1] - 1 > 25
    del compiled, rounded
    left = sorted(os.listdir(tmp_path / "fp32_compiled"))
    assert left == ["1.pt2", "30.pt2", "cache"], "what torch has unpacked is gone"
    assert not os.listdir(tmp_path / "elsewhere")


def test_names_of_int8_models() -> None:
    both = int8_models("a", "fx", ("x86", "onednn"))
    assert both == (SweepModel("int8_fx", "a", "x86"), SweepModel("int8_fx_onednn", "a", "onednn", False))
    both = int8_models("a", "onnx", RUNTIMES)
    assert both == (
        SweepModel("int8_onnx", "a", "onnxruntime"),
        SweepModel("int8_onnx_openvino", "a", "openvino", False),
        SweepModel("int8_onnx_openvino_bf16", "a", "openvino_bf16", False),
    )
    names = [one.name for one in int8_models("a", "onnx", RUNTIMES, is_folded=True)]
    for found in ([one.name for one in both], names):
        assert [backend_in(name, "onnx") for name in found] == [None, "openvino", "openvino_bf16"]
    assert int8_models("a", "pt2e", (None,)) == (SweepModel("int8_pt2e", "a"),)


def test_a_runtime_that_does_not_take_the_file_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(model: SweepModel, size: int, options: LatencyConfig, folder: Path) -> Started:
        if model.backend == broken:
            raise ValueError("unsupported operation")
        return Started(StartUp(model.name, 1.0, 1.0, 100.0), {1: 0.01})

    monkeypatch.setattr(sweep, "_start_up", start)
    models, options = int8_models("a", "onnx", RUNTIMES[:2]), LatencyConfig(batch_sizes=[1], baselines=[])
    request = SweepRequest(models, "int8_onnx", "b", (3, 16, 16), 1, options)
    broken = "openvino"
    able, _, _, gone = sweep._start_all(request, tmp_path)
    assert [one.name for one in able] == ["int8_onnx"] and gone == {"int8_onnx_openvino": "unsupported operation"}
    assert "int8_onnx_openvino is left out: unsupported operation" in capsys.readouterr().err
    broken = "onnxruntime"
    with pytest.raises(StageError, match=r"^int8_onnx: unsupported operation"):
        sweep._start_all(request, tmp_path)


def test_a_version_is_loaded_with_the_kernels_that_it_names(finished: Finished, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(finished.uri)
    try:
        int8 = finished.summary["int8"]
        with local_files(finished.summary["fp32"], int8) as files:
            for model in int8_models(files.folders[int8], "fx", ("onednn", "x86")):
                sweep_models.load(model, tmp_path)
                assert torch.backends.quantized.engine == model.backend
    finally:
        torch.backends.quantized.engine = "x86"


def test_baselines_that_cannot_be_made_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(weights: Path, stored: Path, name: str, *given: object) -> None:
        if name == "fp32_onnx":
            raise ValueError("no such operator")
        if name == "bf16":
            os._exit(9)  # as if it had been killed

    def start(model: SweepModel, *given: object) -> Started:
        if model.name == broken:
            raise ValueError("no such instruction")
        return Started(StartUp(model.name, 1.0, 1.0, 1.0), {1: 0.1, 4: 0.2})

    broken = "fp32_traced"
    monkeypatch.setattr(sweep, "prepare_baseline", refuse)
    monkeypatch.setattr(sweep, "_start_up", start)
    able, options, _, gone = sweep._start_all(_request("a", "b", tmp_path), tmp_path)
    assert options == OPTIONS
    names = ["fp32", "fp32_eager", "fp32_openvino", "bf16_openvino", "int8_fx", "int8_fx_onednn"]
    assert [one.name for one in able] == [one.startup.model for one in able.values()] == names
    said = capsys.readouterr().err
    assert "baseline fp32_traced is left out: no such instruction" in said
    assert "baseline fp32_onnx is left out: no such operator" in said
    assert "baseline bf16 is left out: the process that loads it ended with exit code 9" in said
    assert gone["fp32_onnx"] == "no such operator" and set(gone) == {"fp32_onnx", "fp32_traced", "bf16"}
    broken = "int8_fx"
    with pytest.raises(StageError, match="int8_fx: no such instruction"):
        sweep._start_all(_request("a", "b", tmp_path), tmp_path)
