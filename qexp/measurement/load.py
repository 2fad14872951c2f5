"""Workers under load, as a process of its own: the module qexp.measurement.load with REQUEST.json and RESULT.json.

It starts the workers as copies of itself, before it computes anything: each is pinned to cores of its own, loads both
models as a user does, and computes one request after the other when it is told to. So a request never waits for others,
and its time is that of a batch beside busy neighbours: with what they take of memory, caches and clock. In each round
the workers are started anew, and float and int8 take turns at each batch size in a random order.
"""

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qexp.config import ThroughputConfig
from qexp.errors import StageError, first_line
from qexp.foundation.processes import end_with
from qexp.measurement.activity import Activity, watch_machine
from qexp.measurement.child import answer, ask, in_fork
from qexp.measurement.host import physical_cores, reuse_freed_memory
from qexp.measurement.latency import wait_until_idle
from qexp.measurement.sweep_models import BASELINE, SweepModel, load, prepare_baseline
from qexp.measurement.throughput import Round, Setting, ThroughputResult, ThroughputRow, by_processes, round_of, served
from qexp.models.preprocessing import Shape
from qexp.progress import Progress, in_words, say

FEWEST_REQUESTS = 2  # of each worker in a round: however long they take, the workers overlap
START_S = 2.0  # that starting workers and loading models takes, about


@dataclass(frozen=True)
class LoadRequest:
    """What the child process is asked: which settings to try, with the int8 model, and at each the float model of the
    name in `floats`, in the order of `settings`.

    `weights` is the file of the fp32 weights, from which float models are made; `shape` that of an image.
    """

    int8: SweepModel
    models: tuple[SweepModel, ...]
    settings: tuple[Setting, ...]
    floats: tuple[str, ...]
    weights: str
    shape: Shape
    cores: int
    max_busy_percent: float
    options: ThroughputConfig


def run_load(request: LoadRequest, environment: dict[str, str]) -> ThroughputResult:
    """Start the child process with `environment`, wait for it, and return what it measured.

    Raises:
        StageError: the child failed; its own message is on standard error.
    """
    return ask("qexp.measurement.load", request, ThroughputResult, environment, "the workers")


def _load(request: LoadRequest) -> ThroughputResult:
    torch.set_num_interop_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in request.models:  # in forks: OpenMP's threads do not survive one
            if model.name != BASELINE:
                make = prepare_baseline
                in_fork(partial(make, Path(request.weights), Path(model.folder), model.name, request.shape, folder))
        return _measure(request, folder)


def _measure(request: LoadRequest, folder: Path) -> ThroughputResult:
    """All rounds; in each, groups of settings that share processes come in a random order."""
    options, shuffled = request.options, random.Random(0)
    groups = list(by_processes(request.settings).items())
    floats = dict(zip(request.settings, request.floats, strict=True))
    rounds: dict[tuple[Setting, str], list[Round]] = {}
    activities = list[Activity]()
    parts = 2 * len(request.settings) * options.load_rounds
    expected_s = parts * options.load_seconds + len(groups) * options.load_rounds * START_S
    say(f"{len(request.settings)} settings of up to {request.cores} cores: about {in_words(expected_s)}")
    progress = Progress("throughput", parts)
    for _ in range(options.load_rounds):
        shuffled.shuffle(groups)
        for (workers, threads), settings in groups:
            names = {request.int8.name, *(floats[setting] for setting in settings)}
            models = [model for model in (request.int8, *request.models) if model.name in names]
            ended = watch_machine(workers * threads, own_cpu_s=_cpu_s_of_family)
            with _started(workers, threads, models, request.shape, folder) as team:
                for setting in shuffled.sample(settings, len(settings)):
                    for name in shuffled.sample((request.int8.name, floats[setting]), 2):
                        clocks = team.serve(name, setting.batch_size, options.load_seconds)
                        rounds.setdefault((setting, name), []).append(round_of(clocks, setting.batch_size))
                        progress.advance()
            if activity := ended():
                activities.append(activity)
    progress.close()
    rows = []
    for setting in request.settings:
        both = (served(name, rounds[setting, name]) for name in (floats[setting], request.int8.name))
        rows.append(ThroughputRow(setting, *both))
    pinned = hasattr(os, "sched_setaffinity")
    return ThroughputResult(tuple(rows), request.cores, pinned, request.max_busy_percent, tuple(activities))


def _cpu_s_of_family() -> float:
    """CPU time of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@dataclass(frozen=True)
class Team:
    """Workers that have loaded their models and wait to be told what to do."""

    ends: Sequence[Connection]

    def serve(self, name: str, batch_size: int, seconds: float) -> list[list[float]]:
        """The clock readings of each worker that computes with one model for so long, all at the same time.

        Raises:
            StageError: a worker failed, or was killed, for instance for its memory.
        """
        for end in self.ends:
            end.send((name, batch_size, seconds))
        self.answers()  # they have warmed up
        for end in self.ends:
            end.send(None)
        return self.answers()

    def answers(self) -> list[Any]:
        """What each worker has to say next; StageError as above."""
        found = []
        for end in self.ends:
            try:
                result, problem = end.recv()
            except EOFError:
                raise StageError(
                    "a worker was killed, perhaps for its memory; try fewer (--workers) or smaller batches"
                ) from None
            if problem:
                raise StageError(f"a worker failed: {problem}")
            found.append(result)
        return found


@contextmanager
def _started(workers: int, threads: int, models: Sequence[SweepModel], shape: Shape, folder: Path) -> Iterator[Team]:
    """Workers that are copies of this process, each on cores of its own; they end with the block."""
    context, cores = multiprocessing.get_context("fork"), [cpus[0] for cpus in physical_cores()]
    processes, ends = [], []
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            own = set(cores[number * threads : (number + 1) * threads])
            task = partial(_work, theirs, os.getpid(), own, threads, models, shape, folder)
            process = context.Process(target=task)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        team = Team(ends)
        team.answers()  # the models are loaded
        yield team
        for end in ends:
            end.send(None)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()


def _work(
    end: Connection,
    parent: int,
    cores: set[int],
    threads: int,
    models: Sequence[SweepModel],
    shape: Shape,
    folder: Path,
) -> None:
    """A worker: loads, and serves until it is told that there is nothing more to do."""
    end_with(parent)
    try:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        reuse_freed_memory()  # as in the latency sweep
        with torch.no_grad():
            loaded = {model.name: load(model, folder) for model in models}
            end.send((None, ""))
            while (task := end.recv()) is not None:
                name, batch_size, seconds = task
                run = partial(loaded[name], torch.rand(batch_size, *shape))
                wait_until_idle()
                run()
                end.send((None, ""))
                end.recv()
                end.send((clock_requests(run, seconds), ""))
    except Exception as error:  # of a library, of memory
        end.send((None, first_line(error)))


def clock_requests(
    run: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The clock at the start, and at the end of each request, one after the other for so many seconds at least."""
    readings = [clock()]
    while readings[-1] < readings[0] + seconds or len(readings) <= FEWEST_REQUESTS:
        run()
        readings.append(clock())
    return readings


if __name__ == "__main__":
    answer(LoadRequest, _load)
