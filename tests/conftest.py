"""What several test modules need: a data set, a trained model, evidence made by hand, and one finished pipeline run."""

import fcntl
import gc
import json
import os
import random
import resource
import shutil
import sqlite3
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch, as commands set it, which here are forks
os.environ["CXX"] = "none"  # for one set of floats everywhere: torch compiles some where there is a C++ compiler

import mlflow
import numpy as np
import pytest
import torch
from forked import REPOSITORY, Forked, start_forked, start_forking
from PIL import Image
from stores import new_store
from sympy.core.cache import clear_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qexp.config import DataConfig, TrainConfig
from qexp.data.datasets import Dataset, load_dataset
from qexp.files import from_json, to_json
from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.cost import FLOP_COUNTER, Cost
from qexp.measurement.gate import GateResult
from qexp.measurement.host import Host, give_back_freed_memory
from qexp.measurement.latency import LatencyResult, LatencyRow, LatencyStats, Ratio, StartUp
from qexp.models.classifier import Classifier, ModelSpec, build_classifier, load_classifier, save_classifier
from qexp.models.preprocessing import squashed
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import LayerSensitivity, SensitivityResult
from qexp.report.results import DataFacts, Evidence, Fp32Evidence, Int8Evidence, Judged, LatencyEvidence
from qexp.training.train import EpochResult, TrainResult, train_model

# For tests that need a run and look at neither: a sweep has no more models than int8 needs, no layer is tried alone.
PLAIN = "--engine fx --baselines none --sensitivity-images 0".split()
# For commands whose figures nobody looks at: drawing those of one report takes as long as a sweep. They run this first.
NO_FIGURES = """
from PIL import Image
from qexp.report import figures
figures.save_figure = lambda draw, result, file: (Image.new("RGB", (1, 1)).save(file), file)[1]
"""
# Enough for a model that has learnt something, and for every stage to have run.
# Other tests run beside it: its times are not good for anything but to have been measured.
QUICK = (
    "--image-size 16 --epochs 4 --batch-sizes 1,8 --min-repeats 6 --loads 3 --min-seconds 0 --warmup 1 "
    "--max-busy-percent 100 --min-speedup 0 --calibration-samples 64 --baselines fp32_traced --sensitivity-images 16 "
    "--engine fx"
).split()
SEED = 0
SEEDS = f"every test begins with seed {SEED} in random, numpy and torch"
QUICK_TESTS = "not slow and not long"  # what `make test-quick` gives to -m
# Fixtures and functions that train or start a process: what uses one is not quick.
SLOW = {
    "trained", "finished", "in_use", "run_qexp", "start_qexp", "run_apart", "start_server", "start_postgres",
    "subprocess", "Popen",
}  # fmt: skip
FINISHED = {"finished", "in_use"}  # what uses one needs the run that is made once
MOST_MEMORY_GB = 2.0  # resident memory of a test process, at most; 1.6 was measured
# What `auto` stands for is timed; trainings that are compared, or only looked at, are told.
EXECUTION: dict[str, Any] = {"bf16": False, "channels_last": True, "train_threads": 1}
NOT_TIMED = "--bf16 false --channels-last true --train-threads 1".split()  # the same for a command


@dataclass(frozen=True)
class Finished:
    """A command that ran as a process of its own: its folder, store, exit code and what it printed."""

    folder: Path
    uri: str
    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


def pytest_report_header() -> str:
    return f"qexp: {SEEDS}"


def pytest_configure(config: pytest.Config) -> None:
    """A worker of xdist, and what it starts, keeps to cores of its own: threads on a busy core make others wait."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        if cores:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(len(cores))
    runs_tests = number or not config.getoption("numprocesses", None)
    if runs_tests and config.option.markexpr != QUICK_TESTS:
        start_forking()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a trained model or another process are slow, also without the mark; and of the engines, those
    that export the model. Files with slow tests come first, so that no worker is left with one at the end. One of those
    that need the finished run is the very first, the others come after those that do not: no worker waits for it."""
    for item in items:
        engine = item.callspec.params.get("engine") if hasattr(item, "callspec") else None
        if engine in ("pt2e", "onnx") or (isinstance(item, pytest.Function) and SLOW & _used_by(item)):
            item.add_marker("slow")
        if item.get_closest_marker("long") and not os.environ.get("QEXP_LONG_TESTS"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-long"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    waiting = {item.path: None for item in items if FINISHED & set(item.fixturenames) and item.path in slow}
    first = next(iter(waiting), None)
    items.sort(key=lambda item: (item.path != first, item.path not in slow, item.path in waiting))


def _used_by(item: pytest.Function) -> set[str]:
    """Fixtures of a test, and what it and they call."""
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    codes = [function.__code__ for function in (item.function, *fixtures) if hasattr(function, "__code__")]
    return {*item.fixturenames, *(name for code in codes for name in code.co_names)}


def pytest_collection_finish() -> None:
    """What importing has made stays: looking through it for garbage, again and again, takes a third of a second."""
    gc.collect()
    gc.freeze()


def _seed_all() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="module", autouse=True)
def _seeds_of_the_module() -> None:
    """What fixtures draw does not depend on other files."""
    _seed_all()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """What a test draws does not depend on the tests before it."""
    _seed_all()


