"""int8 against the peers: our engines, OpenVINO with NNCF's defaults, ONNX Runtime with its own, on this CPU.

    pip install -e '.[bench]'
    python benchmarks/peers.py --model-uri models:/vgg16-cifar10-fp32/1 --data-dir data/cifar10 --output results/peers

The same trained weights, calibration images, test images and thread count for all. Accuracy and size first; then, in a
process of its own for each registered fp32 model, p50 at every batch size: all int8 models in short rounds in random
order, loaded anew for each batch size, as `qexp run` times its own. A ratio is the median of the rounds' ratios, with
its 95 % interval. The machine's own limits are measured in that process too: the rate of an int8 matrix product and
the rate at which memory is read. Writes OUTPUT.md, OUTPUT.json and OUTPUT.png.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from limits import Limits, Operation, measure_limits, profile_pass
from matplotlib.figure import Figure
from peer_models import FOLDED, LOADERS, OURS, PEERS, make_all
from pydantic import TypeAdapter
from torch import Tensor

from qexp import registered, registry
from qexp.claims import three_digits
from qexp.config import Config, DataConfig, LatencyConfig
from qexp.cost import measure_cost
from qexp.data import Dataset, calibration_count, calibration_subset, load_dataset
from qexp.evaluation import Comparison, compare, measure_accuracy, predict_logits
from qexp.evidence import from_json, to_json
from qexp.host import Host, read_host
from qexp.latency import AGAIN, LatencyRow, Ratio, measure_latency
from qexp.report import table
from qexp.store import use_store

DEFAULT = "fx"  # what `qexp run` does unless told otherwise, with the kernels that it chose by measuring
PROFILED = "fx_onednn"
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


@dataclass(frozen=True)
class Entry:
    """An int8 model: size of its file or files, accuracy on the test images, drop with its 95 % interval.

    `below_peer_points`: of one of ours, how much less accurate it is than the most accurate peer on the same images,
    with the ends of the 95 % interval.
    """

    name: str
    size_bytes: int
    top1_percent: float
    drop_points: float
    drop_low_points: float
    drop_high_points: float
    made_in_s: float
    below_peer_points: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Peers:
    """All int8 models of one registered fp32 model; `macs` and `weight_bytes` are those of the default engine's.

    `profiles` has where the time of the default engine's pass goes, by batch size: the smallest and the largest.
    """

    model: str
    fp32_top1_percent: float
    test_images: int
    entries: tuple[Entry, ...]
    rows: tuple[LatencyRow, ...]
    limits: Limits
    macs_of_one_image: int
    weight_bytes: int
    host: Host
    profiles: dict[int, tuple[Operation, ...]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-uri", action="append", default=[], help="registered fp32 version; may be repeated")
    parser.add_argument("--data-dir", help="folder of its data set")
    parser.add_argument("--output", type=Path, default=Path("results/peers"), help="without ending")
    parser.add_argument("--rounds", type=int, default=30, help="rounds at each batch size, at least")
    parser.add_argument("--earlier", type=Path, action="append", default=[], help="JSON of an earlier run, shown first")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)  # the child process: a folder of models
    arguments = parser.parse_args()
    if arguments.time:
        return _time(arguments.time, arguments.rounds)
    earlier = [peers for file in arguments.earlier for peers in from_json(tuple[Peers, ...], file.read_text())]
    use_store()
    found = earlier + [_compare(uri, arguments.data_dir, arguments.rounds) for uri in arguments.model_uri]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(_render(peers) for peers in found)
    picture = f"![Time over that of the best peer, by batch size]({arguments.output.name}.png)"
    arguments.output.with_suffix(".md").write_text(f"# int8 against the peers\n\n{picture}\n\n{text}\n")
    arguments.output.with_suffix(".json").write_text("[" + ",\n".join(to_json(peers) for peers in found) + "]\n")
    _draw(found, arguments.output.with_suffix(".png"))
    print(text)


def _compare(uri: str, data_dir: str | None, rounds: int) -> Peers:
    config = registered.config_of_version(Config(data=DataConfig(data_dir=data_dir)), uri, "fp32")
    host = read_host(None)
    torch.set_num_threads(host.threads)
    dataset = load_dataset(config.data, config.seed)
    registered.check_data(uri, dataset)
    fp32 = registered.fp32_from_registry(uri, dataset, splits=("test",))
    count = calibration_count(config.quantize, dataset.train)
    images = calibration_subset(dataset.train, count, config.seed)[0].images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_all(fp32.model, images, folder, reduce_range=not host.has_int8_dot_product)
        entries = _entries(folder, made, fp32.logits["test"], dataset)
        command = [sys.executable, "-W", "ignore", __file__, "--time", name, "--rounds", str(rounds)]
        subprocess.run(command, env=registry.child_environment(host.threads), check=True)
        rows = from_json(tuple[LatencyRow, ...], (folder / "rows.json").read_text())
        limits = from_json(Limits, (folder / "limits.json").read_text())
        profiles = from_json(dict[int, tuple[Operation, ...]], (folder / "profiles.json").read_text())
    top1 = measure_accuracy(fp32.logits["test"], dataset.test.labels).top1_percent
    macs = measure_cost(fp32.model, fp32.model.spec.image_size, [1], ()).macs[1]
    weights = next(entry.size_bytes for entry in entries if entry.name == DEFAULT)
    host = replace(
        host, libraries=host.libraries | {name: version(name) for name in ("onnxscript", "openvino", "nncf")}
    )
    return Peers(uri, top1, len(dataset.test), tuple(entries), rows, limits, macs, weights, host, profiles)


def _entries(folder: Path, made: dict[str, float], fp32: Tensor, dataset: Dataset) -> list[Entry]:
    labels, entries = dataset.test.labels, []
    logits = {name: predict_logits(LOADERS[name](folder), dataset.test.images, label=name) for name in made}
    top1 = {name: measure_accuracy(found, labels).top1_percent for name, found in logits.items()}
    best = max((name for name in made if name in PEERS), key=lambda name: top1[name])
    for name, seconds in made.items():
        drop = _with_interval(compare(fp32, logits[name], labels))
        below = _with_interval(compare(logits[best], logits[name], labels)) if name in OURS else None
        size = sum(file.stat().st_size for file in folder.glob(f"{name}.*"))
        entries.append(Entry(name, size, top1[name], *drop, seconds, below))
    return entries


def _with_interval(found: Comparison) -> tuple[float, float, float]:
    return found.top1_drop_points, found.top1_drop_low_points, found.top1_drop_high_points


def _time(folder: Path, rounds: int) -> None:
    """In a process of its own: every model of the folder at every batch size, and the machine's limits."""
    torch.set_num_interop_threads(1)
    names = [name for name in LOADERS if list(folder.glob(f"{name}.*"))]
    size = int((folder / "image_size").read_text())

    def prepare(batch_size: int) -> dict[str, Callable[[], object]]:
        images = torch.rand(batch_size, 3, size, size)
        models = {name: LOADERS[name](folder) for name in names} | {AGAIN: LOADERS[DEFAULT](folder)}
        return {name: lambda model=model: model(images) for name, model in models.items()}  # type: ignore[misc]

    options = LatencyConfig(batch_sizes=BATCHES, min_repeats=rounds, min_seconds=2.0)
    with torch.no_grad():
        (folder / "limits.json").write_text(to_json(measure_limits()))
        (folder / "rows.json").write_text(_to_json(measure_latency(prepare, DEFAULT, DEFAULT, options, on_row=_say)))
        profiles = {}
        for batch_size in (BATCHES[0], BATCHES[-1]):
            profiles[batch_size] = profile_pass(LOADERS[PROFILED](folder), torch.rand(batch_size, 3, size, size))
        (folder / "profiles.json").write_text(_to_json(profiles))


