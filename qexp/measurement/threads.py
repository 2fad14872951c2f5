"""The best number of CPU threads at each batch size, from sweeps of the same models on several numbers of threads.

The sweeps follow each other in processes of their own, so their loads are independent samples: ratios between two
numbers of threads have the interval of Welch's t. Within one number of threads, models took turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qexp.foundation.quantities import Some, Timed
from qexp.measurement.latency import CONFIDENCE, LatencyResult, LatencyRow, Ratio, difference


@dataclass(frozen=True)
class BestThreads:
    """A model at one batch size: the number of threads to take, and its median time in ms on each number.

    `models` has the name of the model by the number of threads: of floats, the fastest on so many. `shown`: all other
    numbers are shown to be slower. Of those that are not, `threads` is the smallest. `fastest` is the number with the
    shortest time, shown or not.
    """

    threads: Some
    fastest: Some
    p50_ms: dict[Some, Timed]
    models: dict[Some, str]
    shown: bool


@dataclass(frozen=True)
class ThreadsRow:
    """The fastest float and int8 at one batch size, each with its best number of threads; `speedup` is how many times
    as long that float takes as that int8, each on the number with its shortest time.

    With the smallest number that is not told apart, few loads would compare int8 with a float of twice its time.
    """

    batch_size: Some
    float: BestThreads
    int8: BestThreads
    speedup: Ratio


def best_threads(results: Sequence[LatencyResult], int8: str, floats: Sequence[str]) -> tuple[ThreadsRow, ...]:
    """One row for each batch size that was timed on several numbers of threads, of an int8 model by its name."""
    found = []
    for size in sorted({row.batch_size for row in results[0].rows}):
        rows = {one.threads: row for one in results for row in one.rows if row.batch_size == size}
        if len(rows) > 1:
            comparisons = 2 * (len(rows) - 1) * len(results[0].rows)
            of_floats, of_int8 = (_best(rows, names, comparisons) for names in (floats, [int8]))
            found.append(ThreadsRow(size, of_floats, of_int8, _speedup(rows, of_floats, of_int8)))
    return tuple(found)


def _best(rows: dict[int, LatencyRow], names: Sequence[str], comparisons: int) -> BestThreads:
    models = {threads: row.fastest([name for name in names if name in row.stats]) for threads, row in rows.items()}
    times = {threads: row.log_ms(models[threads]) for threads, row in rows.items()}
    fastest = min(times, key=lambda threads: times[threads].value)
    slower = {fastest: False}
    for threads in set(times) - {fastest}:
        ratio = difference(times[threads], times[fastest]).ratio(1 - (1 - CONFIDENCE) / comparisons)
        slower[threads] = ratio.low > 1
    enough = all(row.enough for row in rows.values())
    threads = min(one for one, is_slower in slower.items() if not is_slower) if enough else fastest
    p50_ms = {one: row.stats[models[one]].p50_ms for one, row in sorted(rows.items())}
    return BestThreads(threads, fastest, p50_ms, models, enough and sum(slower.values()) == len(slower) - 1)


def _speedup(rows: dict[int, LatencyRow], slow: BestThreads, fast: BestThreads) -> Ratio:
    first, second = rows[slow.fastest], rows[fast.fastest]
    names = slow.models[slow.fastest], fast.models[fast.fastest]
    if first is second:  # they took turns
        return first.ratio(*names)
    return difference(first.log_ms(names[0]), second.log_ms(names[1])).ratio()
