"""What `auto` stands for in training, alone on the machine and beside a busy process: images a second of a few epochs.

    python benchmarks/execution.py --models resnet18,mobilenet_v2,smallnet,vgg16 --output results/execution.json

Each case is a training of its own process (random images, 32 px, batch 128): `auto`, and what was done before, one
thread a core in bf16, channels-last, with OpenMP's threads spinning as they wait; and the same in fp32. Busy means that
one other process keeps one of the cores busy. Cases take turns, round by round; figures are medians. Prints a Markdown
table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

SPIN = "while True: pass"
IMAGES = {"vgg16": 128, "squeezenet1_1": 1536}  # an epoch; others have 384
CASES: dict[str, tuple[dict[str, bool | int | None], dict[str, str]]] = {  # options of training, environment
    "auto": ({}, {}),
    "before": ({"bf16": True, "channels_last": True}, {"GOMP_SPINCOUNT": "300000"}),  # OpenMP's default, as if chosen
    "before, fp32": ({"bf16": False, "channels_last": True}, {"GOMP_SPINCOUNT": "300000"}),
}


@dataclass(frozen=True)
class Measured:
    """One training in a process of its own; `duration_s` includes the trials."""

    images_per_second: float
    bf16: bool
    threads: int
    channels_last: bool
    waiting: str
    trials_s: float


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; `chosen` is what each round's trials chose."""

    model: str
    busy: bool
    case: str
    images_per_second: float
    lowest: float
    highest: float
    chosen: tuple[str, ...]
    trials_s: float


def train_here(model_name: str, options: dict[str, bool | int | None], threads: int) -> Measured:
    """Train for two epochs; the pace is that of the second."""
    import time

    import torch

    from qexp.config import TrainConfig
    from qexp.data.datasets import Dataset, Split
    from qexp.measurement.host import freed_memory_reused
    from qexp.models.classifier import ModelSpec, build_classifier
    from qexp.models.preprocessing import squashed
    from qexp.training import train as training
    from qexp.training.execution import settle_execution

    torch.set_num_threads(threads)
    classes = tuple("abcdefghij")
    generator = torch.Generator().manual_seed(0)
    count = IMAGES.get(model_name, 384)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (count,), generator=generator))
    few = split.subset(torch.arange(16))
    dataset = Dataset("random", "random", classes, split, few, few, "")
    torch.manual_seed(0)
    model = build_classifier(ModelSpec(model_name, classes, squashed(32)), images)
    config = TrainConfig(epochs=2, device="cpu", **options)
    if options:  # what is compared with: a thread a core
        config = config.model_copy(update={"train_threads": threads})
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        with freed_memory_reused():  # as in the training
            settle_execution(config, "cpu", model, split, Path(name))
        trials_s = time.perf_counter() - started
        found = training.train_model(model, dataset, config, 0, lambda epoch: None, Path(name))
    pace = found.epochs[-1].images_per_second
    return Measured(pace, found.bf16, found.threads, found.channels_last, found.waiting, trials_s)


def measure(model: str, case: str, threads: int) -> Measured:
    """`train_here` in a process with the environment of the case."""
    options, variables = CASES[case]
    chosen = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | variables
    command = [sys.executable, __file__, "--train", model, "--options", json.dumps(options), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """One process that keeps this core busy."""
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\n{SPIN}"]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_all(models: list[str], rounds: int, threads: int) -> list[Row]:
    """Every model alone and beside a busy process, all cases in turns."""
    cores, rows = sorted(os.sched_getaffinity(0)), []
    for model in models:
        for busy in (False, True):
            found: dict[str, list[Measured]] = {case: [] for case in CASES}
            for _ in range(rounds):
                for case in CASES:
                    if busy:
                        with busy_core(cores[-1]):
                            found[case].append(measure(model, case, threads))
                    else:
                        found[case].append(measure(model, case, threads))
            rows += [row_of(model, busy, case, measured) for case, measured in found.items()]
            print(*rows[-len(CASES) :], sep="\n", flush=True)
    return rows


def row_of(model: str, busy: bool, case: str, measured: list[Measured]) -> Row:
    """The rounds of one case."""
    paces = [one.images_per_second for one in measured]
    chosen = tuple(
        f"{'bf16' if one.bf16 else 'fp32'}, {one.threads} threads"
        + ("" if one.channels_last else ", contiguous")
        + (", spinning" if one.waiting == "default" else "")
        for one in measured
    )
    trials_s = statistics.median(one.trials_s for one in measured)
    return Row(model, busy, case, statistics.median(paces), min(paces), max(paces), chosen, trials_s)


def markdown(rows: list[Row]) -> str:
    """A line a model, alone and busy."""
    lines = [f"| | | {' | '.join(CASES)} | `auto` chose |", f"| :-- | :-- |{' --: |' * len(CASES)} :-- |"]
    for row in rows:
        if row.case == "auto":
            same = [one for one in rows if (one.model, one.busy) == (row.model, row.busy)]
            paces = " | ".join(f"{one.images_per_second:,.0f}" for one in same)
            chosen = "; ".join(dict.fromkeys(row.chosen))
            lines.append(f"| {row.model} | {'busy' if row.busy else 'alone'} | {paces} | {chosen} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="resnet18,mobilenet_v2,smallnet,vgg16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--train", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    threads = given.threads or len(os.sched_getaffinity(0))
    if given.train:
        print(json.dumps(asdict(train_here(given.train, json.loads(given.options), threads))))
        return
    from qexp.measurement.host import read_host

    rows = measure_all(given.models.split(","), given.rounds, threads)
    print(markdown(rows))
    host = read_host(threads)
    text = json.dumps({"host": asdict(host), "load_average": os.getloadavg()[0], "rows": [asdict(row) for row in rows]})
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
