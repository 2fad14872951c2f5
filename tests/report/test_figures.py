"""The figures: what is drawn is the evidence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import with_onnx
from conftest import with_int8, with_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from qexp.report import chart
from qexp.report import figures as plots
from qexp.report.results import Evidence

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


def test_eight_pictures_large_enough_to_read(evidence: Evidence, tmp_path: Path) -> None:
    files = plots.save_figures(evidence, tmp_path)
    assert [file.stem for file in files] == FIGURES and len(list(tmp_path.iterdir())) == len(FIGURES)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.width >= 1000 and image.height >= 500
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
    axes = _draw("model_size", with_onnx(evidence))
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


def test_picture_and_chart_have_the_same_colours(evidence: Evidence) -> None:
    drawn = {str(line.get_label()).split()[0]: line for line in _draw("inference_time", evidence).get_lines()}
    styles = chart.styles(evidence)
    assert {name: line.get_color() for name, line in drawn.items()} == {name: one.color for name, one in styles.items()}
    assert len({one.color for one in styles.values()}) == 5
    assert [name for name, one in styles.items() if one.is_main] == ["fp32", "int8_fx"]


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
