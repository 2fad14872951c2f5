"""Latency: models timed in short rounds, in random order, each loaded several times; and the statistics of the times.

`measure_latency` runs in a process of its own (see sweep.py), which does nothing else.

Loading a model again changes its time by about a percent, because its memory lies elsewhere. So the loads, not the
rounds, are the independent samples of a comparison: each load gives the median of its rounds' ratios of two models; the
result is the mean of the logarithms over the loads, with the interval of Student's t. Ratios of several batch sizes are
combined by their weights, with the degrees of freedom of Welch and Satterthwaite (Biometrics Bulletin 2, 1946).
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np
from scipy.special import stdtrit

from qexp.config import LatencyConfig
from qexp.foundation.quantities import Factor, NotNegative, Percent, Some, Timed
from qexp.foundation.tables import Shown, Table
from qexp.foundation.waiting import DEFAULT, waiting_as
from qexp.measurement.activity import Activity, too_busy

Run = Callable[[], object]
Watch = Callable[[], Callable[[], Activity | None]]  # starts to watch the machine; what it returns ends that
IDLE_S, IDLE_SHARE = 0.005, 0.1  # nothing computes any more: less than so much CPU time in so many seconds
MOST_WAITS = 100
SETTLE_S = 0.02  # of a block, in which threads wake up and weights come into the caches
LONG_S = 10 * SETTLE_S  # a call of which settling is a small part: the first one of a block counts already
BLOCK_S = 0.04  # of one model in one round, settling included; longer until one call has counted
FEWEST_LOADS, FEWEST_ROUNDS = 3, 6  # with fewer, no verdict rests on the times
CONFIDENCE = 0.95
AGAIN = "again"  # name of the second copy of one of the models


@dataclass(frozen=True)
class LatencyStats:
    """Wall time of one forward pass of one batch, over all passes of all rounds, of which there are `repeats`.

    Images a second are those at the median. A percentile is None where too few passes lie beyond it to know it.
    """

    p50_ms: Timed
    p90_ms: Timed | None
    p99_ms: Timed | None
    images_per_second: Timed
    repeats: Some


@dataclass(frozen=True)
class Ratio:
    """How many times as long one model takes as another: the centre and the ends of its 95 % interval.

    The centre is the geometric mean over the loads, of each the median of its rounds' ratios.
    """

    median: Factor
    low: Factor
    high: Factor


@dataclass(frozen=True)
class Speedup:
    """A model over the fastest of some others, `over`, at one batch size."""

    batch_size: int
    over: str
    ratio: Ratio


@dataclass(frozen=True)
class Mean:
    """The mean of logarithms of ratios, the variance of that mean, and its degrees of freedom."""

    value: float
    variance: float
    freedom: float

    def ratio(self, confidence: float = CONFIDENCE) -> Ratio:
        """As a ratio with the interval of Student's t."""
        if self.variance == 0 or self.freedom <= 0:
            half = 0.0
        else:
            half = float(stdtrit(self.freedom, 0.5 + confidence / 2)) * math.sqrt(self.variance)
        return Ratio(*(_exp(end) for end in (self.value, self.value - half, self.value + half)))


def _exp(value: float) -> float:
    """Limited to what JSON holds: two loads alone may have an interval without a sensible end."""
    return math.exp(max(-300.0, min(300.0, value)))


def mean_of(effects: Sequence[float]) -> Mean:
    """Of independent values of equal weight."""
    count = len(effects)
    variance = statistics.variance(effects) / count if count > 1 else 0.0
    return Mean(statistics.fmean(effects), variance, count - 1)


def weighted_mean(means: Sequence[Mean], weights: Sequence[float]) -> Mean:
    """Of independent means."""
    shares = [weight / sum(weights) for weight in weights]
    parts = [share**2 * mean.variance for share, mean in zip(shares, means, strict=True)]
    variance = sum(parts)
    squares = sum(part**2 / mean.freedom for part, mean in zip(parts, means, strict=True) if part)
    value = sum(share * mean.value for share, mean in zip(shares, means, strict=True))
    return Mean(value, variance, variance**2 / squares if squares else 0.0)


