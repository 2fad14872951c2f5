"""Latency: models timed in turn, round by round, and pure statistics over lists of seconds.

`measure_latency` runs in a process of its own (see sweep.py), with nothing else in it but the models.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qexp.config import LatencyConfig

Run = Callable[[], object]


@dataclass(frozen=True)
class LatencyStats:
    """Wall time of one forward pass of one batch. Images a second are those at the median."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    repeats: int


@dataclass(frozen=True)
class LatencyRow:
    """Both models at one batch size; `speedup` is fp32 p50 over int8 p50."""

    batch_size: int
    fp32: LatencyStats
    int8: LatencyStats
    speedup: float


@dataclass(frozen=True)
class LatencyResult:
    """One row a batch size, at `threads` CPU threads."""

    rows: tuple[LatencyRow, ...]
    threads: int

    @property
    def smallest_speedup(self) -> float:
        """The speed-up at the batch size where it is smallest."""
        return min(row.speedup for row in self.rows)


def measure_latency(
    prepare: Callable[[int], tuple[Run, Run]],
    options: LatencyConfig,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
    on_row: Callable[[LatencyRow], None] = lambda row: None,
) -> LatencyResult:
    """Time two models at every batch size.

    Args:
        prepare: from a batch size, the two calls to time: fp32, int8.
        threads: what the process runs with; recorded, not set here.
        clock: seconds.
        on_row: told of each batch size as it is done.
    """
    rows = []
    for batch_size in options.batch_sizes:
        runs = prepare(batch_size)
        fp32, int8 = (summarize(seconds, batch_size) for seconds in time_interleaved(runs, options, clock))
        rows.append(LatencyRow(batch_size, fp32, int8, fp32.p50_ms / int8.p50_ms))
        on_row(rows[-1])
    return LatencyResult(tuple(rows), threads)


def time_interleaved(runs: Sequence[Run], options: LatencyConfig, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each call, in rounds of one call of each, so that a slow moment of the machine hits all of them.

    After `warmup` untimed rounds: at least `min_repeats` rounds and `min_seconds` of timing.
    """
    for _ in range(options.warmup):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    started = clock()
    while len(seconds[0]) < options.min_repeats or clock() - started < options.min_seconds:
        for run, samples in zip(runs, seconds, strict=True):
            before = clock()
            run()
            samples.append(clock() - before)
    return seconds


def summarize(seconds: Sequence[float], batch_size: int) -> LatencyStats:
    """Percentiles in ms (linear between samples) and throughput."""
    p50 = statistics.median(seconds)
    return LatencyStats(
        p50_ms=1000 * p50,
        p90_ms=1000 * percentile(seconds, 90),
        p99_ms=1000 * percentile(seconds, 99),
        images_per_second=batch_size / p50,
        repeats=len(seconds),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, interpolated linearly between two of them."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
