"""The programs in benchmarks/ start, and what is committed of them is what they write and what README shows."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY, latency_row

from qexp.files import from_json
from qexp.measurement.latency import LatencyRow
from qexp.report.results import Evidence

BENCHMARKS = REPOSITORY / "benchmarks"
PROGRAMS = ("peers", "recipe", "search", "serving", "training", "classifiers", "execution")
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


def test_readme_shows_the_ratios_of_peers(results: ModuleType) -> None:
    vgg, small = from_json(tuple[results.Peers, ...], COMMITTED.read_text())
    readme = (REPOSITORY / "README.md").read_text()
    for name, found, model in (
        ("VGG16", vgg, "fx"),
        ("VGG16, `fold_pool`", vgg, "fx_folded"),
        ("SmallNet", small, "fx"),
    ):
        cells = [_cell(row, results.best_peer(row), model) for row in found.rows]
        assert f"| {name} | {' | '.join(cells)} |" in readme


def _cell(row: LatencyRow, peer: str, model: str) -> str:
    """As README writes it: in brackets where the noise does not let tell."""
    text = f"{row.ratio(model, peer).median:.2f}"
    return text if row.compared(peer, model) else f"({text})"


@pytest.mark.parametrize("name", ["vgg16-cifar10", "smallnet-cifar10"])
def test_readme_shows_the_figures_of_the_real_runs(name: str) -> None:
    found = from_json(Evidence, (COMMITTED.parent / name / "metrics.json").read_text())
    drop, (first, *_, last) = found.int8.comparison["test"], found.latency.rows
    accuracy = [model.accuracy["test"] for model in (found.fp32, found.int8)]
    low, high = min(found.speedups), max(found.speedups)
    cells = [
        *(f"{one.top1_percent:.2f} / {one.top3_percent:.2f}" for one in accuracy),
        f"{drop.top1_drop_points:.2f} ({drop.top1_drop_low_points:+.2f} to {drop.top1_drop_high_points:+.2f})",
        f"{found.fp32.size_bytes / 1e6:.2f}",
        f"{found.int8.size_bytes / 1e6:.2f} ({found.size_ratio:.2f}x smaller)",
        *(f"{row.stats['fp32'].p50_ms:.2f}" for row in (first, last)),
        *(
            f"{row.stats[found.name].p50_ms:.2f} ({row.speedups[found.name].median:.2f}x faster)"
            for row in (first, last)
        ),
        f"{low:.2f}x to {high:.2f}x",
    ]
    shown = (REPOSITORY / "README.md").read_text()
    assert [cell for cell in cells if f"| {cell} |" not in shown] == []


def test_a_ratio_below_one_is_faster_than_the_best_peer(results: ModuleType) -> None:
    row = latency_row(1, {"fx": 1.0, "openvino": 4.0, "onnxruntime": 2.0})
    assert results.best_peer(row) == "onnxruntime"
    assert results.ratio_to_best(row, "fx").median == pytest.approx(0.5, rel=0.02)