def environment_for(uri: str) -> dict[str, str]:
    """The environment of a command that uses the store at `uri`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return environment | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(REPOSITORY)}


def start_qexp(
    folder: Path, *arguments: str, uri: str | None = None, before: str = "", variables: dict[str, str] | None = None
) -> Forked:
    """Start `qexp ARGUMENTS` in `folder`, with its own SQLite store there unless `uri` names another.

    `before` is Python that the process runs first; `variables` are added to its environment.
    """
    environment = environment_for(uri or new_store(folder)) | (variables or {})
    return start_forked(folder, arguments, environment, before)


def run_qexp(
    folder: Path, *arguments: str, uri: str | None = None, before: str = "", timeout_s: float = 300
) -> Finished:
    """The same, to its end."""
    process = start_qexp(folder, *arguments, uri=uri, before=before)
    code = process.wait(timeout_s)
    return Finished(folder, uri or new_store(folder), code, process.stdout, process.stderr)


@contextmanager
def _store_put_back() -> Iterator[None]:
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")  # which `mlflow.set_experiment` sets
    yield
    mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: as at the start
    mlflow.tracking.fluent._active_experiment_id = experiment
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None) if experiment is None else os.environ.update(
        MLFLOW_EXPERIMENT_ID=experiment
    )


@pytest.fixture(autouse=True)
def _store_of_the_test() -> Iterator[None]:
    """What one test sets as MLflow's store is not that of the next."""
    with _store_put_back():
        yield


@pytest.fixture(scope="module", autouse=True)
def _store_of_the_module() -> Iterator[None]:
    """The same for what fixtures of a module set."""
    with _store_put_back():
        yield


_STATUS = Path("/proc/self/status")


def _peak_memory_gb() -> float:
    """Of resident memory, since `_forget_peak`; where the system does not forget it, since the process began."""
    if _STATUS.exists():
        return next(int(line.split()[1]) for line in _STATUS.open() if line.startswith("VmHWM")) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _forget() -> None:
    """What exporting leaves in caches, and what was freed, is given back."""
    torch._dynamo.reset()
    FakeTensorMode.cache_clear()
    clear_cache()
    gc.collect()
    give_back_freed_memory()


@pytest.fixture(scope="module", autouse=True)
def _memory_of_the_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the tests of a file leave is given back, and none needs more than MOST_MEMORY_GB: several processes share a
    machine. A test that needs more runs apart (`forked.run_apart`)."""
    _forget_peak()
    before = _peak_memory_gb()
    yield
    peak = _peak_memory_gb()
    _forget()
    within = peak <= max(before, MOST_MEMORY_GB)
    assert within, f"{request.path.name}: {peak:.1f} GB of memory, more than {MOST_MEMORY_GB}; run the test apart"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole job, `qexp run`, on digits: for tests that only look. One for all workers of xdist."""
    with _shared(tmp_path_factory, "finished") as shared:
        note = shared / "finished.json"
        if not note.exists():
            folder = shared / "finished run"
            folder.mkdir()
            note.write_text(json.dumps(asdict(_run_once(folder)) | {"folder": str(folder)}))
    values = json.loads(note.read_text())
    return Finished(**values | {"folder": Path(values["folder"])})


@contextmanager
def _shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of all workers of xdist; one at a time makes what has this name there."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared


