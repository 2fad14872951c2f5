"""Throughput: what k independent workers, each on cores of its own, serve at saturation; and the statistics of it.

load.py runs the workers and gives the clock readings; here they become images a second, the time of a request, and the
configuration to take. Each round starts the workers anew, so rounds are independent: a rate is the geometric mean over
the rounds, with the interval of Student's t. In each round float and int8 take turns, so their ratio is paired;
configurations do not, so their ratios have the interval of Welch's t.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qexp.foundation.quantities import Percent, Some, Timed
from qexp.foundation.tables import Shown, Table
from qexp.measurement.activity import Activity, too_busy
from qexp.measurement.latency import CONFIDENCE, Mean, Ratio, difference, mean_of, percentile_ms

Kind = Literal["float", "int8"]
KINDS: tuple[Kind, ...] = ("float", "int8")
FEWEST_ROUNDS = 3  # with fewer, an interval says nothing


@dataclass(frozen=True)
class Setting:
    """A configuration of a service: worker processes, the threads and cores of each, images a request."""

    workers: Some
    threads: Some
    batch_size: Some

    @property
    def cores(self) -> int:
        """Of all workers together."""
        return self.workers * self.threads

    @property
    def text(self) -> str:
        """In words."""
        processes = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{processes} of {threads}, batch size {self.batch_size}"


@dataclass(frozen=True)
class Served:
    """What one model has served with one setting: images a second in each round, and the time of a request of all
    rounds. A percentile is None where too few requests lie beyond it to know it."""

    model: str
    images_per_second: tuple[Timed, ...]
    p50_ms: Timed
    p99_ms: Timed | None
    requests: Some

    @property
    def mean(self) -> Mean:
        """Of the logarithm of images a second."""
        return mean_of([math.log(rate) for rate in self.images_per_second])

    @property
    def rate(self) -> Ratio:
        """Images a second, with the ends of its 95 % interval."""
        return self.mean.ratio()


@dataclass(frozen=True)
class ThroughputRow:
    """The fastest float and int8 with one setting, in turns."""

    setting: Setting
    float: Served
    int8: Served

    @property
    def speedup(self) -> Ratio:
        """Images a second of int8 over those of the fastest float, round by round."""
        pairs = zip(self.int8.images_per_second, self.float.images_per_second, strict=True)
        return mean_of([math.log(one / other) for one, other in pairs]).ratio()

    def of(self, kind: Kind) -> Served:
        """The one or the other."""
        return self.float if kind == "float" else self.int8


@dataclass(frozen=True)
class Choice:
    """A setting and what one model serves with it."""

    setting: Setting
    served: Served


@dataclass(frozen=True)
class Need:
    """What a rate takes: machines like this one, and the cores used on all of them together."""

    machines: Some
    cores: Some
    each: Choice


@dataclass(frozen=True)
class ThroughputResult(Shown):
    """One row a setting. `cores` are those that could be used; `pinned`: each worker was held on its own.

    `activities` say what else the machine did, a round and number of workers each. `left_out` are settings that were
    not tried, with the reason.
    """

    rows: tuple[ThroughputRow, ...]
    cores: Some
    pinned: bool
    max_busy_percent: Percent = 100.0
    activities: tuple[Activity, ...] = ()
    left_out: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError where something is missing: the file was changed."""
        if not self.rows:
            raise ValueError("there are no settings")
        for row in self.rows:
            rounds = {len(row.of(kind).images_per_second) for kind in KINDS}
            if len(rounds) != 1 or 0 in rounds:
                raise ValueError(f"a round with {row.setting.text} is missing")

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """Why nothing may rest on these figures; empty where something may."""
        found = []
        rounds = min(len(row.int8.images_per_second) for row in self.rows)
        if rounds < FEWEST_ROUNDS:
            found.append(f"of at least {FEWEST_ROUNDS} rounds that it takes, {rounds} were made (--load-rounds)")
        busy = max((one.busy_percent for one in self.activities), default=0.0)
        if busy > self.max_busy_percent:
            found.append(too_busy(busy, "the workers' cores", self.max_busy_percent))
        return tuple(found)

    def best(self, kind: Kind, max_p99_ms: float | None = None) -> Choice | None:
        """The setting that serves most images a second within a limit of the 99th percentile of a request's time; of
        those that are not told apart from it, the one with the fewest cores and then the smallest batch. None if no
        setting is within the limit, or too few requests were timed to know."""
        able = self._within(kind, max_p99_ms)
        if not able:
            return None
        most = max(able, key=lambda one: one.served.mean.value)
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(able) - 1)
        level = [one for one in able if difference(most.served.mean, one.served.mean).ratio(confidence).low <= 1]
        enough = len(most.served.images_per_second) >= FEWEST_ROUNDS
        return min(level, key=lambda one: (one.setting.cores, one.setting.batch_size)) if enough else most

    def needed(self, kind: Kind, images_per_second: float, max_p99_ms: float | None = None) -> Need | None:
        """The fewest cores with which a rate is shown to be served: by the lower end of its interval. Where no setting
        does so, as many machines as it takes with the setting that serves most. None as in `best`."""
        able = self._within(kind, max_p99_ms)
        enough = [one for one in able if one.served.rate.low >= images_per_second]
        if enough:
            each = min(enough, key=lambda one: (one.setting.cores, one.served.p50_ms))
            return Need(1, each.setting.cores, each)
        if not able:
            return None
        each = max(able, key=lambda one: one.served.rate.low)
        machines = math.ceil(images_per_second / each.served.rate.low)
        return Need(machines, machines * each.setting.cores, each)

    def _within(self, kind: Kind, max_p99_ms: float | None) -> list[Choice]:
        found = [Choice(row.setting, row.of(kind)) for row in self.rows]
        if max_p99_ms is None:
            return found
        return [one for one in found if one.served.p99_ms is not None and one.served.p99_ms <= max_p99_ms]

    def tables(self) -> tuple[Table, ...]:
        title = f"Images a second at saturation on up to {self.cores} cores, with 95 % intervals"
        notes = [f"Nothing may rest on these figures: {found}." for found in self.shortcomings]
        return (Table(title, COLUMNS, tuple(map(cells, self.rows)), tuple(notes)),)


