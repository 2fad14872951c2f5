"""Latency: models timed in short rounds, in random order, and pure statistics over lists of seconds.

`measure_latency` runs in a process of its own (see sweep.py), with nothing else in it but the models.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt

from qexp.config import LatencyConfig

Run = Callable[[], object]
IDLE_S, IDLE_SHARE = 0.005, 0.1  # nothing computes any more: less than so much CPU time in so many seconds
MOST_WAITS = 100
SETTLE_S = 0.02  # of a block, in which threads wake up and weights come into the caches
LONG_S = 10 * SETTLE_S  # a call of which settling is a small part: the first one of a block counts already
BLOCK_S = 0.04  # of one model in one round, settling included; longer until one call has counted
FEWEST_PAIRS = 6  # with fewer, even all that was seen covers the median in less than 95 of 100 cases
AGAIN = "again"  # name of the second measurement of one of the models


@dataclass(frozen=True)
class LatencyStats:
    """Wall time of one forward pass of one batch. Images a second are those at the median; `repeats` counts passes."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    repeats: int


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios of two models' times, with the 95 % interval of that median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyRow:
    """All models at one batch size, by name.

    `round_ms` has each round's median; `speedups` compares with the baseline, round by round; `noise` is one model
    against itself.
    """

    batch_size: int
    stats: dict[str, LatencyStats]
    round_ms: dict[str, tuple[float, ...]]
    speedups: dict[str, Ratio]
    noise: Ratio

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times as long `slow` takes as `fast`."""
        return paired_ratio(self.round_ms[slow], self.round_ms[fast])

    def compared(self, slow: str, fast: str) -> int:
        """1 if `fast` is faster than `slow`, -1 if it is slower, 0 if the noise is too high to tell.

        The interval must lie beyond 1 and beyond what one model showed against itself, loaded a second time.
        """
        ratio, edge = self.ratio(slow, fast), self.noise_edge
        if len(self.round_ms[slow]) < FEWEST_PAIRS:
            return 0
        return int(ratio.low > edge) - int(ratio.high < 1 / edge)

    @property
    def noise_edge(self) -> float:
        """The largest ratio, at least 1, that one model may have shown against itself."""
        return max(self.noise.high, 1 / self.noise.low, 1.0)


@dataclass(frozen=True)
class StartUp:
    """One model in a process of its own: loading it, the first forward pass, and the process's peak memory."""

    model: str
    load_s: float
    first_call_ms: float
    peak_memory_mb: float


@dataclass(frozen=True)
class LatencyResult:
    """One row a batch size, at `threads` CPU threads; `baseline` is the model that speed-ups refer to."""

    baseline: str
    rows: tuple[LatencyRow, ...]
    startups: tuple[StartUp, ...]
    threads: int

    def winner(self, names: Sequence[str]) -> str:
        """The first of these models, unless one after it is faster beyond the noise at more batch sizes than slower."""
        best = names[0]
        for name in names[1:]:
            if sum(row.compared(best, name) for row in self.rows) > 0:
                best = name
        return best

    def smallest_speedup(self, name: str) -> float:
        """The speed-up of a model at the batch size where it is smallest."""
        return min(row.speedups[name].median for row in self.rows)

    def least_speedup(self, name: str) -> tuple[int, Ratio]:
        """The batch size at which the interval of a model's speed-up reaches lowest, and that speed-up."""
        row = min(self.rows, key=lambda row: row.speedups[name].low)
        return row.batch_size, row.speedups[name]

    def mean_speedup(self, name: str) -> float:
        """The geometric mean of a model's speed-ups over all batch sizes."""
        return statistics.geometric_mean(row.speedups[name].median for row in self.rows)