@pytest.fixture(scope="session")
def in_use(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same in a copy of its store: for tests that add versions and runs to it, whose files are in its folder."""
    folder = tmp_path_factory.mktemp("run in use")
    shutil.copy(finished.folder / "mlflow.db", folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute("update experiments set artifact_location = ? || experiment_id", [f"{folder}/mlruns/"])
    return replace(finished, folder=folder, uri=f"sqlite:///{folder}/mlflow.db")


def _run_once(folder: Path) -> Finished:
    uri = f"sqlite:///{folder}/mlflow.db"  # not there: the first use of a store is part of it
    done = run_qexp(folder, "run", *QUICK, "--output-dir", "report", uri=uri)
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(DataConfig(image_size=16), seed=0)


@pytest.fixture(scope="session")
def pictures(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scans as PNG files: three classes, 24 train and 8 test images each, 20 x 20 pixels."""
    root = tmp_path_factory.mktemp("pictures") / "Three Digits"
    for part, split, count in (("train", digits.train, 24), ("test", digits.test, 8)):
        for label in range(3):
            folder = root / part / f"digit {label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(split.images[split.labels == label][:count]):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20))
                picture.save(folder / f"{number}.png")
    return root


def of_pictures(pictures: Path) -> list[str]:
    """Options by which a command takes those at 8 px: an epoch of SmallNet takes no time."""
    return ["--dataset", "imagefolder", "--data-dir", str(pictures), "--image-size", "8", *NOT_TIMED]


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    """Digits at 8 px: 160 to train with and 60 to validate."""
    dataset = load_dataset(DataConfig(image_size=8), seed=0)
    train, validation = dataset.train.subset(torch.arange(160)), dataset.validation.subset(torch.arange(60))
    return replace(dataset, train=train, validation=validation)


def build_tiny(dataset: Dataset) -> Classifier:
    """The SmallNet for `tiny`, with the weights of seed 0."""
    torch.manual_seed(0)
    return build_classifier(ModelSpec("smallnet", dataset.classes, squashed(8)), dataset.train.images)


def equal_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and buffers are equal bit for bit."""
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="session")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, TrainResult]:
    """SmallNet after three epochs on digits. One for all workers of xdist."""
    with _shared(tmp_path_factory, "trained") as shared:
        weights, note = shared / "trained.safetensors", shared / "trained.json"
        if not note.exists():
            torch.manual_seed(0)
            model = build_classifier(ModelSpec("smallnet", digits.classes, squashed(16)), digits.train.images)
            folder = tmp_path_factory.mktemp("trained")
            result = train_model(model, digits, TrainConfig(epochs=3, **EXECUTION), 0, lambda epoch: None, folder)
            save_classifier(model, weights)
            note.write_text(to_json(result))
    return load_classifier(weights), from_json(TrainResult, note.read_text())


def latency_row(
    batch_size: int, times_ms: dict[str, float], rounds: int = 20, noise_percent: float = 1.0, p90: float = 1.1
) -> LatencyRow:
    """A row of models that take so many ms, give or take 1 % from round to round, the same from call to call.

    The first is the baseline. `noise_percent`: how far one model against itself is from 1, either way. The rounds are
    those of five loads, or of as many as there are rounds.
    """
    moved = random.Random(batch_size)
    round_ms = {name: tuple(ms * f for f in _spread_around_one(moved, rounds)) for name, ms in times_ms.items()}
    stats = {
        name: LatencyStats(ms, p90 * ms, 1.5 * ms, 1000 * batch_size / ms, repeats=3 * rounds)
        for name, ms in times_ms.items()
    }
    noise = Ratio(1.0, 1 - noise_percent / 100, 1 + noise_percent / 100)
    loads = tuple(len(part) for part in torch.arange(rounds).tensor_split(min(5, rounds)))
    row = LatencyRow(batch_size, stats, round_ms, {}, noise, loads)
    return with_speedups_of_rounds(row, next(iter(round_ms)))


def with_speedups_of_rounds(row: LatencyRow, base: str) -> LatencyRow:
    """`row` with the speed-ups over `base` that its rounds give."""
    return replace(row, speedups={name: row.ratio(base, name) for name in row.round_ms})


def _spread_around_one(moved: random.Random, rounds: int) -> Sequence[float]:
    """Factors from 0.99 to 1.01 in some order, whose median is 1."""
    factors = [0.99 + 0.02 * n / max(1, rounds - 1) for n in range(rounds)]
    moved.shuffle(factors)
    return [factor / statistics.median(factors) for factor in factors]


def with_rows(evidence: Evidence, *rows: LatencyRow) -> Evidence:
    """`evidence` with another latency table."""
    latency = replace(evidence.latency, rows=rows)
    floats = tuple(name for name in evidence.floats if name in rows[0].stats)
    return replace(evidence, measured=replace(evidence.measured, latency=latency), floats=floats)


def with_speedups(
    evidence: Evidence, speedups: dict[int, float], noise_percent: float = 1.0, rounds: int = 20, p90: float = 1.1
) -> Evidence:
    """fp32 takes 4 ms for each image, int8 so many times less; each round adds 1 % to both or takes it off both."""
    rows = []
    for batch, speedup in speedups.items():
        times = {"fp32": 4.0 * batch, "int8_fx": 4.0 * batch / speedup}
        row = latency_row(batch, times, rounds, noise_percent, p90)
        together = row.round_ms | {"int8_fx": tuple(ms / speedup for ms in row.round_ms["fp32"])}
        rows.append(with_speedups_of_rounds(replace(row, round_ms=together), "fp32"))
    return with_rows(evidence, *rows)


def with_int8(evidence: Evidence, **changed: Any) -> Evidence:
    """`evidence` with another chosen int8 version."""
    first, *others = evidence.versions
    return replace(evidence, versions=(replace(first, int8=replace(first.int8, **changed)), *others))


def with_gate(evidence: Evidence, gate: GateResult, champion: bool = False) -> Evidence:
    """`evidence` with another decision on the chosen version."""
    first, *others = evidence.versions
    return replace(evidence, versions=(replace(first, gate=gate), *others), champion=champion)


TIMES_MS = {  # by batch size
    1: {"fp32": 1.0, "fp32_traced": 0.8, "bf16": 0.7, "fp32_onnx": 0.5, "int8_fx": 0.25},
    8: {"fp32": 4.0, "fp32_traced": 3.2, "bf16": 1.6, "fp32_onnx": 2.4, "int8_fx": 0.8},
    128: {"fp32": 100.0, "fp32_traced": 90.0, "bf16": 30.0, "fp32_onnx": 60.0, "int8_fx": 10.0},
}


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    """Everything about an imagined SmallNet, in round numbers."""
    epochs = tuple(
        EpochResult(
            n, 3.0 - 0.5 * n, 40.0 + 10 * n, 70.0 + 5 * n, 3.2 - 0.5 * n, 35.0 + 10 * n, 65.0 + 5 * n, 0.1, 900.0
        )
        for n in (1, 2, 3)
    )
    train = TrainResult(epochs, best_epoch=3, stopped_early=False, bf16=True, peak_learning_rate=0.2, duration_s=12.0)
    data = DataFacts(
        "digits", "sklearn.datasets.load_digits", "0123456789abcdef", tuple("0123456789"), 32, 1294, 144, 359
    )
    fp32_accuracy = {
        "train": Accuracy(97.0, 99.5, 1294),
        "validation": Accuracy(95.0, 99.0, 144),
        "test": Accuracy(94.0, 98.5, 359),
    }
    int8_accuracy = {
        "train": Accuracy(96.5, 99.4, 1294),
        "validation": Accuracy(94.5, 98.9, 144),
        "test": Accuracy(93.5, 98.25, 359),
    }
    comparison = Comparison(0.5, -0.3, 1.3, 0.25, 99.0, 5, 3, 359)
    macs = {1: 1000, 8: 8000, 128: 128_000}
    int8_macs = {batch: 9 * count // 10 for batch, count in macs.items()}
    layers = ("network.0", "network.3")
    quantize = QuantizeResult("fx", "x86", "histogram", True, False, 64, layers, (), 0.5, "x86")
    cost = Cost(427_178, macs, macs, int8_macs, FLOP_COUNTER)
    fp32 = Fp32Evidence("smallnet", 0, "models:/smallnet-digits-fp32/1", 1_800_000, data, train, fp32_accuracy)
    comparisons = {split: comparison for split in ("train", "validation", "test")}
    sensitivity = SensitivityResult(
        (
            LayerSensitivity("network.0", 31.5, 93.75, 94.0, 0.025, 0.0078, only_int8_lost_images=1, weight_bits=7),
            LayerSensitivity("network.3", None, 95.0, 93.25, 0.0078, 0.025, only_fp32_gained_images=1),
        ),
        fp32_top1_percent=95.0, int8_top1_percent=93.0, images=64, observer="histogram", per_channel=True,
        int8_kl_nats=0.03125, engines=("fx",),
    )  # fmt: skip
    uri = "models:/smallnet-digits-int8/1"
    int8 = Int8Evidence(uri, 450_000, quantize, "fedcba9876543210", cost, cost, int8_accuracy, comparisons, sensitivity)
    gate = GateResult("passed", ("top-1 drop 0.50 points (at most 1)",))
    floats = ("fp32", "fp32_traced", "fp32_onnx")  # the accuracy of bf16 is not known
    return Evidence(fp32, (Judged(int8, "int8_fx", gate),), _measured(fp32.version_uri, uri), True, floats)


def _measured(fp32_uri: str, int8_uri: str) -> LatencyEvidence:
    rows = tuple(latency_row(batch, times) for batch, times in TIMES_MS.items())
    startups = tuple(StartUp(name, 0.1 * n, 10.0 * n, 300.0 + n) for n, name in enumerate(TIMES_MS[1], 1))
    latency = LatencyResult("fp32", rows, startups, threads=2)
    host = Host("Imagined CPU", 2, 2, 16.0, ("AVX512-VNNI",), "Linux 6 x86_64", "3.11.7", {"torch": "2.13.0"})
    return LatencyEvidence(fp32_uri, {int8_uri: ("int8_fx",)}, latency, host, run_id="0" * 32)
