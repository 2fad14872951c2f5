"""The latency sweep as a process of its own, what it compares with, and what happens when it fails."""

import os
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import Finished

from qexp import contenders, registry, sweep
from qexp.config import LatencyConfig
from qexp.contenders import Contender, int8_contenders
from qexp.data import Dataset
from qexp.errors import StageError
from qexp.evaluation import to_float
from qexp.latency import StartUp
from qexp.sweep import SweepRequest, run_sweep

BASELINES = ["bf16", "fp32_traced", "fp32_onnx", "fp32_eager"]
OPTIONS = LatencyConfig(batch_sizes=[1, 4], baselines=BASELINES, warmup=1, loads=3, min_repeats=6, min_seconds=0.0)


def _request(fp32: str, int8: str, options: LatencyConfig = OPTIONS) -> SweepRequest:
    floats = [Contender(name, fp32) for name in ("fp32", *options.baselines)]
    int8s = int8_contenders(int8, "fx", ("x86", "onednn"))
    return SweepRequest((*floats, *int8s), int8s[0].name, 16, 1, options)


def test_sweep_of_registered_versions(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    names = ["fp32", *BASELINES, "int8_fx", "int8_fx_onednn"]
    result = run_sweep(_request(finished.summary["fp32"], finished.summary["int8"]), registry.child_environment(1))
    assert result.threads == 1 and result.baseline == "fp32" and [row.batch_size for row in result.rows] == [1, 4]
    for row in result.rows:
        assert list(row.stats) == list(row.speedups) == names and set(row.round_ms) == set(names)
        assert all(len(times) == 6 and min(times) > 0 for times in row.round_ms.values())
        assert all(stats.repeats >= 6 and stats.p50_ms > 0 for stats in row.stats.values())
        assert row.loads == (2, 2, 2) and row.enough and row.comparisons == 2 * 6
        assert row.activity is None or row.activity.own_cpu_s > 0 < row.activity.wall_s
        assert row.noise.low <= row.noise.median <= row.noise.high
        assert row.speedups["int8_fx"] == row.ratio("fp32", "int8_fx") and row.speedups["fp32"].median == 1
    assert [found.model for found in result.startups] == names
    for found in result.startups:
        assert 0 < found.load_s < 300 and found.first_call_ms > 0 and found.peak_memory_mb > 50


def test_a_sweep_that_fails_is_a_stage_error_that_names_its_versions(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    bare = OPTIONS.model_copy(update={"baselines": []})
    with pytest.raises(StageError, match=r"latency sweep of models:/nothing/1, models:/nothing/2 failed with exit co"):
        run_sweep(_request("models:/nothing/1", "models:/nothing/2", bare), registry.child_environment(1))


def test_baselines_compute_what_the_registered_fp32_version_computes(
    finished: Finished, digits: Dataset, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(finished.uri)
    fp32 = finished.summary["fp32"]
    for name in BASELINES:
        contenders.prepare_baseline(fp32, name, 16, tmp_path)
    images = to_float(digits.test.images[:32])
    with torch.no_grad():
        expected = contenders.load(Contender("fp32", fp32), tmp_path)(images)
        found = {name: contenders.load(Contender(name, fp32), tmp_path)(images) for name in BASELINES}
    for name in ("fp32_traced", "fp32_onnx", "fp32_eager"):
        assert torch.allclose(found[name], expected, atol=1e-4), name
    assert found["bf16"].dtype == torch.float32 and not torch.equal(found["bf16"], expected)
    assert torch.allclose(found["bf16"], expected, atol=0.3)
    assert (found["bf16"].argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_names_of_int8_contenders() -> None:
    both = int8_contenders("models:/a/1", "fx", ("x86", "onednn"))
    assert both == (Contender("int8_fx", "models:/a/1", "x86"), Contender("int8_fx_onednn", "models:/a/1", "onednn"))
    assert int8_contenders("models:/a/1", "onnx", (None,)) == (Contender("int8_onnx", "models:/a/1"),)


def test_a_version_is_loaded_with_the_kernels_of_its_contender(finished: Finished, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(finished.uri)
    try:
        for contender in int8_contenders(finished.summary["int8"], "fx", ("onednn", "x86")):
            contenders.load(contender, tmp_path)
            assert torch.backends.quantized.engine == contender.backend
    finally:
        torch.backends.quantized.engine = "x86"


def test_baselines_that_cannot_be_made_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(uri: str, name: str, *given: object) -> None:
        if name == "fp32_onnx":
            raise ValueError("no such operator")
        if name == "bf16":
            os._exit(9)  # as if it had been killed

    def start(contender: Contender, *given: object) -> StartUp:
        if contender.name == broken:
            raise ValueError("no such instruction")
        return StartUp(contender.name, 1.0, 1.0, 1.0)

    broken = "fp32_traced"
    monkeypatch.setattr(sweep, "prepare_baseline", refuse)
    monkeypatch.setattr(sweep, "fetch", lambda contenders, folder: contenders)
    monkeypatch.setattr(sweep, "_start_up", start)
    able = sweep._start_all(_request("models:/a/1", "models:/b/1"), tmp_path)
    assert [one.name for one in able] == ["fp32", "fp32_eager", "int8_fx", "int8_fx_onednn"]
    assert [found.model for found in able.values()] == ["fp32", "fp32_eager", "int8_fx", "int8_fx_onednn"]
    said = capsys.readouterr().err
    assert "baseline fp32_traced is left out: no such instruction" in said
    assert "baseline fp32_onnx is left out: no such operator" in said
    assert "baseline bf16 is left out: the process that loads it ended with exit code 9" in said
    broken = "int8_fx"
    with pytest.raises(StageError, match="int8_fx: no such instruction"):
        sweep._start_all(_request("models:/a/1", "models:/b/1"), tmp_path)
