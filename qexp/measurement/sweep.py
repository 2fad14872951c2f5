"""The latency sweep in a process of its own: the module qexp.measurement.sweep with REQUEST.json and RESULT.json.

It fixes the thread count, loads copies of all models as a user does, and does nothing else while it times them, but
watch what else the machine does. Start-up and memory are measured first, in one more process per model; from the passes
made there it is known which batch sizes take too long, and how long the sweep will take. The models are
loaded anew several times for every batch size: where their memory lies makes a percent, and torch's int8 convolutions
keep one kernel, for the first shape that they see, as a service with that batch size would have it.
"""

import math
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.config import LatencyConfig
from qexp.errors import StageError
from qexp.measurement.activity import watch_machine
from qexp.measurement.child import answer, ask, begin_in_fork, in_fork
from qexp.measurement.host import reuse_freed_memory
from qexp.measurement.latency import (
    AGAIN,
    BLOCK_S,
    LONG_S,
    SETTLE_S,
    LatencyResult,
    LatencyRow,
    Run,
    StartUp,
    measure_latency,
    time_rounds,
    wait_until_idle,
)
from qexp.measurement.sweep_models import BASELINE, Predict, SweepModel, load, prepare_baseline, rounds, unfolded
from qexp.models.preprocessing import Shape
from qexp.progress import Progress, in_words, say

LONGEST_PASS_S = 1.0  # of the slowest model; batch sizes that take longer are left out unless they were chosen
TRIAL_ROUNDS = 6  # of a model compiled for one batch size against other floats, before it is compiled for all
CLEARLY_SLOWER = 1.05  # times as long as the fastest of them
REST_S = 0.02  # between two models, about: until no thread computes any more


@dataclass(frozen=True)
class SweepRequest:
    """What the child process is asked: which models, one of them (`repeated`) twice, on so many threads.

    `weights` is the file of the fp32 weights, from which the baselines are made; `shape` that of an image.
    """

    models: tuple[SweepModel, ...]
    repeated: str
    weights: str
    shape: Shape
    threads: int
    options: LatencyConfig


def run_sweep(request: SweepRequest, environment: dict[str, str]) -> LatencyResult:
    """Start the child process with `environment`, wait for it, and return what it measured.

    Raises:
        StageError: the child failed; its own message is on standard error.
    """
    say(f"timing {', '.join(model.name for model in request.models)} in a process of its own")
    names = ", ".join(model.name for model in request.models)
    return ask("qexp.measurement.sweep", request, LatencyResult, environment, f"the latency sweep of {names}")


@dataclass(frozen=True)
class Started:
    """How a model starts up, and the seconds of one pass at each batch size that was tried, in ascending order."""

    startup: StartUp
    pass_s: dict[int, float]


def _sweep(request: SweepRequest) -> LatencyResult:
    torch.set_num_threads(request.threads)
    torch.set_num_interop_threads(1)
    tqdm.monitor_interval = 0  # its thread would wake up while others are timed
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        # In forks, before this process computes anything itself: OpenMP's threads do not survive one.
        started, options, because, gone = _start_all(request, Path(name))
        reuse_freed_memory()  # as in training: without it, fp32 pays for page faults at large batch sizes
        prepare = _preparer(list(started), request, Path(name))
        progress = _announce(list(started.values()), options)
        rows = measure_latency(
            prepare, BASELINE, request.repeated, options, on_row=_say_row, on_round=progress.round_done,
            watch=partial(watch_machine, request.threads),
        )  # fmt: skip
        progress.close()
    startups = tuple(found.startup for found in started.values())
    left_out = tuple(size for size in request.options.batch_sizes if size not in options.batch_sizes)
    weights, busy = options.profile or {}, options.max_busy_percent
    return LatencyResult(BASELINE, rows, startups, request.threads, weights, busy, left_out, because, gone)


def _start_all(
    request: SweepRequest, folder: Path
) -> tuple[dict[SweepModel, Started], LatencyConfig, str, dict[str, str]]:
    """How each model starts up; the options with the batch sizes that are left, and why others are not; and models that
    can be missing and cannot be made or do not run, with the reasons. Files are in `folder`."""
    able, options, because, gone = dict[SweepModel, Started](), request.options, "", dict[str, str]()
    models = [model for model in request.models if not model.is_compiled]
    progress = Progress("starting each model", len(models))
    for model in models:  # which grows when they must be started again, with fewer batch sizes
        name, is_baseline = model.name, model.is_made
        try:
            if is_baseline and model not in able:
                places = Path(request.weights), Path(model.folder)
                in_fork(partial(prepare_baseline, *places, name, request.shape, folder, options.batch_sizes))
            able[model] = started = in_fork(partial(_start_up, model, request.shape, options, folder))
        except StageError as error:
            if model.needed and not is_baseline:
                raise StageError(f"{name}: {error}") from None
            able.pop(model, None)
            gone[name] = str(error)
            say(f"{'baseline ' if is_baseline else ''}{name} is left out: {error}")
        else:
            if options.fits_batch_sizes and len(sizes := fitting(started.pass_s)) < len(options.batch_sizes):
                too_long = options.batch_sizes[len(sizes)]
                because = f"one pass of {name} at batch size {too_long} takes {started.pass_s[too_long]:.1f} s"
                options = options.model_copy(update={"batch_sizes": sizes, "fit_batch_sizes": True})
                models += able  # their memory is that of the largest batch size that is left
        progress.advance()
    progress.close()
    if because:
        others = ", ".join(str(size) for size in request.options.batch_sizes if size not in options.batch_sizes)
        say(f"batch sizes left out: {others}: {because} (--no-fit-batch-sizes times them too)")
    for model, found in _start_compiled(able, request, options, folder).items():
        if isinstance(found, Started):
            able[model] = found
        else:
            gone[model.name] = found
            say(f"baseline {model.name} is left out: {found}")
    return {model: able[model] for model in request.models if model in able}, options, because, gone