def difference(one: Mean, other: Mean) -> Mean:
    """Of two independent means (Welch, Biometrika 34, 1947)."""
    variance = one.variance + other.variance
    parts = sum(mean.variance**2 / mean.freedom for mean in (one, other) if mean.variance)
    return Mean(one.value - other.value, variance, variance**2 / parts if parts else 0.0)


@dataclass(frozen=True)
class LatencyRow:
    """All models at one batch size, by name.

    `round_ms` has each round's median, `loads` the number of rounds of each load, one after the other. `speedups`
    compares with the baseline; `noise` is the control: one model against a second copy of it, in each load. Of
    `comparisons` in the whole sweep, all together show a false difference in at most 5 of 100 sweeps. `activity` says
    what else the machine did.
    """

    batch_size: Some
    stats: dict[str, LatencyStats]
    round_ms: dict[str, tuple[Timed, ...]]
    speedups: dict[str, Ratio]
    noise: Ratio
    loads: tuple[Some, ...] = ()
    comparisons: Some = 1
    activity: Activity | None = None

    def check(self) -> None:
        """Raise ValueError where times are missing or contradict each other: they were changed."""
        models, rounds = self.stats.keys(), {len(found) for found in self.round_ms.values()}
        if not models == self.round_ms.keys() == self.speedups.keys():
            raise ValueError(f"the times of a model at batch size {self.batch_size} are missing")
        if len(rounds) != 1 or 0 in rounds or (self.loads and {sum(self.loads)} != rounds):
            raise ValueError(f"the times of a round at batch size {self.batch_size} are missing")
        for found in self.stats.values():
            known = [ms for ms in (found.p50_ms, found.p90_ms, found.p99_ms) if ms is not None]
            if known != sorted(known):
                raise ValueError(f"the percentiles at batch size {self.batch_size} fall")

    @property
    def enough(self) -> bool:
        """Whether there are as many loads and rounds as an interval needs."""
        return len(self.loads) >= FEWEST_LOADS and sum(self.loads) >= FEWEST_ROUNDS

    def mean(self, slow: str, fast: str) -> Mean:
        """Of the logarithm of how many times as long `slow` takes as `fast`."""
        return _mean_of_rounds(self.round_ms[slow], self.round_ms[fast], self.loads)

    def mean_over_fastest(self, slow: Sequence[str], fast: str) -> Mean:
        """As `mean`, of the fastest of `slow`. For each load the other loads choose it: chosen by the times that it is
        judged by, the fastest of equal ones looks faster than it is."""
        if len(self.loads) < 2:
            return self.mean(self.fastest(slow), fast)
        effects = {name: self._log_of_loads(name, fast) for name in slow}
        totals = {name: sum(values) for name, values in effects.items()}
        chosen = [
            min((totals[name] - effects[name][place], name) for name in slow)[1] for place in range(len(self.loads))
        ]
        value = statistics.fmean(effects[name][place] for place, name in enumerate(chosen))
        # Loads that choose from the same times depend on each other: their own spread would be too small.
        variance = max(mean_of(effects[name]).variance for name in set(chosen))
        return Mean(value, variance, len(self.loads) - 1)

    def _log_of_loads(self, slow: str, fast: str) -> list[float]:
        ends = np.cumsum([0, *self.loads]).tolist()
        logs = [math.log(a / b) for a, b in zip(self.round_ms[slow], self.round_ms[fast], strict=True)]
        return [statistics.median(logs[start:end]) for start, end in pairwise(ends)]

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times as long `slow` takes as `fast`."""
        return self.mean(slow, fast).ratio()

    def compared(self, slow: str, fast: str) -> int:
        """1 if `fast` is faster than `slow`, -1 if it is slower, 0 if that cannot be told.

        The interval, at a confidence that leaves 5 % for all comparisons of the sweep, must not hold 1, and the centre
        must lie beyond what one model showed against its own copy.
        """
        if not self.enough:
            return 0
        ratio = self.mean(slow, fast).ratio(1 - (1 - CONFIDENCE) / self.comparisons)
        edge = max(self.noise.high, 1 / self.noise.low, 1.0)
        return int(ratio.low > 1 and ratio.median > edge) - int(ratio.high < 1 and ratio.median < 1 / edge)

    def log_ms(self, name: str) -> Mean:
        """Of the logarithm of a model's time in ms."""
        return _mean_of_rounds(self.round_ms[name], (1.0,) * len(self.round_ms[name]), self.loads)

    def typical_ms(self, name: str) -> float:
        """The geometric mean over the loads of the median round."""
        return math.exp(self.log_ms(name).value)

    def fastest(self, names: Sequence[str]) -> str:
        """Of these models, the one that takes least time."""
        return min(names, key=self.typical_ms)


