"""The programs in benchmarks/ start, and what is committed of them is what they write."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY, latency_row

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