COLUMNS = (
    "workers", "threads", "batch size", "fastest float", "its images/s", "its p50 / p99, ms", "int8 images/s",
    "int8 p50 / p99, ms", "int8 over float",
)  # fmt: skip


def cells(row: ThroughputRow) -> tuple[str, ...]:
    """A setting as a row, below COLUMNS."""
    at, over = row.setting, row.speedup
    told = [text for kind in KINDS for text in (_rate(row.of(kind)), _times(row.of(kind)))]
    speedup = f"{over.median:.2f}x ({over.low:.2f} to {over.high:.2f})"
    return (str(at.workers), str(at.threads), str(at.batch_size), row.float.model, *told, speedup)


def _rate(served: Served) -> str:
    found = served.rate
    return f"{found.median:,.4g} ({found.low:,.4g} to {found.high:,.4g})"


def _times(served: Served) -> str:
    return f"{served.p50_ms:.3g} / {'-' if served.p99_ms is None else format(served.p99_ms, '.3g')}"


@dataclass(frozen=True)
class Round:
    """What the workers have done together in one round with one model: images a second, and seconds of each request."""

    images_per_second: float
    request_s: tuple[float, ...]


def round_of(clocks: Sequence[Sequence[float]], batch_size: int) -> Round:
    """A round from the clock readings of each worker, in seconds of one clock: its start, and the end of each request.

    Counted is what all workers have done while all of them were at work: from the last start to the first end. Of a
    request that is partly outside, that part of it counts.
    """
    begin, end = max(clock[0] for clock in clocks), min(clock[-1] for clock in clocks)
    done = sum(_requests_between(np.asarray(clock), begin, end) for clock in clocks)
    durations = [seconds for clock in clocks for seconds in np.diff(clock).tolist()]
    return Round(batch_size * done / (end - begin), tuple(durations))


def _requests_between(clock: "np.ndarray", begin: float, end: float) -> float:
    """How many requests, a part as a part, lie between two readings, both within those of the worker."""
    counts = np.interp([begin, end], clock, np.arange(len(clock)))
    return float(counts[1] - counts[0])


def served(model: str, rounds: Sequence[Round]) -> Served:
    """What one model has served with one setting in all rounds."""
    seconds = [second for one in rounds for second in one.request_s]
    rates = tuple(one.images_per_second for one in rounds)
    return Served(model, rates, 1000 * statistics.median(seconds), percentile_ms(seconds, 99), len(seconds))


def settings(
    cores: int, workers: Sequence[int] | None, threads: Sequence[int] | None, batch_sizes: Sequence[int]
) -> tuple[Setting, ...]:
    """What is tried on so many cores, where each worker has as many as it has threads; empty if nothing fits.

    Args:
        workers: numbers of them; None: one, half and all of those that fit.
        threads: of each worker; None: 1, 2, 4, … and all cores.
    """
    doubled = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    found = []
    for count in threads or sorted({*doubled, cores}):
        most = cores // count
        found += [
            Setting(number, count, size)
            for number in workers or sorted({1, max(1, most // 2), most})
            if 0 < number * count <= cores
            for size in batch_sizes
        ]
    return tuple(found)


def by_processes(found: Sequence[Setting]) -> Mapping[tuple[int, int], list[Setting]]:
    """Settings by workers and threads: those of one group are measured in the same processes."""
    groups: dict[tuple[int, int], list[Setting]] = {}
    for one in found:
        groups.setdefault((one.workers, one.threads), []).append(one)
    return groups