def _mean_of_rounds(slow: Sequence[float], fast: Sequence[float], loads: Sequence[int]) -> Mean:
    """Loads are what is independent. Of one load alone (as in results of earlier versions): the median of its rounds,
    with the spread of these."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    if len(loads) < 2:
        return replace(mean_of(logs), value=statistics.median(logs))
    ends = np.cumsum([0, *loads]).tolist()
    return mean_of([statistics.median(logs[start:end]) for start, end in pairwise(ends)])


@dataclass(frozen=True)
class StartUp:
    """One model in a process of its own: loading it, the first forward pass, and the process's peak memory."""

    model: str
    load_s: NotNegative
    first_call_ms: NotNegative
    peak_memory_mb: NotNegative


@dataclass(frozen=True)
class LatencyResult(Shown):
    """One row a batch size, at `threads` CPU threads; `baseline` is the registered fp32 model.

    `weights` say how much each batch size counts (those left out: nothing; an empty dict: all alike).
    `max_busy_percent` is the share of the timed cores that others may take before no verdict rests on the times.
    `left_out` are batch sizes that were not chosen and take too long; the reason is a main clause. `models_left_out`
    are models that were asked for and could not be timed, with the reasons.
    """

    baseline: str
    rows: tuple[LatencyRow, ...]
    startups: tuple[StartUp, ...]
    threads: Some
    weights: dict[Some, NotNegative] = field(default_factory=dict)
    max_busy_percent: Percent = 100.0
    left_out: tuple[Some, ...] = ()
    left_out_because: str = ""
    models_left_out: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError where times are missing or contradict each other: they were changed."""
        for row in self.rows:
            row.check()
            if row.stats.keys() != self.rows[0].stats.keys():
                raise ValueError(f"the times of a model at batch size {row.batch_size} are missing")
        if not self.counted or self.baseline not in self.rows[0].stats:
            raise ValueError("there are no times that count")

    @property
    def counted(self) -> tuple[LatencyRow, ...]:
        """The rows of the batch sizes that count."""
        return tuple(row for row in self.rows if self._weight(row) > 0)

    def _weight(self, row: LatencyRow) -> float:
        return self.weights.get(row.batch_size, 0.0) if self.weights else 1.0

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """Why no verdict may rest on these times; empty where one may."""
        found = []
        if few := [row for row in self.counted if not row.enough]:
            need = f"{FEWEST_ROUNDS} rounds in {FEWEST_LOADS} loads are needed (--min-repeats, --loads)"
            loads = max(1, len(few[0].loads))
            rounds = len(next(iter(few[0].round_ms.values())))
            had = f"{rounds} rounds in {loads} {'load' if loads == 1 else 'loads'}"
            found.append(f"{had} at batch size {_listed(few)}: at least {need}")
        busy = [row for row in self.counted if row.activity and row.activity.busy_percent > self.max_busy_percent]
        if busy:
            most = max(row.activity.busy_percent for row in busy if row.activity)
            sizes = f"(batch {'size' if len(busy) == 1 else 'sizes'} {_listed(busy)})"
            found.append(too_busy(most, f"the timed cores {sizes}", self.max_busy_percent))
        return tuple(found)

    def mean_ratio(self, slow: Sequence[str], fast: str, confidence: float = CONFIDENCE) -> Ratio:
        """How many times as long the fastest of `slow` at each batch size takes as `fast`: the weighted geometric mean
        over the batch sizes that count, with the interval of that mean."""
        return self._mean(slow, fast).ratio(confidence)

    def _mean(self, slow: Sequence[str], fast: str) -> Mean:
        rows = self.counted
        return weighted_mean([row.mean_over_fastest(slow, fast) for row in rows], [self._weight(row) for row in rows])

    def winner(self, names: Sequence[str]) -> str:
        """The fastest in the weighted geometric mean; of those that cannot be told apart from it, the first named."""
        level = self.level_with_fastest(names)
        return next(name for name in names if name in level)

    def level_with_fastest(self, names: Sequence[str]) -> tuple[str, ...]:
        """The fastest in the weighted geometric mean, and after it those that cannot be told apart from it."""
        best = min(names, key=lambda name: self._mean([name], names[0]).value)
        others = [name for name in names if name != best]
        if all(row.enough for row in self.counted):
            confidence = 1 - (1 - CONFIDENCE) / max(1, len(others))
            others = [name for name in others if self.mean_ratio([name], best, confidence).low <= 1]
        return best, *others

    def speedups(self, name: str, over: Sequence[str]) -> tuple[Speedup, ...]:
        """Of a model over the fastest of some others, at each batch size that counts."""
        found = []
        for row in self.counted:
            slow = row.fastest(over)
            found.append(Speedup(row.batch_size, slow, row.ratio(slow, name)))
        return tuple(found)

    def least_speedup(self, name: str, over: Sequence[str]) -> Speedup:
        """The one whose interval reaches lowest."""
        return min(self.speedups(name, over), key=lambda found: found.ratio.low)

    def smallest_speedup(self, name: str, over: Sequence[str]) -> float:
        """The smallest of these speed-ups."""
        return min(found.ratio.median for found in self.speedups(name, over))

    def mean_speedup(self, name: str) -> float:
        """The weighted geometric mean of a model's speed-ups over the baseline."""
        return self.mean_ratio([self.baseline], name).median

    def tables(self) -> tuple[Table, ...]:
        columns = ("batch size", "model", "p50 ms", "p90 ms", "images/s", f"speed-up over {self.baseline}")
        rows = []
        for row in self.rows:
            for name, stats in row.stats.items():
                p90 = "-" if stats.p90_ms is None else f"{stats.p90_ms:.3g}"
                times = (f"{stats.p50_ms:.3g}", p90, f"{stats.images_per_second:.0f}")
                rows.append((str(row.batch_size), name, *times, _interval(row.speedups[name])))
        noise = ", ".join(f"{_interval(row.noise)} at batch size {row.batch_size}" for row in self.rows)
        notes = [f"One model over its own copy: {noise}."]
        notes += [f"No verdict rests on these times: {found}." for found in self.shortcomings]
        title = f"Latency on {self.threads} CPU thread{'s' if self.threads > 1 else ''}, with 95 % intervals"
        return (Table(title, columns, tuple(rows), tuple(notes)),)


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _listed(rows: Sequence[LatencyRow]) -> str:
    return ", ".join(str(row.batch_size) for row in rows)


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
    prepare: Callable[[int], Mapping[str, Run]],
    baseline: str,
    repeated: str,
    options: LatencyConfig,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[], None] = wait_until_idle,
    on_row: Callable[[LatencyRow], None] = lambda row: None,
    watch: Watch = lambda: lambda: None,
    on_round: Callable[[int], None] = lambda batch_size: None,
) -> tuple[LatencyRow, ...]:
    """Time models at every batch size, with OpenMP's threads waiting as in a user's process.

    Args:
        prepare: from a batch size, the calls to time by name, on models that are loaded anew; AGAIN is another copy of
            `repeated`, if there is one.
        baseline: what `speedups` refer to.
        repeated: the model that is measured twice in each round, for the noise.
        clock: seconds.
        rest: called between two models.
        on_row: told of each batch size as it is done.
        watch: watches what else the machine does, from its call until that of what it returns.
        on_round: told the batch size after each round.
    """
    rows = []
    for batch_size in options.batch_sizes:
        ended = watch()
        with waiting_as(DEFAULT):
            blocks, loads = _time_batch_size(
                prepare, batch_size, repeated, options, clock, rest, partial(on_round, batch_size)
            )
        rows.append(_row(batch_size, blocks, loads, baseline, repeated, len(options.batch_sizes), ended()))
        on_row(rows[-1])
    return tuple(rows)


