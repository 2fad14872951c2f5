"""The figures of a report as PNG files, from `Evidence` alone; sized to be read at the width of the text.

Only here is matplotlib imported. The report puts them into its page, and search/figures.py draws with `save_figure`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from qexp.measurement.cost import TORCHINFO
from qexp.report.chart import FP32, INT8, styles
from qexp.report.results import Evidence
from qexp.report.sentences import by_batch_size, threads
from qexp.training.train import TrainResult

WIDTH_IN, HEIGHT_IN, DPI = 5.6, 3.3, 200
FLOAT_PART = "#c9ced9"
TRAIN, VALIDATION = "#3b7a57", "#b0413e"
OF_TRAINING = {"accuracy_curve", "loss_curve", "accuracy_against_loss"}

Result = TypeVar("Result")


def save_figures(evidence: Evidence, folder: Path) -> list[Path]:
    """Draw all as PNG files in `folder`, in the order of the report; those of the training and of the layers only where
    there was one, and where they were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    left_out = set() if evidence.fp32.train else OF_TRAINING
    left_out |= set() if evidence.int8.sensitivity else {"sensitivity"}
    figures = {name: draw for name, draw in FIGURES.items() if name not in left_out}
    return [save_figure(draw, evidence, folder / f"{name}.png") for name, draw in figures.items()]


