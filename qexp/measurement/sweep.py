"""The latency sweep in a process of its own: `python -m qexp.measurement.sweep REQUEST.json RESULT.json`.

It fixes the thread count, loads copies of all models as a user does, and does nothing else while it times them, but
watch what else the machine does. Start-up and memory are measured first, in one more process per model. The models are
loaded anew several times for every batch size: where their memory lies makes a percent, and torch's int8 convolutions
keep one kernel, for the first shape that they see, as a service with that batch size would have it.
"""

import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qexp.config import LatencyConfig
from qexp.errors import StageError, first_line
from qexp.files import from_json, to_json
from qexp.measurement.activity import watch_machine
from qexp.measurement.host import reuse_freed_memory
from qexp.measurement.latency import AGAIN, LatencyResult, LatencyRow, Run, StartUp, measure_latency
from qexp.measurement.sweep_models import BASELINE, SweepModel, load, prepare_baseline
from qexp.progress import say


@dataclass(frozen=True)
class SweepRequest:
    """What the child process is asked: which models, one of them (`repeated`) twice, on so many threads.

    `weights` is the file of the fp32 weights, from which the baselines are made.
    """

    models: tuple[SweepModel, ...]
    repeated: str
    weights: str
    image_size: int
    threads: int
    options: LatencyConfig


def run_sweep(request: SweepRequest, environment: dict[str, str]) -> LatencyResult:
    """Start the child process with `environment`, wait for it, and return what it measured.

    Raises:
        StageError: the child failed; its own message is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(to_json(request))
        command = [sys.executable, "-W", "ignore", "-m", "qexp.measurement.sweep", str(question), str(answer)]
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if status != 0:
            names = ", ".join(model.name for model in request.models)
            raise StageError(f"the latency sweep of {names} failed with exit code {status}; see the lines above")
        return from_json(LatencyResult, answer.read_text())


def _main(question: Path, answer: Path) -> None:
    request = from_json(SweepRequest, question.read_text())
    torch.set_num_threads(request.threads)
    torch.set_num_interop_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        # In forks, before this process computes anything itself: OpenMP's threads do not survive one.
        startups = _start_all(request, Path(name))
        reuse_freed_memory()  # as in training: without it, fp32 pays for page faults at large batch sizes
        prepare, options = _preparer(list(startups), request, Path(name)), request.options
        watch = partial(watch_machine, request.threads)
        rows = measure_latency(prepare, BASELINE, request.repeated, options, on_row=_say_row, watch=watch)
    weights, busy = options.profile or {}, options.max_busy_percent
    result = LatencyResult(BASELINE, rows, tuple(startups.values()), request.threads, weights, busy)
    answer.write_text(to_json(result))


def _start_all(request: SweepRequest, folder: Path) -> dict[SweepModel, StartUp]:
    """How each model starts up, without baselines that cannot be made of this one or do not run; files in `folder`."""
    weights, able = Path(request.weights), dict[SweepModel, StartUp]()
    for model in request.models:
        name, is_baseline = model.name, model.name in request.options.baselines
        try:
            if is_baseline:
                _in_fork(lambda name=name: prepare_baseline(weights, name, request.image_size, folder))
            able[model] = _in_fork(lambda one=model: _start_up(one, request, folder))
        except StageError as error:
            if not is_baseline:
                raise StageError(f"{name}: {error}") from None
            say(f"baseline {name} is left out: {error}")
    return able


def _preparer(
    sweep_models: Sequence[SweepModel], request: SweepRequest, folder: Path
) -> Callable[[int], dict[str, Run]]:
    """What loads all models for a batch size, in a new random order, so that they lie elsewhere in memory; the repeated
    one twice."""
    generator, shuffled = torch.Generator().manual_seed(0), random.Random(0)
    again = [replace(found, name=AGAIN) for found in sweep_models if found.name == request.repeated]

    def prepare(batch_size: int) -> dict[str, Run]:
        images = torch.rand((batch_size, 3, request.image_size, request.image_size), generator=generator)
        everyone = [*sweep_models, *again]
        order = shuffled.sample(everyone, len(everyone))
        models = {one.name: load(one, folder) for one in order}
        return {one.name: lambda model=models[one.name]: model(images) for one in everyone}  # type: ignore[misc]

    return prepare


def _start_up(sweep_model: SweepModel, request: SweepRequest, folder: Path) -> StartUp:
    sizes = request.options.batch_sizes
    small, large = (torch.rand(batch, 3, request.image_size, request.image_size) for batch in (sizes[0], sizes[-1]))
    load(sweep_model, folder)  # imports what it needs: loading is timed without that, from files that were just read
    times = [time.perf_counter()]
    model = load(sweep_model, folder)
    times.append(time.perf_counter())
    model(small)
    times.append(time.perf_counter())
    model(large)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return StartUp(sweep_model.name, times[1] - times[0], 1000 * (times[2] - times[1]), peak / 1e6)


def _in_fork(work: Callable[..., Any]) -> Any:
    """What `work` returns in a copy of this process.

    Raises:
        StageError: it raised, or the copy was killed, for instance for its memory.
    """

    def send(end: Connection) -> None:
        try:
            with torch.no_grad():
                end.send((work(), ""))
        except Exception as error:  # of an exporter, of the store, of a model's file: any library's
            end.send((None, first_line(error)))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=send, args=(theirs,))
    child.start()
    theirs.close()
    try:
        result, problem = ours.recv()
    except EOFError:
        child.join()
        raise StageError(f"the process that loads it ended with exit code {child.exitcode}") from None
    child.join()
    if problem:
        raise StageError(problem)
    return result


def _say_row(row: LatencyRow) -> None:
    times = ", ".join(f"{name} {stats.p50_ms:.2f}" for name, stats in row.stats.items())
    say(
        f"latency at batch size {row.batch_size}, p50 in ms of {len(next(iter(row.round_ms.values())))} rounds: {times}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a word; its parent has the last one
    try:
        _main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # the store, a model's file, memory: any library's
        say(first_line(error))
        sys.exit(1)