def _to_json(found: object) -> str:
    return TypeAdapter(Any).dump_json(found).decode()


def _say(row: LatencyRow) -> None:
    times = ", ".join(f"{name} {stats.p50_ms:.3g}" for name, stats in row.stats.items())
    print(
        f"batch {row.batch_size}, {len(row.round_ms[DEFAULT])} rounds, p50 in ms: {times}", file=sys.stderr, flush=True
    )


def best_peer(row: LatencyRow) -> str:
    """The peer with the smallest p50 at a batch size."""
    return min((name for name in PEERS if name in row.stats), key=lambda name: row.stats[name].p50_ms)


def ratio_to_best(row: LatencyRow, name: str) -> Ratio:
    """Time of one of our models over that of the best peer: below 1 is faster."""
    return row.ratio(name, best_peer(row))


def _render(peers: Peers) -> str:
    head = ["int8 model", "size, MB", "test top-1", "drop, points (95 %)", "below the best peer", "made in, s"]
    accuracy = [
        [
            entry.name,
            f"{entry.size_bytes / 1e6:.3f}",
            f"{entry.top1_percent:.2f} %",
            _points((entry.drop_points, entry.drop_low_points, entry.drop_high_points)),
            _points(entry.below_peer_points) if entry.below_peer_points else "-",
            f"{entry.made_in_s:.1f}",
        ]
        for entry in peers.entries
    ]
    names = list(peers.rows[0].stats)
    batches = [f"{row.batch_size}" for row in peers.rows]
    times = [[name, *(three_digits(row.stats[name].p50_ms) for row in peers.rows)] for name in names]
    ours = [name for name in names if name in OURS]
    ratios = [[name, *(_ratio_text(row, name) for row in peers.rows)] for name in ours]
    ratios.append(["best peer", *(best_peer(row) for row in peers.rows)])
    ratios.append(["noise", *(f"{row.noise.low:.2f} to {row.noise.high:.2f}" for row in peers.rows)])
    rounds = [len(row.round_ms[DEFAULT]) for row in peers.rows]
    host = peers.host
    libraries = ", ".join(f"{name} {number}" for name, number in host.libraries.items())
    parts = [
        f"## {peers.model}",
        f"{host.cpu} ({', '.join(host.features)}), {host.threads} threads, {libraries}; {min(rounds)} to {max(rounds)} "
        f"rounds at each batch size. fp32: {peers.fp32_top1_percent:.2f} % of {peers.test_images:,} test images.",
        table(head, accuracy),
        "p50 in ms by batch size:",
        table(["int8 model", *batches], times),
        "Time over that of the best peer (below 1 is faster), with 95 % interval; `?`: cannot be told apart above the "
        "noise, the default engine against a second copy of itself:",
        table(["int8 model", *batches], ratios),
        _about_limits(peers),
        *(_profile_text(batch_size, found) for batch_size, found in peers.profiles.items()),
    ]
    return "\n\n".join(parts)