def _start_compiled(
    able: dict[SweepModel, Started], request: SweepRequest, options: LatencyConfig, folder: Path
) -> dict[SweepModel, Started | str]:
    """How each float starts up that torch compiles for each batch size, or why it is left out: it cannot be made, or is
    clearly slower than another float that rounds no more.

    To compile takes 5 to 60 s, so this is found out at the largest batch size, where the time of a call counts least.
    """
    *others, largest = options.batch_sizes
    found: dict[SweepModel, Started | str] = {}
    models = [one for one in request.models if one.is_compiled]
    gone = _compile(models, request, [largest], folder)
    for model in (one for one in models if one not in gone):
        try:
            ratio, rival = in_fork(
                partial(_trial, model, _rivals(model, able, largest), largest, request.shape, folder)
            )
        except StageError as error:
            gone[model] = str(error)
        else:
            if ratio > CLEARLY_SLOWER:
                gone[model] = f"at batch size {largest} it takes {ratio:.2f} times as long as {rival}"
                shutil.rmtree(folder / model.name)
    gone |= _compile([one for one in models if one not in gone], request, others, folder)
    for model in models:
        try:
            found[model] = gone.get(model) or in_fork(partial(_start_up, model, request.shape, options, folder))
        except StageError as error:
            found[model] = str(error)
    return found


def _compile(
    models: Sequence[SweepModel], request: SweepRequest, sizes: Sequence[int], folder: Path
) -> dict[SweepModel, str]:
    """Have models compiled for these batch sizes, two at a time, as each takes one core; why some cannot be."""
    gone = {}
    for start in range(0, len(models) if sizes else 0, 2):
        pair = models[start : start + 2]
        say(f"compiling {' and '.join(model.name for model in pair)} for batch size {', '.join(map(str, sizes))}")
        make = partial(prepare_baseline, Path(request.weights), shape=request.shape, folder=folder, batch_sizes=sizes)
        waiting = {model: begin_in_fork(partial(make, Path(model.folder), model.name)) for model in pair}
        for model, wait in waiting.items():
            try:
                wait()
            except StageError as error:
                gone[model] = str(error)
    return gone


def _rivals(model: SweepModel, able: dict[SweepModel, Started], batch_size: int) -> list[SweepModel]:
    """The floats that are like the model, round no more, and may be the fastest at this batch size."""
    floats = [one for one in able if one.name == BASELINE or one.is_made]
    alike = [one for one in floats if (one.name == unfolded(one.name)) == (model.name == unfolded(model.name))]
    pass_s = {one: able[one].pass_s[batch_size] for one in alike if rounds(model.name) or not rounds(one.name)}
    return [one for one, seconds in pass_s.items() if seconds < 2 * min(pass_s.values())]


def _trial(
    model: SweepModel, rivals: Iterable[SweepModel], batch_size: int, shape: Shape, folder: Path
) -> tuple[float, str]:
    """The median ratio of the model's time to that of the fastest rival, and its name."""
    reuse_freed_memory()  # as in the sweep
    images = torch.rand(batch_size, *shape)
    loaded = {one.name: load(one, folder) for one in (model, *rivals)}
    runs: dict[str, Run] = {name: partial(run, images) for name, run in loaded.items()}
    options = LatencyConfig(warmup=2, min_repeats=TRIAL_ROUNDS, min_seconds=0.0)
    blocks = time_rounds(runs, options, time.perf_counter, wait_until_idle)
    times = {name: [statistics.median(block) for block in rounds_of] for name, rounds_of in blocks.items()}
    own = times.pop(model.name)
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    return statistics.median(mine / other for mine, other in zip(own, times[fastest], strict=True)), fastest


def fitting(pass_s: dict[int, float]) -> list[int]:
    """The batch sizes before the first one at which a pass takes longer than LONGEST_PASS_S; the smallest one always
    fits."""
    smallest, *others = sorted(pass_s)
    return [smallest, *takewhile(lambda size: pass_s[size] <= LONGEST_PASS_S, others)]


