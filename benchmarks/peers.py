"""int8 against the peers and the fastest float: our engines, OpenVINO with NNCF, ONNX Runtime, PyTorch, on this CPU.

    pip install -e '.[bench]'
    python benchmarks/peers.py --model-uri models:/vgg16-cifar10-fp32/1 --data-dir data/cifar10 --output results/peers

The same trained weights, calibration images, test images and thread count for all. Accuracy and size first; then, in a
process of its own for each registered fp32 model, p50 at every batch size: all models in short rounds in random
order, loaded anew several times for each batch size, as `qexp run` times its own. A ratio is the geometric mean over
the loads of the median of their rounds' ratios, with its 95 % interval. The version chosen is the one that `qexp run`
would choose. The machine's own limits are measured in that process too: the clock, the rate of an int8 matrix product
and the rate at which memory is read.

Writes OUTPUT.md, OUTPUT.json and OUTPUT.png.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from limits import Limits, Operation, measure_limits, profile_pass
from peer_models import MODELS, OURS, PEERS, load, make_all, present
from peer_results import DEFAULT, PROFILED, Entry, Peers, draw, page
from pydantic import TypeAdapter
from torch import Tensor

from qexp.config import Config, DataConfig, LatencyConfig
from qexp.data.datasets import Dataset, calibration_count, calibration_subset, load_dataset
from qexp.errors import InputError
from qexp.files import from_json, to_json
from qexp.measurement.accuracy import Comparison, compare, measure_accuracy, predict_logits
from qexp.measurement.choice import Candidate, choose
from qexp.measurement.cost import measure_cost
from qexp.measurement.host import read_host
from qexp.measurement.latency import AGAIN, FEWEST_ROUNDS, LatencyResult, LatencyRow, measure_latency
from qexp.pipeline import loading as registered
from qexp.tracking import registry
from qexp.tracking.store import use_store

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


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
    if not arguments.model_uri and not arguments.earlier:
        parser.error("give a --model-uri, or an --earlier result")
    if arguments.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {arguments.rounds}: must be at least {FEWEST_ROUNDS}, for an interval")
    if arguments.model_uri and find_spec("nncf") is None:
        parser.error("nncf is missing: pip install -e '.[bench]'")
    earlier = [peers for file in arguments.earlier for peers in from_json(tuple[Peers, ...], file.read_text())]
    try:
        if arguments.model_uri:
            use_store()
        found = earlier + [_compare(uri, arguments.data_dir, arguments.rounds) for uri in arguments.model_uri]
    except InputError as error:
        parser.error(str(error))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = page(found, arguments.output.with_suffix(".png").name)
    arguments.output.with_suffix(".md").write_text(text)
    arguments.output.with_suffix(".json").write_text("[" + ",\n".join(to_json(peers) for peers in found) + "]\n")
    draw(found, arguments.output.with_suffix(".png"))
    print(text)


def _compare(uri: str, data_dir: str | None, rounds: int) -> Peers:
    config = registered.config_of_version(Config(data=DataConfig(data_dir=data_dir)), uri, "fp32")
    host = read_host(None)
    torch.set_num_threads(host.threads)
    dataset = load_dataset(config.data, config.seed)
    registered.check_data(uri, dataset)
    fp32 = registered.fp32_from_registry(uri, dataset, splits=("test",))
    count = calibration_count(config.quantize, dataset.calibration_images)
    images = calibration_subset(dataset.calibration_images, count, config.seed)[0].pixels()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_all(fp32.model, images, folder, reduce_range=not host.has_int8_dot_product)
        entries, drops = _entries(folder, made.seconds, fp32.logits["test"], dataset)
        command = [sys.executable, "-W", "ignore", __file__, "--time", name, "--rounds", str(rounds)]
        path = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        subprocess.run(command, env=registry.child_environment(host.threads) | path, check=True)
        rows = from_json(tuple[LatencyRow, ...], (folder / "rows.json").read_text())
        limits = from_json(Limits, (folder / "limits.json").read_text())
        profiles = from_json(dict[int, tuple[Operation, ...]], (folder / "profiles.json").read_text())
    top1 = measure_accuracy(fp32.logits["test"], dataset.test.labels).top1_percent
    macs = measure_cost(fp32.model, fp32.model.spec.shape, [1], ()).macs[1]
    sizes = {entry.name: entry.size_bytes for entry in entries}
    limit = config.gate.max_top1_drop
    candidates = [
        Candidate(name, drop, sizes[name], passed=True, accurate=drop.top1_drop_high_points <= limit)
        for name, drop in drops.items()
        if name in OURS
    ]
    best = choose(candidates, LatencyResult(DEFAULT, rows, (), host.threads))
    host = replace(
        host, libraries=host.libraries | {name: version(name) for name in ("onnxscript", "openvino", "nncf")}
    )
    return Peers(
        uri,
        top1,
        len(dataset.test),
        tuple(entries),
        rows,
        limits,
        macs,
        sizes[DEFAULT],
        host,
        profiles,
        profile_statistic="median",
        chosen=best.name,
        not_chosen=best.not_chosen,
        failed=made.failed,
    )


def _entries(
    folder: Path, made_in_s: dict[str, float], fp32: Tensor, dataset: Dataset
) -> tuple[list[Entry], dict[str, Comparison]]:
    """Of each model; and the comparisons with fp32, on which the choice rests."""
    labels, entries = dataset.test.labels, []
    names = present(folder)
    logits = {name: predict_logits(load(name, folder), dataset.test.images, label=name) for name in names}
    top1 = {name: measure_accuracy(found, labels).top1_percent for name, found in logits.items()}
    best = max((name for name in names if name in PEERS), key=lambda name: top1[name])
    drops = {name: compare(fp32, logits[name], labels) for name in names}
    for name in names:
        below = _with_interval(compare(logits[best], logits[name], labels)) if name in OURS else None
        file = folder / MODELS[name].file
        size = sum(one.stat().st_size for one in folder.glob(f"{file.stem}.*") if one.suffix in (file.suffix, ".bin"))
        seconds = made_in_s[file.name]
        entries.append(Entry(name, size, top1[name], *_with_interval(drops[name]), seconds, below))
    return entries, drops


def _with_interval(found: Comparison) -> tuple[float, float, float]:
    return found.top1_drop_points, found.top1_drop_low_points, found.top1_drop_high_points


def _time(folder: Path, rounds: int) -> None:
    """In a process of its own: every model of the folder at every batch size, and the machine's limits."""
    torch.set_num_interop_threads(1)
    size = int((folder / "image_size").read_text())

    def prepare(batch_size: int) -> dict[str, Callable[[], object]]:
        images = torch.rand(batch_size, 3, size, size)
        models = {name: load(name, folder) for name in present(folder)} | {AGAIN: load(DEFAULT, folder)}
        return {name: partial(model, images) for name, model in models.items()}

    options = LatencyConfig(batch_sizes=BATCHES, min_repeats=rounds, min_seconds=2.0)
    with torch.no_grad():
        (folder / "limits.json").write_text(to_json(measure_limits(read_host(None))))
        (folder / "rows.json").write_text(_to_json(measure_latency(prepare, DEFAULT, DEFAULT, options, on_row=_say)))
        profiles = {}
        for batch_size in (BATCHES[0], BATCHES[-1]):
            profiles[batch_size] = profile_pass(load(PROFILED, folder), torch.rand(batch_size, 3, size, size))
        (folder / "profiles.json").write_text(_to_json(profiles))


def _to_json(found: object) -> str:
    return TypeAdapter(Any).dump_json(found).decode()


def _say(row: LatencyRow) -> None:
    times = ", ".join(f"{name} {stats.p50_ms:.3g}" for name, stats in row.stats.items())
    print(
        f"batch {row.batch_size}, {len(row.round_ms[DEFAULT])} rounds, p50 in ms: {times}", file=sys.stderr, flush=True
    )


if __name__ == "__main__":
    main()
