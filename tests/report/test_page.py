"""The page and metrics.json: every figure in them is a field of the evidence, and the page needs nothing else."""

import base64
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from cases import CASES, ONNX, ORIGIN, judged, keep_float, not_measured, ship_int8, with_onnx
from conftest import REPOSITORY, with_int8, with_rows
from markdown import Markdown
from nasty import Page, nasty

from qexp.config import GateConfig
from qexp.files import from_json, to_json
from qexp.foundation.text import printable
from qexp.measurement.accuracy import Accuracy, share_interval
from qexp.measurement.sweep_models import BASELINE
from qexp.report.page import Origin, render_html, render_markdown, write_report
from qexp.report.results import Bf16Evidence, Evidence
from qexp.report.tables import markdown
from qexp.tracking.runs import run_page

SECTIONS = [
    "# Can smallnet, trained on digits, ship as int8 on this CPU?",
    "## Training",
    "## Effect of quantization on accuracy",
    "## Effect of quantization on model size",
    "## Effect of quantization on MAC operations",
    "## Effect of quantization on inference time",
    "## Other int8 versions",
    "## Layer sensitivity",
    "## Accuracy budget",
    "## Environment",
]
PICTURES = [
    "accuracy_curve", "loss_curve", "accuracy_against_loss", "accuracy_bars", "model_size", "macs", "inference_time",
    "sensitivity",
]  # fmt: skip


@pytest.fixture(scope="module")
def full(evidence: Evidence) -> Evidence:
    """With every section."""
    return ship_int8(evidence)