def expected_s(passes: Sequence[dict[int, float]], load_s: float, options: LatencyConfig) -> dict[int, float]:
    """How long the sweep takes at each batch size, about.

    Args:
        passes: of each model, the one that is timed twice included, the seconds of a pass by batch size; sizes between
            those are interpolated.
        load_s: of loading all models.
    """
    expected = {}
    for size in options.batch_sizes:
        times = [float(np.interp(size, list(pass_s), list(pass_s.values()))) for pass_s in passes]
        blocks = [seconds if seconds >= LONG_S else max(BLOCK_S, SETTLE_S + seconds) for seconds in times]
        one_round = sum(blocks) + REST_S * len(blocks)
        loads = min(options.loads, options.min_repeats)
        once = sum(times) * (options.warmup + loads - 1) + load_s * loads
        expected[size] = once + max(options.min_repeats * one_round, options.min_seconds)
    return expected


class _SweepProgress:
    """How far the sweep is, by the seconds that it was expected to take."""

    def __init__(self, expected: dict[int, float], rounds: int) -> None:
        self._left, self._rounds = dict(expected), rounds
        self._expected = expected
        self._shown = Progress("latency", sum(expected.values()), counted=False)

    def round_done(self, batch_size: int) -> None:
        """One round more; with the first of a batch size, those before it are done."""
        for size in [size for size in self._left if size < batch_size]:
            self._shown.advance(self._left.pop(size))
        part = min(self._left[batch_size], self._expected[batch_size] / self._rounds)
        self._left[batch_size] -= part
        self._shown.advance(part)

    def close(self) -> None:
        self._shown.close()


def _announce(started: Sequence[Started], options: LatencyConfig) -> _SweepProgress:
    passes = [found.pass_s for found in started]
    again = passes[-1]  # an int8 model
    expected = expected_s([*passes, again], sum(found.startup.load_s for found in started), options)
    sizes = ", ".join(map(str, options.batch_sizes))
    say(f"latency of {len(passes)} models at batch size {sizes}: about {in_words(sum(expected.values()))}")
    return _SweepProgress(expected, options.min_repeats)


def _preparer(
    sweep_models: Sequence[SweepModel], request: SweepRequest, folder: Path
) -> Callable[[int], dict[str, Run]]:
    """What loads all models for a batch size, in a new random order, so that they lie elsewhere in memory; the repeated
    one twice."""
    generator, shuffled = torch.Generator().manual_seed(0), random.Random(0)
    again = [replace(found, name=AGAIN) for found in sweep_models if found.name == request.repeated]

    def prepare(batch_size: int) -> dict[str, Run]:
        images = torch.rand((batch_size, *request.shape), generator=generator)
        everyone = [*sweep_models, *again]
        order = shuffled.sample(everyone, len(everyone))
        models = {one.name: load(one, folder) for one in order}
        return {one.name: lambda model=models[one.name]: model(images) for one in everyone}  # type: ignore[misc]

    return prepare


def _start_up(model: SweepModel, shape: Shape, options: LatencyConfig, folder: Path) -> Started:
    smallest, largest = options.batch_sizes[0], options.batch_sizes[-1]
    first = torch.rand(smallest, *shape)
    load(model, folder)  # imports what it needs: loading is timed without that, from files that were just read
    times = [time.perf_counter()]
    run = load(model, folder)
    times.append(time.perf_counter())
    run(first)
    times.append(time.perf_counter())
    pass_s: dict[int, float] = {}
    for batch in options.batch_sizes if options.fits_batch_sizes else dict.fromkeys((smallest, largest)):
        images = torch.rand(batch, *shape)
        if model.compiles_for_each_size:
            run(images)
        pass_s[batch] = _pass_s(run, images)
        if options.fits_batch_sizes and len(fitting(pass_s)) < len(pass_s):
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Started(StartUp(model.name, times[1] - times[0], 1000 * (times[2] - times[1]), peak / 1e6), pass_s)


def _pass_s(run: Predict, images: Tensor) -> float:
    """Seconds of one pass; of two, the shorter one, where the first takes too long: it may have been the warm-up.

    CPU time where it is less than wall time, so that a busy machine makes no network slow.
    """
    seconds = math.inf
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        run(images)
        seconds = min(seconds, time.perf_counter() - wall, time.process_time() - cpu)
        if seconds <= LONGEST_PASS_S:
            break
    return seconds


def _say_row(row: LatencyRow) -> None:
    times = ", ".join(f"{name} {stats.p50_ms:.2f}" for name, stats in row.stats.items())
    say(
        f"latency at batch size {row.batch_size}, p50 in ms of {len(next(iter(row.round_ms.values())))} rounds: {times}"
    )


if __name__ == "__main__":
    answer(SweepRequest, _sweep)