def save_figure(draw: Callable[[Axes, Result], None], result: Result, file: Path) -> Path:
    """Let `draw` put `result` on the axes of a figure in the style of the report, and write it as `file` (PNG)."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    draw(axes, result)
    axes.set_title(axes.get_title(), fontsize=10)
    figure.savefig(file)
    return file


def _training(evidence: Evidence) -> TrainResult:
    """What the figures of a training show; they are drawn only where there was one."""
    assert evidence.fp32.train is not None
    return evidence.fp32.train


def _accuracy_curve(axes: Axes, evidence: Evidence) -> None:
    train = _training(evidence)
    epochs = train.epochs
    steps = [epoch.epoch for epoch in epochs]
    axes.plot(steps, [e.train_top1_percent for e in epochs], "o-", ms=3, color=TRAIN, label="train top-1")
    axes.plot(
        steps, [e.validation_top1_percent for e in epochs], "o-", ms=3, color=VALIDATION, label="validation top-1"
    )
    axes.plot(steps, [e.train_top3_percent for e in epochs], "s:", ms=3, color=TRAIN, label="train top-3")
    axes.plot(
        steps, [e.validation_top3_percent for e in epochs], "s:", ms=3, color=VALIDATION, label="validation top-3"
    )
    axes.axvline(train.best_epoch, color="grey", lw=0.8, ls="--", label=f"epoch {train.best_epoch}: weights kept")
    axes.set(title="Accuracy by epoch", xlabel="epoch", ylabel="accuracy, %")
    _whole_steps(axes)
    axes.legend(fontsize=7)


def _loss_curve(axes: Axes, evidence: Evidence) -> None:
    epochs = _training(evidence).epochs
    steps = [epoch.epoch for epoch in epochs]
    axes.plot(steps, [e.train_loss for e in epochs], "o-", ms=3, color=TRAIN, label="train")
    axes.plot(steps, [e.validation_loss for e in epochs], "o-", ms=3, color=VALIDATION, label="validation")
    axes.set(title="Loss by epoch", xlabel="epoch", ylabel="cross entropy")
    if _is_wide([loss for e in epochs for loss in (e.train_loss, e.validation_loss)]):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    _whole_steps(axes)
    axes.legend(fontsize=7)


def _accuracy_against_loss(axes: Axes, evidence: Evidence) -> None:
    epochs = _training(evidence).epochs
    train = [(e.train_loss, e.train_top1_percent) for e in epochs]
    validation = [(e.validation_loss, e.validation_top1_percent) for e in epochs]
    for points, color, label in ((train, TRAIN, "train"), (validation, VALIDATION, "validation")):
        losses, accuracies = zip(*points, strict=True)
        axes.plot(losses, accuracies, "o-", ms=3, lw=0.8, color=color, label=f"{label} (ring: last epoch)")
        axes.plot(*points[-1], "o", ms=8, mfc="none", color=color)
    axes.set(title="Accuracy against loss", xlabel="cross entropy", ylabel="top-1, %")
    if _is_wide([loss for loss, _ in train + validation]):
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    axes.legend(fontsize=7)


def _accuracy_bars(axes: Axes, evidence: Evidence) -> None:
    groups = [
        (f"top-{k}\n{split}", split, k)
        for split in ("train", "test")
        if split in evidence.fp32.accuracy
        for k in (1, 3)
    ]
    places = range(len(groups))
    for offset, (label, color, accuracy) in enumerate(
        (("fp32", FP32, evidence.fp32.accuracy), ("int8", INT8, evidence.int8.accuracy))
    ):
        heights = [getattr(accuracy[split], f"top{k}_percent") for _, split, k in groups]
        bars = axes.bar([i + 0.4 * offset for i in places], heights, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks([i + 0.2 for i in places], [name for name, _, _ in groups])
    axes.set(title="Accuracy before and after quantization", ylabel="%", ylim=(0, 118))
    axes.legend(fontsize=7, ncols=2, loc="upper right")


def _model_size(axes: Axes, evidence: Evidence) -> None:
    sizes = [evidence.fp32.size_bytes / 1e6, *(judged.int8.size_bytes / 1e6 for judged in evidence.versions)]
    labels = ["fp32", *(judged.int8.quantize.label for judged in evidence.versions)]
    labels[1:] = ["int8"] if len(labels) == 2 else [f"int8 {engine}" for engine in labels[1:]]
    bars = axes.bar(labels, sizes, 0.55, color=[FP32] + [INT8] * (len(sizes) - 1))
    axes.bar_label(bars, fmt="%.2f MB", fontsize=8)
    axes.set(title="Size of the stored files", ylabel="MB (10⁶ bytes)", ylim=(0, 1.12 * max(sizes)))


def _macs(axes: Axes, evidence: Evidence) -> None:
    cost = evidence.int8.cost
    places = range(len(cost.macs))
    totals = [count / 1e9 for count in evidence.int8.fp32_cost.macs.values()]
    in_int8 = [count / 1e9 for count in cost.int8_macs.values()]
    counted = cost.conv_linear_macs if cost.counted_by == TORCHINFO else cost.macs
    left = [total / 1e9 - int8 for total, int8 in zip(counted.values(), in_int8, strict=True)]
    axes.bar([place - 0.2 for place in places], totals, 0.38, color=FP32, label="fp32 model")
    axes.bar([place + 0.2 for place in places], in_int8, 0.38, color=INT8, label="int8 model, in int8")
    if any(left):
        axes.bar(
            [place + 0.2 for place in places], left, 0.38, bottom=in_int8, color=FLOAT_PART, label="int8 model, others"
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(totals) / 3)
    axes.yaxis.set_minor_formatter(NullFormatter())  # over less than a decade, matplotlib labels every minor tick
    axes.set_xticks(list(places), [str(batch) for batch in cost.macs])
    axes.set(title="Multiply-accumulates by batch size", xlabel="batch size", ylabel="10⁹ MACs per batch")
    axes.legend(fontsize=7)


def _inference_time(axes: Axes, evidence: Evidence) -> None:
    rows, drawn = by_batch_size(evidence), styles(evidence)
    batches = [row.batch_size for row in rows]
    for name, style in drawn.items():
        stats = [row.stats[name] for row in rows]
        p50 = [one.p50_ms for one in stats]
        if style.is_main:
            axes.plot(batches, p50, "o-", ms=3, color=style.color, label=name)
            known = [math.nan if one.p90_ms is None else one.p90_ms for one in stats]
            axes.fill_between(batches, p50, known, color=style.color, alpha=0.25, lw=0)
        else:
            dashes = tuple(map(float, style.dashes.split()))
            axes.plot(batches, p50, "o", ls=(0, dashes), ms=2, lw=1, color=style.color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    title = f"Inference time by batch size, {threads(evidence.latency.threads)}"
    axes.set(title=title, xlabel="batch size", ylabel="ms per batch, p50 (bands: to p90)")
    last = evidence.latency.rows[-1].stats
    lines = sorted(axes.get_lines(), key=lambda line: -last[str(line.get_label())].p50_ms)  # as they end at the right
    axes.figure.legend(handles=lines, fontsize=7, loc="outside right center", frameon=False)


def _sensitivity(axes: Axes, evidence: Evidence) -> None:
    found = evidence.int8.sensitivity
    assert found is not None
    layers = found.layers
    places = range(len(layers))
    ratios = axes.twinx()
    ratios.bar(places, [layer.sqnr_db or 0.0 for layer in layers], 0.8, color=FLOAT_PART, alpha=0.5)
    ratios.set_ylabel("SQNR of the output, dB (bars)", fontsize=8)
    ratios.tick_params(labelsize=8)
    axes.set_zorder(ratios.get_zorder() + 1)
    axes.patch.set_visible(False)
    for label, color, marker, values in (
        ("only this layer in int8", INT8, "o", [layer.kl_only_int8_nats for layer in layers]),
        ("only this layer in fp32", FP32, "s", [layer.kl_only_fp32_nats for layer in layers]),
    ):
        axes.plot(places, [value or math.nan for value in values], marker, ms=3, mfc="none", color=color, label=label)
    if found.int8_kl_nats:
        axes.axhline(found.int8_kl_nats, color=INT8, lw=0.8, label="all in int8")
        axes.set_yscale("log")
    step = max(1, len(layers) // 16)
    names = [layer.layer.removeprefix("network.") for layer in layers]
    axes.set_xticks(list(places)[::step], names[::step], rotation=90, fontsize=7, parse_math=False)
    axes.set(title="Divergence from fp32 by layer, simulated", xlabel="layer", ylabel="KL of the probabilities, nats")
    axes.figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")


def _is_wide(values: list[float]) -> bool:
    """A loss that once was ten times its smallest would hide everything else on a linear scale."""
    return max(values) > 10 * min(values) > 0


def _plain_log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 instead of powers of ten: such a scale spans one decade or two."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 1.5))  # one epoch alone has no width


FIGURES: dict[str, Callable[[Axes, Evidence], None]] = {
    "accuracy_curve": _accuracy_curve,
    "loss_curve": _loss_curve,
    "accuracy_against_loss": _accuracy_against_loss,
    "accuracy_bars": _accuracy_bars,
    "model_size": _model_size,
    "macs": _macs,
    "inference_time": _inference_time,
    "sensitivity": _sensitivity,
}