def wait_until_idle(
    cpu_s: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return when no thread of this process computes, or after half a second.

    Those of ONNX Runtime spin for 40 ms after a pass, OpenMP's for 10 ms: on a core that the next model needs, which
    then took twice as long.
    """
    for _ in range(MOST_WAITS):
        before = cpu_s()
        sleep(IDLE_S)
        if cpu_s() - before < IDLE_SHARE * IDLE_S:
            return


def measure_latency(
    prepare: Callable[[int], dict[str, Run]],
    baseline: str,
    repeated: str,
    options: LatencyConfig,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[], None] = wait_until_idle,
    on_row: Callable[[LatencyRow], None] = lambda row: None,
) -> tuple[LatencyRow, ...]:
    """Time models at every batch size.

    Args:
        prepare: from a batch size, the calls to time by name; AGAIN is another copy of `repeated`, if there is one.
        baseline: what speed-ups refer to.
        repeated: the model that is measured twice in each round, for the noise.
        clock: seconds.
        rest: called between two models.
        on_row: told of each batch size as it is done.
    """
    rows = []
    for batch_size in options.batch_sizes:
        blocks = _time_batch_size(prepare(batch_size), repeated, options, clock, rest)
        rows.append(_row(batch_size, blocks, baseline, repeated))
        on_row(rows[-1])
    return tuple(rows)


def _time_batch_size(
    runs: dict[str, Run],
    repeated: str,
    options: LatencyConfig,
    clock: Callable[[], float],
    rest: Callable[[], None],
) -> dict[str, list[list[float]]]:
    """As `time_rounds`; nothing holds the models afterwards, when those for the next batch size are loaded."""
    return time_rounds({AGAIN: runs[repeated]} | runs, options, clock, rest)


def _row(batch_size: int, blocks: dict[str, list[list[float]]], baseline: str, repeated: str) -> LatencyRow:
    round_ms = {name: tuple(1000 * statistics.median(block) for block in found) for name, found in blocks.items()}
    again = round_ms.pop(AGAIN)
    seconds = {name: [value for block in blocks[name] for value in block] for name in round_ms}
    stats = {name: summarize(values, batch_size) for name, values in seconds.items()}
    speedups = {name: paired_ratio(round_ms[baseline], found) for name, found in round_ms.items()}
    return LatencyRow(batch_size, stats, round_ms, speedups, paired_ratio(round_ms[repeated], again))


def time_rounds(
    runs: dict[str, Run], options: LatencyConfig, clock: Callable[[], float], rest: Callable[[], None]
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by model and round; each round has a block of every model, in a new random order.

    A slow moment of the machine hits all models of a round. After `warmup` untimed passes of each model: at least
    `min_repeats` rounds and `min_seconds` of timing.
    """
    for run in runs.values():
        for _ in range(options.warmup):
            run()
    order, shuffled = list(runs), random.Random(0)
    blocks: dict[str, list[list[float]]] = {name: [] for name in runs}
    started = clock()
    while len(blocks[order[0]]) < options.min_repeats or clock() - started < options.min_seconds:
        shuffled.shuffle(order)
        for name in order:
            rest()
            blocks[name].append(_time_block(runs[name], clock))
    return blocks


def _time_block(run: Run, clock: Callable[[], float]) -> list[float]:
    """Seconds of the calls of one model in one round, without those in which it settles."""
    started = clock()
    settled: list[float] = []
    while True:
        before = clock()
        run()
        after = clock()
        if before - started >= SETTLE_S or after - before >= LONG_S:
            settled.append(after - before)
        if settled and after - started >= BLOCK_S:
            return settled


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


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Median of the pairs' ratios, with its 95 % interval from order statistics: no assumption on their distribution.

    The interval reaches from the k-th smallest to the k-th largest ratio, k from the binomial distribution (Conover,
    Practical Nonparametric Statistics, 3.2). With fewer than six pairs it is all that was seen.
    """
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    cut = _outside_interval(len(ratios))
    return Ratio(statistics.median(ratios), ratios[cut], ratios[-1 - cut])


def _outside_interval(count: int) -> int:
    """How many values may be left out at each end so that the median is inside with 95 % confidence."""
    if count > 200:  # the normal approximation is exact enough, and the binomial's numbers outgrow a float
        return int(count / 2 - 0.98 * sqrt(count)) - 1
    left_out, tail = 0, 2.0**-count
    while tail + comb(count, left_out + 1) * 2.0**-count <= 0.025:
        left_out += 1
        tail += comb(count, left_out) * 2.0**-count
    return left_out


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, interpolated linearly between two of them."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