def _time_batch_size(
    prepare: Callable[[int], Mapping[str, Run]],
    batch_size: int,
    repeated: str,
    options: LatencyConfig,
    clock: Callable[[], float],
    rest: Callable[[], None],
    on_round: Callable[[], None],
) -> tuple[dict[str, list[list[float]]], tuple[int, ...]]:
    """As `time_rounds`, over all loads, and the number of rounds of each."""
    loads = min(options.loads, options.min_repeats)
    blocks: dict[str, list[list[float]]] = {}
    counts = []
    for done in range(loads):
        repeats = options.min_repeats * (done + 1) // loads - options.min_repeats * done // loads
        update = {"min_repeats": repeats, "min_seconds": options.min_seconds / loads}
        update |= {"warmup": 1} if done else {}  # what there is to warm up beyond a model is warm
        part = options.model_copy(update=update)
        found = _time_load(prepare(batch_size), repeated, part, clock, rest, on_round, seed=done)
        for name, rounds in found.items():
            blocks.setdefault(name, []).extend(rounds)
        counts.append(len(found[repeated]))
    return blocks, tuple(counts)


def _time_load(
    runs: Mapping[str, Run],
    repeated: str,
    options: LatencyConfig,
    clock: Callable[[], float],
    rest: Callable[[], None],
    on_round: Callable[[], None],
    seed: int,
) -> dict[str, list[list[float]]]:
    """As `time_rounds`; nothing holds the models afterwards, when they are loaded anew."""
    return time_rounds({AGAIN: runs[repeated]} | dict(runs), options, clock, rest, seed, on_round)


