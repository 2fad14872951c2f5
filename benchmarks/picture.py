"""Draw the picture of README.md: inference time of fp32, the fastest float and int8 by batch size, from real runs.

    python benchmarks/picture.py --output docs/images/inference-time.png

It reads `metrics.json` of the runs in results/, which `qexp run` and `qexp report` write beside a report.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from qexp.files import from_json
from qexp.report.results import Evidence

RESULTS = Path(__file__).parents[1] / "results"
RUNS = {"vgg16-cifar10": "VGG16", "smallnet-cifar10": "SmallNet"}
FP32, FLOAT, INT8 = "#5b6c8f", "#8a97ad", "#d9661f"


def draw(axes: Axes, name: str, found: Evidence) -> None:
    """Put the times of one run on the axes, with the last point of each line labelled."""
    rows = found.latency.rows
    batches = [row.batch_size for row in rows]
    times = [{model: stats.p50_ms for model, stats in row.stats.items()} for row in rows]
    lines = (
        ("fp32, as registered", [row["fp32"] for row in times], FP32, "-"),
        ("fastest float", [min(row[one] for one in found.measured.floats) for row in times], FLOAT, "--"),
        ("int8", [row[found.name] for row in times], INT8, "-"),
    )
    for label, values, color, style in lines:
        axes.plot(batches, values, style, marker="o", ms=4, lw=2, color=color, label=label)
        for at, side in ((0, -9), (-1, 9)):
            axes.annotate(
                f"{values[at]:#.3g}".rstrip("."),
                (batches[at], values[at]),
                (side, 0),
                textcoords="offset points",
                ha="right" if at == 0 else "left",
                va="center",
                fontsize=9,
                color=color,
            )
    axes.set(xscale="log", yscale="log", xlabel="batch size", title=name)
    axes.set_xlim(0.42, 280)  # room for the labels
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_major_formatter(FixedFormatter([str(batch) for batch in batches]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)


def main() -> None:
    """Write the picture of the runs in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/inference-time.png"), help="PNG file to write")
    output = parser.parse_args().output
    figure = Figure(figsize=(9, 3.7), dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(RUNS))
    for axes, (run, name) in zip(panels, RUNS.items(), strict=True):
        draw(axes, name, from_json(Evidence, (RESULTS / run / "metrics.json").read_text()))
    panels[0].set_ylabel("median time of a batch, ms")
    panels[0].legend(frameon=False, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Software": None})
    print(output)


if __name__ == "__main__":
    main()
