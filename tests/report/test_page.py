"""Figures, page and metrics.json: made from the evidence alone, and complete."""

import base64
import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import latency_row, with_int8, with_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from qexp.files import from_json, to_json
from qexp.measurement.accuracy import Accuracy
from qexp.models.contents import FileContents
from qexp.report import figures as plots
from qexp.report.page import render_markdown, table, write_report
from qexp.report.results import Bf16Evidence, Evidence, Judged

FIGURES = [
    "accuracy_curve",
    "loss_curve",
    "accuracy_against_loss",
    "accuracy_bars",
    "model_size",
    "macs",
    "inference_time",
    "sensitivity",
]
SECTIONS = [
    "# Can smallnet, trained on digits, ship as int8 on this CPU?",
    "## Training",
    "## Effect of quantization on accuracy",
    "## Effect of quantization on model size",
    "## Multiply-accumulates by batch size",
    "## Effect of quantization on inference time",
    "## What to ship",
    "## Layer sensitivity",
    "## Gate",
    "## Environment",
]
ONNX = "models:/smallnet-digits-int8/2"


@pytest.fixture(scope="module")
def folder(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole report in it."""
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_report(evidence, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def _with_onnx(evidence: Evidence) -> Evidence:
    """With a second version of another engine."""
    quantize = replace(evidence.int8.quantize, engine="onnx")
    accuracy = evidence.int8.accuracy | {"test": Accuracy(92.5, 97.0, 359)}
    other = replace(evidence.int8, version_uri=ONNX, size_bytes=600_000, quantize=quantize, accuracy=accuracy)
    measured = replace(evidence.measured, contenders=evidence.measured.contenders | {ONNX: ("int8_onnx",)})
    two = replace(evidence, measured=measured, versions=(*evidence.versions, Judged(other, "int8_onnx", evidence.gate)))
    rows = [(1, {"fp32": 4.0, "int8_fx": 1.0, "int8_onnx": 2.0}), (8, {"fp32": 8.0, "int8_fx": 4.0, "int8_onnx": 8.0})]
    return with_rows(two, *(latency_row(batch, times) for batch, times in rows))


def _draw(name: str, evidence: Evidence) -> Axes:
    axes = Figure().subplots()
    plots.FIGURES[name](axes, evidence)
    return axes


def _lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line that the legend names."""
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    return {
        name: (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for name, line in lines.items()
        if not name.startswith("_")
    }


def _bars(axes: Axes) -> list[list[float]]:
    """Heights, by series."""
    return [[bar.get_height() for bar in container] for container in axes.containers]


# --- figures


def test_eight_pictures_large_enough_to_read(folder: Path) -> None:
    assert sorted(file.stem for file in (folder / "figures").iterdir()) == sorted(FIGURES)
    for name in FIGURES:
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert image.width >= 500 and image.height >= 350
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_a_title_names_and_a_legend(evidence: Evidence, name: str) -> None:
    axes = _draw(name, evidence)
    assert axes.get_title() and axes.get_ylabel()
    if name in ("accuracy_bars", "model_size"):
        assert all(label.get_text() for label in axes.get_xticklabels())
    else:
        assert axes.get_xlabel()
    assert name == "model_size" or axes.get_legend() or axes.figure.legends


def test_curves_show_every_epoch(evidence: Evidence) -> None:
    epochs = evidence.fp32.train.epochs
    accuracy, loss = _lines(_draw("accuracy_curve", evidence)), _lines(_draw("loss_curve", evidence))
    assert accuracy["train top-1"] == ([1, 2, 3], [50.0, 60.0, 70.0])
    assert accuracy["validation top-1"] == ([1, 2, 3], [45.0, 55.0, 65.0])
    assert accuracy["train top-3"][1] == [epoch.train_top3_percent for epoch in epochs]
    assert accuracy["validation top-3"][1] == [epoch.validation_top3_percent for epoch in epochs]
    assert loss["train"] == ([1, 2, 3], [epoch.train_loss for epoch in epochs])
    assert loss["validation"] == ([1, 2, 3], [epoch.validation_loss for epoch in epochs])


def test_accuracy_against_loss_pairs_them_by_epoch(evidence: Evidence) -> None:
    lines = _lines(_draw("accuracy_against_loss", evidence))
    (train,) = [line for name, line in lines.items() if name.startswith("train")]
    (validation,) = [line for name, line in lines.items() if name.startswith("validation")]
    assert train == ([2.5, 2.0, 1.5], [50.0, 60.0, 70.0])
    assert validation[0] == pytest.approx([2.7, 2.2, 1.7]) and validation[1] == [45.0, 55.0, 65.0]


def test_bars_show_accuracy_size_and_macs(evidence: Evidence) -> None:
    assert _bars(_draw("accuracy_bars", evidence)) == [[97.0, 99.5, 94.0, 98.5], [96.5, 99.4, 93.5, 98.25]]
    assert _bars(_draw("model_size", evidence)) == [[1.8, 0.45]]
    totals, in_int8, others = _bars(_draw("macs", evidence))
    assert totals == pytest.approx([1e-6, 8e-6, 128e-6])
    assert in_int8 == pytest.approx([0.9e-6, 7.2e-6, 115.2e-6])
    assert [a + b for a, b in zip(in_int8, others, strict=True)] == pytest.approx(totals)
    whole = replace(evidence.int8.cost, int8_macs=evidence.int8.cost.macs)
    assert len(_bars(_draw("macs", with_int8(evidence, cost=whole)))) == 2


def test_sizes_of_all_versions(evidence: Evidence) -> None:
    axes = _draw("model_size", _with_onnx(evidence))
    assert _bars(axes) == [[1.8, 0.45, 0.6]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fp32", "int8 fx", "int8 onnx"]
    one = _draw("model_size", evidence)
    assert [label.get_text() for label in one.get_xticklabels()] == ["fp32", "int8"]


def test_inference_time_shows_the_medians_of_all_models(evidence: Evidence) -> None:
    axes = _draw("inference_time", evidence)
    lines = {name.split()[0]: line for name, line in _lines(axes).items()}
    assert list(lines) == ["fp32", "fp32_traced", "bf16", "fp32_onnx", "int8_fx"]
    assert lines["fp32"] == ([1, 8, 128], [1.0, 4.0, 100.0]) and lines["int8_fx"] == ([1, 8, 128], [0.25, 0.8, 10.0])
    assert lines["bf16"][1] == [0.7, 1.6, 30.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "128"]
    assert "2 threads" in axes.get_title()


def test_sensitivity_shows_each_layer_both_ways(evidence: Evidence) -> None:
    axes = _draw("sensitivity", evidence)
    lines = _lines(axes)
    assert lines["only this layer in int8"] == ([0, 1], [0.025, 0.0078])
    assert lines["only this layer in fp32"] == ([0, 1], [0.0078, 0.025])
    assert set(lines["all in int8"][1]) == {0.03125} and axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]


def test_one_epoch_and_one_batch_size_can_be_drawn(evidence: Evidence, tmp_path: Path) -> None:
    train = replace(evidence.fp32.train, epochs=evidence.fp32.train.epochs[:1], best_epoch=1)
    cost = replace(evidence.int8.cost, macs={1: 1000}, conv_linear_macs={1: 900}, int8_macs={1: 0})
    one = with_rows(replace(evidence, fp32=replace(evidence.fp32, train=train)), evidence.latency.rows[0])
    short = with_int8(one, cost=cost, fp32_cost=cost)
    assert [file.stem for file in plots.save_figures(short, tmp_path)] == FIGURES


def test_what_was_not_measured_is_not_shown(evidence: Evidence, tmp_path: Path) -> None:
    bare = with_int8(evidence, sensitivity=None)
    page = write_report(bare, tmp_path)
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == sorted(FIGURES[:-1])
    text = (tmp_path / "report.md").read_text()
    assert "sensitivity" not in text and "## What to ship" in text
    assert page.read_text().count("data:image/png;base64,") == 7


# --- page


def test_sections_come_in_order(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == SECTIONS
    assert re.findall(r"!\[.*?\]\(figures/(\w+)\.png\)", text) == FIGURES
    answer = text.split("## Training")[0]
    assert "**Ship int8**" in answer


def test_page_needs_no_other_file(page: str) -> None:
    targets = re.findall(r"""(?:src|href|srcset|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(targets) == 8
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    assert not re.search(r"<(script|link|iframe|object)\b|url\(|@import", page)


def test_pictures_in_the_page_are_those_in_the_folder(page: str, folder: Path) -> None:
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert pictures == [(folder / "figures" / f"{name}.png").read_bytes() for name in FIGURES]
    for picture in pictures:
        Image.open(io.BytesIO(picture)).verify()


def test_page_has_title_headings_and_tables(page: str) -> None:
    assert "<title>Can smallnet, trained on digits, ship as int8 on this CPU?</title>" in page
    assert [html.unescape(heading) for heading in re.findall(r"<h[12]>(.*?)</h[12]>", page)] == [
        section.lstrip("# ") for section in SECTIONS
    ]
    assert page.count("<table>") == 8 and "<strong>Ship int8</strong>" in page


def test_metrics_read_back_to_equal_evidence(evidence: Evidence, folder: Path) -> None:
    assert from_json(Evidence, (folder / "metrics.json").read_text()) == evidence
    changed = replace(evidence, champion=False)
    assert from_json(Evidence, to_json(changed)) == changed != evidence


def test_a_second_report_replaces_the_first(evidence: Evidence, tmp_path: Path) -> None:
    write_report(evidence, tmp_path)
    write_report(replace(evidence, champion=False), tmp_path)
    assert "is not `champion`: `qexp promote` decides on that" in (tmp_path / "report.md").read_text()
    assert not from_json(Evidence, (tmp_path / "metrics.json").read_text()).champion


def _row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return line.strip("| ").split(" | ")


def test_accuracy_table(evidence: Evidence) -> None:
    text = render_markdown(evidence)
    assert _row(text, "smallnet fp32")[1:] == ["427,178", "1.800", "97.00 %", "99.50 %", "94.00 %", "98.50 %"]
    assert _row(text, "smallnet int8")[1:] == ["427,178", "0.450", "96.50 %", "99.40 %", "93.50 %", "98.25 %"]


def test_accuracy_table_has_bf16_where_it_was_measured(evidence: Evidence) -> None:
    assert "| smallnet bf16 |" not in render_markdown(evidence)
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)
    text = render_markdown(replace(evidence, measured=replace(evidence.measured, bf16=bf16)))
    unknown = "not measured"
    assert _row(text, "smallnet bf16")[1:] == ["427,178", "0.900", unknown, unknown, "93.90 %", "98.50 %"]


def test_accuracy_table_of_several_versions(evidence: Evidence) -> None:
    text = render_markdown(_with_onnx(evidence))
    assert _row(text, "smallnet int8 fx")[2:] == ["0.450", "96.50 %", "99.40 %", "93.50 %", "98.25 %"]
    assert _row(text, "smallnet int8 onnx")[2:] == ["0.600", "96.50 %", "99.40 %", "92.50 %", "97.00 %"]
    assert _row(text, "int8 version")[1] == f"`models:/smallnet-digits-int8/1`, `{ONNX}`"
    assert f"`{ONNX}` (int8_onnx): " in text.split("## What to ship")[1]


def _time_tables(evidence: Evidence) -> list[str]:
    """p50 of all models, speed-ups, percentiles of two models, start-up."""
    section = render_markdown(evidence).split("## Effect of quantization on inference time")[1].split("\n## ")[0]
    return re.findall(r"(?:^\|.*\n)+", section + "\n", re.MULTILINE)


def test_macs_table(evidence: Evidence) -> None:
    section = render_markdown(evidence).split("## Effect of quantization on inference time")[0]
    assert _row(section, "128") == ["128", "128,000", "115,200"]


def test_quantiles_of_the_times_of_all_models(evidence: Evidence) -> None:
    """In the data, p90 is 1.1 times p50 and p99 1.5 times."""
    times = _time_tables(evidence)[0]
    names = ["fp32", "fp32_traced", "bf16", "fp32_onnx", "int8_fx"]
    assert _row(times, "Batch size")[1:] == names
    assert [cell.split(" / ")[0] for cell in _row(times, "8")] == ["8", "4", "3.2", "1.6", "2.4", "0.8"]
    quantiles = [f"{p50} / {1.1 * p50:.0f} / {1.5 * p50:.0f}" for p50 in (100, 90, 30, 60, 10)]
    assert _row(times, "128") == ["128", *quantiles]


def test_speed_ups_have_intervals_and_the_noise(evidence: Evidence) -> None:
    speedups = _time_tables(evidence)[1]
    others = [f"{name} over fp32" for name in ("fp32_traced", "bf16", "fp32_onnx", "int8_fx")]
    assert _row(speedups, "Batch size")[1:] == ["fastest float", "int8_fx over it", *others, "control"]
    found = evidence.latency.rows[2].speedups["int8_fx"]
    assert 9.8 < found.low < found.median < found.high < 10.2
    cells = _row(speedups, "128")
    assert cells[6:] == [f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})", "1.00 (0.99 to 1.01)"]
    assert cells[1] == "fp32_onnx" and cells[2].startswith(("6.0", "5.9"))  # bf16, of unknown accuracy, does not count


def test_percentiles_that_are_not_known_are_a_dash(evidence: Evidence) -> None:
    row = evidence.latency.rows[0]
    unknown = replace(row.stats["int8_fx"], p90_ms=None, p99_ms=None)
    tables = _time_tables(with_rows(evidence, replace(row, stats=row.stats | {"int8_fx": unknown})))
    assert _row(tables[0], "1")[-1] == "0.25 / - / -" and _row(tables[2], "1")[-4:-2] == ["-", "-"]


def test_percentiles_of_fp32_and_the_chosen_version(evidence: Evidence) -> None:
    percentiles = _time_tables(evidence)[2]
    fp32, int8 = ["4.00", "4.40", "6.00", "2,000", "60"], ["0.80", "0.88", "1.20", "10,000", "60"]
    assert _row(percentiles, "8") == ["8", *fp32, *int8]
    assert _row(percentiles, "Batch size")[6] == "int8_fx p50, ms"


def test_start_up_table_has_every_model(evidence: Evidence) -> None:
    startup = _time_tables(evidence)[3]
    assert _row(startup, "fp32") == ["fp32", "0.10", "10.0", "301"]
    assert _row(startup, "int8_fx") == ["int8_fx", "0.50", "50.0", "305"]
    assert len(startup.splitlines()) == 2 + 5


def test_layers_that_can_be_told(evidence: Evidence) -> None:
    section = render_markdown(evidence).split("## Layer sensitivity")[1].split("\n## ")[0]
    assert _row(section, "`network.0`") == ["`network.0`", "7", "31.5", "0.025", "0.0078", "93.75 %", "94.00 %"]
    assert _row(section, "`network.3`")[1:3] == ["8", "not finite"]
    assert "Quantizing only `network.0` moves" in section and "budget" not in section


def test_what_to_ship_is_in_the_page(evidence: Evidence) -> None:
    section = render_markdown(evidence).split("## What to ship")[1].split("\n## ")[0]
    assert "- **Ship int8**: " in section and "Ship `models:/smallnet-digits-int8/1`." in section


@pytest.mark.parametrize(
    ("quota", "words"), [(None, "no CPU quota"), (1.5, "quota of 1.5 CPUs")], ids=["no quota", "quota"]
)
def test_cores_and_quota_of_the_machine(evidence: Evidence, quota: float | None, words: str) -> None:
    host = replace(evidence.measured.host, cores=4, physical_cores=2, cpu_quota=quota)
    text = render_markdown(replace(evidence, measured=replace(evidence.measured, host=host)))
    assert _row(text, "CPU")[1] == f"Imagined CPU, 4 logical CPUs on 2 cores, {words}, 2 threads, 16 GB"
    assert ("**Warning**: 2 threads are more than the CPU quota of 1.5" in text) is (quota is not None)


def test_table_of_what_is_in_the_files(evidence: Evidence) -> None:
    assert "metadata and container" not in render_markdown(evidence)  # not measured
    fp32 = replace(evidence.fp32, contents=FileContents(1_600_000, 120_000, 80_000))
    found = with_int8(replace(evidence, fp32=fp32), contents=FileContents(410_000, 10_000, 30_000))
    text = render_markdown(found)
    assert "| fp32 | 1.6000 | 0.1200 | 0.0800 | 1.8000 |" in text
    assert "| int8 fx | 0.4100 | 0.0100 | 0.0300 | 0.4500 |" in text


def test_environment_table(evidence: Evidence) -> None:
    text = render_markdown(evidence)
    assert _row(text, "CPU")[1] == "Imagined CPU, 2 logical CPUs, 2 threads, 16 GB"  # of an earlier version
    assert "**Warning**" not in text
    assert _row(text, "Instructions")[1] == "AVX512-VNNI"
    assert _row(text, "Libraries")[1] == "torch 2.13.0"
    assert "digest 0123456789abcdef" in _row(text, "Data")[1]
    assert _row(text, "Images")[1] == "1294 train, 144 validation, 359 test"
    assert "64 training images, digest fedcba9876543210" in _row(text, "Calibration")[1]
    assert _row(text, "fp32 version")[1] == "`models:/smallnet-digits-fp32/1`"
    assert _row(text, "int8 version")[1] == "`models:/smallnet-digits-int8/1`"
    assert _row(text, "Quantization")[1].startswith("engine fx, timed as int8_fx, histogram observer")
    measured = replace(evidence.measured, host=replace(evidence.measured.host, features=()))
    unknown = replace(evidence, measured=measured)
    assert _row(render_markdown(unknown), "Instructions")[1] == "unknown"


def _other_accuracy(evidence: Evidence) -> Evidence:
    accuracy = {**evidence.int8.accuracy, "test": Accuracy(12.34, 56.78, 359)}
    return with_int8(evidence, accuracy=accuracy)


def _other_size(evidence: Evidence) -> Evidence:
    return with_int8(evidence, size_bytes=123_000)


def _other_macs(evidence: Evidence) -> Evidence:
    cost = replace(evidence.int8.cost, int8_macs={1: 777, 8: 6216, 128: 99_456})
    return with_int8(evidence, cost=cost)


def _other_time(evidence: Evidence) -> Evidence:
    first = evidence.latency.rows[0]
    stats = first.stats | {"int8_fx": replace(first.stats["int8_fx"], p99_ms=98.76)}
    return with_rows(evidence, replace(first, stats=stats), *evidence.latency.rows[1:])


def _other_host(evidence: Evidence) -> Evidence:
    host = replace(evidence.measured.host, cpu="Another CPU")
    return replace(evidence, measured=replace(evidence.measured, host=host))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (_other_accuracy, ["12.34 %", "56.78 %"]),
        (_other_size, ["| 0.123 |", "0.123 MB"]),
        (_other_macs, ["| 777 |", "| 99,456 |"]),
        (_other_time, ["| 98.76 |"]),
        (_other_host, ["Another CPU"]),
    ],
)
def test_numbers_come_from_the_evidence(
    evidence: Evidence, change: Callable[[Evidence], Evidence], shown: list[str]
) -> None:
    before, after = render_markdown(evidence), render_markdown(change(evidence))
    assert [text for text in shown if text in before or text not in after] == []


def test_table_cells_cannot_break_the_table() -> None:
    assert table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| :-- | --: |", "| x\\|y | 1 |"]
    assert table(["a", "b"], [["x", "y"]], numbers=False).splitlines()[1] == "| :-- | :-- |"


@pytest.mark.parametrize("source", ["/data/__pets__", "/data/*all*", "/data/<new>", "/data/a_b & c"])
def test_folder_names_are_shown_as_they_are(evidence: Evidence, tmp_path: Path, source: str) -> None:
    """None of their letters is Markdown or HTML."""
    data = replace(evidence.fp32.data, source=source)
    page = write_report(replace(evidence, fp32=replace(evidence.fp32, data=data)), tmp_path).read_text()
    shown = html.unescape(re.sub(r"<[^>]*>", "", page.split("</h2>")[-1]))
    assert f"digits from {source}, digest" in shown