def _ratio_text(row: LatencyRow, name: str) -> str:
    ratio = ratio_to_best(row, name)
    text = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return text if row.compared(best_peer(row), name) else f"{text} ?"


def _points(found: tuple[float, float, float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def _about_limits(peers: Peers) -> str:
    first, last = peers.rows[0], peers.rows[-1]
    same = [name for name in first.stats if name in OURS and name != FOLDED]  # as many multiply-accumulates as fp32
    fast = {row.batch_size: min(row.stats[name].p50_ms for name in same) for row in (first, last)}
    rate = last.batch_size * peers.macs_of_one_image / fast[last.batch_size] / 1e6
    read = peers.weight_bytes * 1e-6 / fast[first.batch_size]
    return (
        f"The machine: {peers.limits.int8_gmacs_per_s:,.0f} G int8 multiply-accumulates a second in a matrix product "
        f"(2048 x 4096 x 4096), {peers.limits.read_gb_per_s:.1f} GB/s read from memory. Our fastest int8 model that is "
        f"not folded does {rate:,.0f} G of the model's multiply-accumulates a second at batch size {last.batch_size} "
        f"({100 * rate / peers.limits.int8_gmacs_per_s:.0f} %); at batch size {first.batch_size} it goes through the "
        f"default engine's {peers.weight_bytes / 1e6:.1f} MB of weights at {read:.1f} GB/s "
        f"({100 * read / peers.limits.read_gb_per_s:.0f} %; above 100 % if they stay in the caches). A call of torch's "
        f"int8 convolution that has nothing to compute takes {peers.limits.call_us:.1f} µs."
    )


def _profile_text(batch_size: int, found: tuple[Operation, ...]) -> str:
    head = ["operation", "input", "calls", "µs", "share"]
    rows = [
        [
            f"`{one.name}`",
            " x ".join(map(str, one.input_shape)) or "-",
            str(one.calls),
            f"{one.time_us:,.0f}",
            f"{one.share_percent:.1f} %",
        ]
        for one in found
    ]
    title = f"Where a pass of `{PROFILED}` spends its time at batch size {batch_size}, by torch's profiler:"
    return f"{title}\n\n{table(head, rows)}"


def _draw(found: list[Peers], file: Path) -> None:
    figure = Figure(figsize=(4.6 * len(found), 3.4), dpi=160, layout="constrained")
    for axes, peers in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        batches = [row.batch_size for row in peers.rows]
        for name in peers.rows[0].stats:
            style = "o-" if name in OURS else "s--"
            axes.plot(batches, [ratio_to_best(row, name).median for row in peers.rows], style, ms=3, lw=1, label=name)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_title(peers.model, fontsize=9)
        axes.set(xlabel="batch size", ylabel="time over that of the best peer", ylim=(0, 2.5))
        axes.legend(fontsize=6)
    figure.savefig(file)


if __name__ == "__main__":
    main()
