"""The programs in benchmarks/ start, and what is committed of them is what they write."""

import importlib
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY, latency_row

from qexp.files import from_json

BENCHMARKS = REPOSITORY / "benchmarks"
PROGRAMS = (
    "peers",
    "recipe",
    "search",
    "serving",
    "training",
    "classifiers",
    "engines",
    "execution",
    "floats",
    "picture",
    "images",
)
COMMITTED = REPOSITORY / "results" / "peers.json"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peer_results")


def _run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    file = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    runpy.run_path(file, run_name="__main__")


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _run(name, "--help", monkeypatch=monkeypatch)
    assert ended.value.code == 0 and "--output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a --model-uri, or an --earlier result"),
        (("--model-uri", "models:/nothing/1", "--rounds", "5"), "--rounds 5: must be at least 6"),
    ],
)
def test_peers_refuses_what_it_cannot_measure(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _run("peers", *arguments, monkeypatch=monkeypatch)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_peers_page_is_that_of_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "peers"
    _run("peers", "--earlier", str(COMMITTED), "--output", str(output), monkeypatch=monkeypatch)
    assert output.with_suffix(".md").read_text() == COMMITTED.with_suffix(".md").read_text()
    assert output.with_suffix(".json").read_text() == COMMITTED.read_text()
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "p50 in ms by batch size" in capsys.readouterr().out


def test_a_ratio_below_one_is_faster_than_the_best_peer(results: ModuleType) -> None:
    row = latency_row(1, {"fx": 1.0, "openvino": 4.0, "onnxruntime": 2.0})
    assert results.best_peer(row) == "onnxruntime"
    assert results.ratio_to_best(row, "fx").median == pytest.approx(0.5, rel=0.02)


def test_the_chosen_version_is_held_against_peers_floats_and_the_cpu(results: ModuleType) -> None:
    peers = from_json(tuple[results.Peers, ...], COMMITTED.read_text())[0]  # type: ignore[name-defined]
    times = {"fx": 4.0, "onnx": 1.0, "onnxruntime": 2.0, "openvino": 3.0, "fp32_onnx": 8.0, "bf16_openvino": 6.0}
    rows = (latency_row(1, times), latency_row(8, times | {"onnx": 5.0}))
    limits = replace(peers.limits, int8_gmacs_per_s=236.8, clock_ghz=3.7, int8_macs_a_cycle=64)
    changed = replace(peers, rows=rows, chosen="onnx", not_chosen={"fx": "slow"}, limits=limits, profiles={})
    text = results.render(replace(changed, failed={"pt2e_compiled.pt2": "no"}))
    assert "chooses **onnx**. A peer is shown to be faster at batch size 8 (2.5" in text
    assert "Not chosen: `fx`: slow." in text and "Not made: `pt2e_compiled.pt2` (no)." in text
    assert "| fastest float | bf16_openvino | bf16_openvino |" in text
    assert "50 % of the 474 G that 2 cores at 3.70 GHz with 64 a cycle can do at most" in text


def test_clock_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    clock = importlib.import_module("limits")._clock_ghz()
    assert clock is None or 0.5 < clock < 8