def _row(
    batch_size: int,
    blocks: dict[str, list[list[float]]],
    loads: tuple[int, ...],
    baseline: str,
    repeated: str,
    batch_sizes: int,
    activity: Activity | None,
) -> LatencyRow:
    round_ms = {name: tuple(1000 * statistics.median(block) for block in found) for name, found in blocks.items()}
    again = round_ms.pop(AGAIN)
    seconds = {name: [value for block in blocks[name] for value in block] for name in round_ms}
    stats = {name: summarize(values, batch_size) for name, values in seconds.items()}
    speedups = {name: _mean_of_rounds(round_ms[baseline], found, loads).ratio() for name, found in round_ms.items()}
    noise = _mean_of_rounds(round_ms[repeated], again, loads).ratio()
    comparisons = batch_sizes * max(1, len(round_ms) - 1)
    return LatencyRow(batch_size, stats, round_ms, speedups, noise, loads, comparisons, activity)


def time_rounds(
    runs: dict[str, Run],
    options: LatencyConfig,
    clock: Callable[[], float],
    rest: Callable[[], None],
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by model and round; each round has a block of every model, in a new random order.

    A slow moment of the machine hits all models of a round. After `warmup` untimed passes of each model: at least
    `min_repeats` rounds and `min_seconds` of timing.
    """
    for run in runs.values():
        for _ in range(options.warmup):
            run()
    order, shuffled = list(runs), random.Random(seed)
    blocks: dict[str, list[list[float]]] = {name: [] for name in runs}
    started = clock()
    while len(blocks[order[0]]) < options.min_repeats or clock() - started < options.min_seconds:
        shuffled.shuffle(order)
        for name in order:
            rest()
            blocks[name].append(_time_block(runs[name], clock))
        on_round()
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
    """Percentiles in ms and throughput of one model's passes at a batch size."""
    p50 = statistics.median(seconds)
    return LatencyStats(
        p50_ms=1000 * p50,
        p90_ms=percentile_ms(seconds, 90),
        p99_ms=percentile_ms(seconds, 99),
        images_per_second=batch_size / p50,
        repeats=len(seconds),
    )


def percentile_ms(seconds: Sequence[float], percent: int) -> float | None:
    """Linear between two samples; None unless one sample at least is expected beyond it."""
    if len(seconds) * (100 - percent) < 100:
        return None
    return float(1000 * np.percentile(seconds, percent))
