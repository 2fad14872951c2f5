"""The floats that torch compiles beside those that need no compiler, at each batch size, for several networks.

    python benchmarks/floats.py --output results/floats.json

A sweep compiles a float for all batch sizes only if it is not clearly slower than the others at the largest one; here
it is compiled in any case. The networks have fresh weights, as only time counts. Rows are written as they come, and
networks that the file holds already are not timed again. Prints a Markdown table at the end.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qexp.config import LatencyConfig
from qexp.files import from_json, to_json
from qexp.measurement.child import in_fork
from qexp.measurement.host import Host, read_host, reuse_freed_memory
from qexp.measurement.latency import Ratio, Run, measure_latency
from qexp.measurement.sweep_models import COMPILED, MADE, ONNX, SweepModel, load, prepare_baseline, rounds
from qexp.models.classifier import ModelSpec, build_classifier, save_classifier
from qexp.models.preprocessing import squashed

NETWORKS = {
    "smallnet": 32, "resnet18": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "vgg16": 32, "convnext_tiny": 64,
}  # fmt: skip
CLASSES = tuple("abcdefghij")
OPTIONS = LatencyConfig(loads=3, min_repeats=21, min_seconds=0.0)


@dataclass(frozen=True)
class Row:
    """One network at one batch size: median ms of each float, and by the name of each compiled one the fastest float
    that is not compiled and rounds no more, and the ratio to its time."""

    network: str
    image_size: int
    batch_size: int
    p50_ms: dict[str, float]
    rivals: dict[str, str]
    ratios: dict[str, Ratio]


@dataclass(frozen=True)
class Floats:
    """The rows, and the machine."""

    host: Host
    rows: tuple[Row, ...]


def measure(network: str, size: int, batch_sizes: list[int], host: Host) -> list[Row]:
    """Time all floats of a network; see `Row`."""
    spec = ModelSpec(network, CLASSES, squashed(size))
    names = [name for name in MADE if host.has_bf16 or not rounds(name)]
    with tempfile.TemporaryDirectory() as made:
        folder, weights = Path(made), Path(made, "model.safetensors")
        in_fork(partial(_save, spec, weights))
        for name in names:
            in_fork(partial(prepare_baseline, weights, folder, name, spec.shape, folder, batch_sizes))
        return in_fork(partial(_time, network, spec, names, folder, batch_sizes))


def _save(spec: ModelSpec, file: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, *spec.shape), dtype=torch.uint8)
    save_classifier(build_classifier(spec, images).eval(), file)


def _time(network: str, spec: ModelSpec, names: Sequence[str], folder: Path, batch_sizes: list[int]) -> list[Row]:
    def prepare(batch_size: int) -> dict[str, Run]:
        images = torch.rand(batch_size, *spec.shape)
        loaded = {name: load(SweepModel(name, ""), folder) for name in random.sample(names, len(names))}
        return {name: partial(loaded[name], images) for name in names}

    reuse_freed_memory()
    rows = []
    for row in measure_latency(prepare, ONNX, ONNX, OPTIONS.model_copy(update={"batch_sizes": batch_sizes})):
        rivals, compiled = {}, [name for name in names if name in COMPILED]
        for name in compiled:
            others = [one for one in names if one not in COMPILED and (rounds(name) or not rounds(one))]
            rivals[name] = row.fastest(others)
        ratios = {name: row.ratio(name, rivals[name]) for name in compiled}
        p50_ms = {name: row.stats[name].p50_ms for name in names}
        rows.append(Row(network, spec.shape[1], row.batch_size, p50_ms, rivals, ratios))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line a network and compiled float: times as long as the fastest other float, in brackets where
    the interval includes 1."""
    sizes = sorted({row.batch_size for row in rows})
    lines = [f"| | float | {' | '.join(map(str, sizes))} |", f"| :-- | :-- |{' --: |' * len(sizes)}"]
    for network in dict.fromkeys(row.network for row in rows):
        found = {row.batch_size: row for row in rows if row.network == network}
        for name in next(iter(found.values())).ratios:
            cells = [_cell(found[size], name) if size in found else "" for size in sizes]
            size_px = next(iter(found.values())).image_size
            lines.append(f"| {network}, {size_px} px | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    ratio = row.ratios[name]
    return f"({ratio.median:.2f})" if ratio.low <= 1 <= ratio.high else f"{ratio.median:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of those that this file names")
    parser.add_argument("--batch-sizes", default="1,16,128")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None, help="JSON")
    given = parser.parse_args()
    host = read_host(given.threads)
    torch.set_num_threads(host.threads)
    file: Path | None = given.output
    rows = list(from_json(Floats, file.read_text()).rows) if file and file.exists() else []
    for network in given.networks.split(","):
        if network not in {row.network for row in rows}:
            rows += measure(network, NETWORKS[network], [int(size) for size in given.batch_sizes.split(",")], host)
            print(markdown([row for row in rows if row.network == network]), flush=True)
            if file:
                file.write_text(to_json(Floats(host, tuple(rows))) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