@pytest.fixture(scope="module")
def folder(full: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole report in it."""
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_report(full, folder, ORIGIN) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def _tables(text: str) -> dict[str, list[list[list[str]]]]:
    """By section, the rows of each of its tables, headers first."""
    found = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
        rows = [[re.split(r" \| ", row.strip("| \n")) for row in table.splitlines()] for table in tables]
        found[part.splitlines()[0]] = [[row for row in table if row[0] != ":--"] for table in rows]
    return found


def _cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.removeprefix("| ").removesuffix(" |").split(" |")[1:]]


# --- the order, and that nothing else is needed


def test_the_verdict_comes_first_then_the_sections(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == SECTIONS
    assert re.findall(r"!\[.*?\]\(figures/(\w+)\.png\)", text) == PICTURES
    blocks = text.split("\n\n")
    assert blocks[1].startswith("**Ship int8.** ") and blocks[2].startswith("| ")
    top = text.split("## Training")[0]
    assert len(_tables(top)) == 1 and 'qexp.load("models:/smallnet-digits-int8/1")' in top
    assert top.rstrip().endswith(
        "Report of 2026-11-26, MLflow run [`0123456789abcdef0123456789abcdef`]"
        "(https://mlflow.example/#/experiments/1/runs/0123)."
    )


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (Origin(), ""),
        (Origin("2026-11-26"), "Report of 2026-11-26."),
        (Origin("2026-11-26", "abc"), "Report of 2026-11-26, MLflow run `abc`."),
    ],
)
def test_what_is_not_known_of_the_run_is_not_said(evidence: Evidence, origin: Origin, line: str) -> None:
    assert origin.line == line
    assert ("MLflow run" in render_markdown(evidence, origin)) == ("MLflow run" in line)


def test_another_report_in_the_same_folder(evidence: Evidence, folder: Path, tmp_path: Path) -> None:
    """It takes the place of the first; sections without a measurement are left out."""
    for name in ("report.md", "report.html", "metrics.json"):
        shutil.copy(folder / name, tmp_path)
    page = write_report(with_int8(evidence, sensitivity=None), tmp_path)
    left_out = ("## Other int8 versions", "## Layer sensitivity", "## Accuracy budget")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [name for name in SECTIONS if name not in left_out]
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == sorted(PICTURES[:-1])
    assert page.read_text().count("data:image/png;base64,") == 6
    assert from_json(Evidence, (tmp_path / "metrics.json").read_text()).int8.sensitivity is None


def test_page_needs_no_other_file(page: str, folder: Path) -> None:
    """But for the link to the run. The inference time is a chart, once, and no picture."""
    targets = re.findall(r"""<[^>]*\b(?:src|href|srcset|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets.pop(0) == ORIGIN.run_url
    data = "data:image/png;base64,"
    assert [base64.b64decode(target.removeprefix(data)) for target in targets] == [
        (folder / "figures" / f"{name}.png").read_bytes() for name in PICTURES if name != "inference_time"
    ]
    assert not re.search(r"<(link|iframe|object)\b|<script[^>]*src|url\(|@import|fetch\(|XMLHttp", page)
    assert page.count('id="latency-chart"') == page.count("<script>") == 1
    assert (folder / "figures" / "inference_time.png").exists()


def test_page_has_title_headings_and_tables(page: str) -> None:
    assert "<title>Can smallnet, trained on digits, ship as int8 on this CPU?</title>" in page
    assert [html.unescape(heading) for heading in re.findall(r"<h[12]>(.*?)</h[12]>", page)] == [
        section.lstrip("# ") for section in SECTIONS
    ]
    assert page.count("<table>") == 9 and "<strong>Ship int8.</strong>" in page
    assert 'name="viewport"' in page and "<aten::roll>" not in page and "&lt;aten::roll&gt;" in page


@pytest.mark.parametrize("source", ["/data/__pets__", "/data/*all*", "/data/<new>", "/data/a_b & c"])
def test_folder_names_are_shown_as_they_are(full: Evidence, folder: Path, source: str) -> None:
    """None of their letters is Markdown or HTML."""
    named = replace(full, fp32=replace(full.fp32, data=replace(full.fp32.data, source=source)))
    page = render_html(named, folder)
    shown = html.unescape(re.sub(r"<[^>]*>", "", page.split("</h2>")[-1]))
    assert f"digits from {source}, digest" in shown


def test_no_text_of_others_is_markup(evidence: Evidence, folder: Path) -> None:
    """Names of folders, versions, layers, machines, and what libraries and tags say: a reader sees what was written."""
    cases = [(found, Page(render_html(found, folder))) for found in (ship_int8(evidence), not_measured(evidence))]
    names = (name.encode(errors="replace").decode() for name in nasty(130, seed=2))  # JSON has no other bytes
    for case, plain in cases * 10:
        text = to_json(case)
        ours = (
            "models:/smallnet-digits-int8/1",
            "models:/smallnet-digits-fp32/1",
            "network.0",
            "Imagined CPU",
            "sklearn.",
        )
        written = {old: f"{next(names)}{number}" for number, old in enumerate(ours) if old in plain.text}
        for old, new in written.items():
            text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        found = from_json(Evidence, text)
        reason = next(names)
        succession = replace(found.succession, reasons=(reason,)) if found.succession else None
        found = replace(found, failed_engines=dict.fromkeys(found.failed_engines, reason), succession=succession)
        page = Page(render_html(found, folder))
        assert page.counts == plain.counts and page.attributes <= plain.attributes and not page.open
        assert page.scripts == plain.scripts == 1 and all(one.startswith("data:image/png;") for one in page.addresses)
        told = Page(Markdown(extensions=["tables", "fenced_code"]).convert(render_markdown(found)))
        assert told.tags <= plain.tags and all(one.startswith("figures/") for one in told.addresses)
        for name in (*written.values(), *found.failed_engines.values()):
            shown = " ".join(printable(name).split())
            assert shown in " ".join(page.text.split()), name


def test_table_cells_cannot_break_the_table() -> None:
    assert markdown((["a", "b"], [["x|y", "1"]])).splitlines() == ["| a | b |", "| :-- | --: |", "| x\\|y | 1 |"]
    assert markdown((["a", "b"], [["x", "y"]]), numbers=False).splitlines()[1] == "| :-- | :-- |"


# --- the table at the top


def test_best_float_and_int8_stand_side_by_side(full: Evidence) -> None:
    text = render_markdown(full)
    drop, (first, _, last) = full.int8.comparison["test"], full.latency.rows
    for cell, accuracy in zip(
        _cells(text, "Top-1, 359 test images"), (full.fp32.accuracy, full.int8.accuracy), strict=False
    ):
        low, high = share_interval(accuracy["test"].top1_percent, 359)
        assert cell == f"{accuracy['test'].top1_percent:.2f} % ({low:.2f} to {high:.2f})"
    ends = f"{drop.top1_drop_low_points:.2f} to {drop.top1_drop_high_points:.2f}"
    assert _cells(text, "Top-1, 359 test images")[2:] == [
        f"drop 0.50 points ({ends})",
        f"at most {GateConfig().max_top1_drop:g} points",
        "1.3 points",
        "yes",
    ]
    assert _cells(text, "Size of the file") == [
        "1.800 MB", "0.450 MB", "4.00x smaller", "at least 3x", "4x", "yes",
    ]  # fmt: skip
    for row, best, times in ((first, "fp32_onnx", ("0.500", "0.200")), (last, "bf16", ("30.0", "9.00"))):
        ratio = row.ratio(best, "int8_fx_onednn")
        assert _cells(text, f"Time per batch, batch size {row.batch_size}") == [
            f"{times[0]} ms (`{best}`)",
            f"{times[1]} ms (`int8_fx_onednn`)",
            f"{ratio.median:.2f}x as fast ({ratio.low:.2f} to {ratio.high:.2f})",
            "at least 1x",
            f"{ratio.low:.4g}x",
            "yes",
        ]


def test_the_batch_size_that_decided_is_in_the_table(full: Evidence) -> None:
    assert full.latency.least_speedup(full.name, full.floats).batch_size == 8
    assert "| Time per batch, batch size 8 |" in render_markdown(full)
    others = replace(full.latency, weights={1: 1.0, 128: 3.0})  # 8 does not count
    left_out = replace(full, measured=replace(full.measured, latency=others))
    text = render_markdown(left_out)
    assert "| Time per batch, batch size 8 |" not in text
    said = "The mean over the batch sizes and the choice of a version weigh batch size"
    assert f"- {said} 1 by 25 % and 128 by 75 %; 8 does not count.\n" in text and said not in render_markdown(full)


def test_limits_of_the_gate_are_those_that_decided(evidence: Evidence) -> None:
    found = keep_float(evidence)
    rows = _tables(render_markdown(found))[SECTIONS[0].lstrip("# ")][0][1:]
    failed = {row[0] for row in rows if row[-1] == "**no**"}
    assert failed == {"Top-1, 359 test images", "Time per batch, batch size 1", "Lowest top-1 allowed"}
    assert set(found.gate.failed_limits) == {"max_top1_drop", "min_speedup", "min_top1"}
    busy = render_markdown(not_measured(evidence))
    assert _cells(busy, "Time per batch, batch size 1")[3:] == ["", "", "not decided"]
    unverified = replace(found.gate.checks[0], kept=False, value=0.0)
    one = replace(found.versions[0], gate=replace(found.gate, checks=(unverified,)))
    assert _cells(render_markdown(replace(found, versions=(one,))), "Reloaded models")[3:] == [
        "equal outputs", "not equal", "**no**",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_version_to_load_is_the_one_to_ship(evidence: Evidence, name: str) -> None:
    found = CASES[name](evidence)
    text = render_markdown(found)
    (loaded,) = re.findall(r'qexp\.load\("(.*?)"\)', text)
    ship = found.verdict.ship or found.int8.version_uri
    assert ship.endswith(loaded) and loaded.startswith("models:/")
    assert f"**{found.verdict.word.capitalize()}.**" in text


@pytest.mark.parametrize("name", CASES)
def test_each_model_is_explained_once_and_before_its_times(evidence: Evidence, name: str) -> None:
    found = CASES[name](evidence)
    before, _, _ = render_markdown(found).partition("Median time (p50)")
    for model in found.latency.rows[0].stats:
        assert before.count(f"- `{model}`: ") == 1


# --- the tables of the sections


def test_accuracy_table(evidence: Evidence) -> None:
    text = render_markdown(with_onnx(evidence))
    assert _cells(text, "smallnet fp32") == ["427,178", "1.800", "97.00 %", "99.50 %", "94.00 %", "98.50 %"]
    assert _cells(text, "smallnet int8 fx")[1:] == ["0.450", "96.50 %", "99.40 %", "93.50 %", "98.25 %"]
    assert _cells(text, "smallnet int8 onnx")[1:] == ["0.600", "96.50 %", "99.40 %", "92.50 %", "97.00 %"]
    assert _cells(text, "int8 version") == [f"`models:/smallnet-digits-int8/1`, `{ONNX}`"]
    assert _cells(render_markdown(evidence), "smallnet int8")[1:3] == ["0.450", "96.50 %"]


def test_bf16_is_in_the_table_where_it_was_measured(evidence: Evidence) -> None:
    assert "| smallnet bf16 |" not in render_markdown(evidence)
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)
    text = render_markdown(replace(evidence, measured=replace(evidence.measured, bf16=bf16)))
    unknown = "not measured"
    assert _cells(text, "smallnet bf16") == ["427,178", "0.900", unknown, unknown, "93.90 %", "98.50 %"]


def test_sizes_and_macs(full: Evidence) -> None:
    tables = _tables(render_markdown(full))
    assert ["fp32", "1.6000", "0.1500", "0.0500"] in tables["Effect of quantization on model size"][0]
    (macs,) = tables["Effect of quantization on MAC operations"]
    assert macs[-1] == ["128", "128,000", "115,200"]
    folded = replace(full.int8.cost, int8_macs={1: 777, 8: 6216, 128: 99_456})
    assert "| 1 | 1,000 | 777 |" in render_markdown(with_int8(full, cost=folded))


def test_latency_is_one_table_with_every_model_and_batch_size(full: Evidence) -> None:
    table, startup = _tables(render_markdown(full))["Effect of quantization on inference time"]
    rows = {row[0].strip("*`"): row[1:] for row in table}
    names = list(full.latency.rows[0].stats)
    assert rows["Batch size"] == ["1", "8", "128"] and [row[0].strip("*`") for row in table[1:8]] == names
    assert table[5][0] == "**`int8_fx_onednn`**"  # the chosen one
    for name in names:
        p50 = [row.stats[name].p50_ms for row in full.latency.rows]
        assert [float(cell.replace(",", "")) for cell in rows[name]] == pytest.approx(p50, rel=0.005)
    assert rows["int8_fx_onednn`, p90"] == ["0.220", "0.770", "9.90"] and rows["fp32`, p99"] == ["1.50", "6.00", "150"]
    assert rows["int8_fx_onednn`, images per second"] == ["5,000", "11,429", "14,222"]
    assert rows["Fastest float model"] == ["`fp32_onnx`", "`bf16`", "`bf16`"]
    ratios = [row.ratio(row.fastest(full.floats), full.name) for row in full.latency.rows]
    assert rows["int8_fx_onednn`: times as fast as it"] == [f"{ratio.median:.2f}" for ratio in ratios]
    assert rows["95 % interval of that"] == [f"{ratio.low:.2f} to {ratio.high:.2f}" for ratio in ratios]
    assert rows["Control: a model against its copy"] == ["0.99 to 1.01"] * 3
    assert [row[0] for row in startup[1:]] == [f"`{name}`" for name in names]


def test_percentiles_that_are_not_known_are_a_dash(evidence: Evidence) -> None:
    row = evidence.latency.rows[0]
    unknown = replace(row.stats["int8_fx"], p90_ms=None, p99_ms=None)
    text = render_markdown(with_rows(evidence, replace(row, stats=row.stats | {"int8_fx": unknown})))
    assert _cells(text, "`int8_fx`, p90") == _cells(text, "`int8_fx`, p99") == ["-"]


def test_batch_sizes_are_sorted_whatever_their_order_in_the_file(evidence: Evidence) -> None:
    text = render_markdown(evidence)
    assert render_markdown(with_rows(evidence, *reversed(evidence.latency.rows))) == text


def test_other_versions(evidence: Evidence) -> None:
    (table,) = _tables(render_markdown(judged(with_onnx(evidence))))["Other int8 versions"]
    figures = ["1.50", "0.50 (0.50 to 0.50)", "0.60", "failed"]
    assert table[1] == [f"`{ONNX}`", "`int8_onnx`", *figures, "it did not pass the gate"]


def test_layers_that_can_be_told(evidence: Evidence) -> None:
    text = render_markdown(evidence)
    assert _cells(text, "`network.0`") == ["7", "31.5", "0.025", "0.0078", "93.75 %", "94.00 %"]
    assert _cells(text, "`network.3`")[:2] == ["8", "not finite"]


def test_environment(full: Evidence) -> None:
    text = render_markdown(full)
    assert _cells(text, "CPU") == ["Imagined CPU, 2 logical CPUs, 2 threads, 16 GB"]  # of an earlier version
    assert "**Warning**" not in text and _cells(text, "Instructions") == ["AVX512-VNNI"]
    assert _cells(text, "Libraries") == ["torch 2.13.0"] and "digest 0123456789abcdef" in _cells(text, "Data")[0]
    assert _cells(text, "Images") == ["1,294 train, 144 validation, 359 test"]
    assert _cells(text, "Calibration") == ["64 training images, digest fedcba9876543210"]
    assert _cells(text, "fp32 version") == ["`models:/smallnet-digits-fp32/1`"]
    host = replace(full.measured.host, features=(), physical_cores=1, cpu_quota=1.5, cores=2)
    other = render_markdown(replace(full, measured=replace(full.measured, host=host)))
    assert _cells(other, "Instructions") == ["unknown"] and "**Warning**" in _cells(other, "Threads")[0]
    assert "2 logical CPUs on 1 core, quota of 1.5 CPUs" in _cells(other, "CPU")[0]


# --- what is stored


def test_metrics_read_back_to_equal_evidence(full: Evidence, folder: Path) -> None:
    text = (folder / "metrics.json").read_text()
    assert from_json(Evidence, text) == full
    assert '"date": "2026-11-26"' in text
    changed = replace(full, champion=False)
    assert from_json(Evidence, to_json(changed)) == changed != full


def test_results_of_an_earlier_version_can_be_shown() -> None:
    found = from_json(Evidence, (REPOSITORY / "results" / "vgg16-cifar10" / "metrics.json").read_text())
    text = render_markdown(found)
    assert not found.gate.checks and f"Gate {found.gate.summary}." in text
    assert _cells(text, "vgg16 fp32")[0] == "134,301,514"


def test_the_link_to_the_run_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="7"))
    monkeypatch.setattr(mlflow, "active_run", lambda: run)
    for uri, page in (
        ("https://ann:secret@host:5000/base/", "https://host:5000/base/#/experiments/7/runs/abc"),
        ("sqlite:///mlflow.db", ""),
    ):
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda uri=uri: uri)
        assert run_page("abc") == page


def test_published_report_is_that_of_its_results() -> None:
    """`python benchmarks/reports.py` writes it anew."""
    folder = REPOSITORY / "results" / "smallnet-cifar10"
    found = from_json(Evidence, (folder / "metrics.json").read_text())
    assert (folder / "report.md").read_text() == render_markdown(found)
    assert found.latency.baseline == BASELINE and found.gate.checks
    assert sorted(file.stem for file in (folder / "figures").iterdir()) == sorted(PICTURES)
