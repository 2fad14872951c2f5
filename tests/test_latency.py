"""Timing with a clock that only the timed calls move, and statistics against values by hand and numpy's."""

from collections.abc import Callable

import numpy as np
import pytest

from qexp.config import LatencyConfig
from qexp.latency import (
    LatencyResult,
    LatencyRow,
    LatencyStats,
    measure_latency,
    percentile,
    summarize,
    time_interleaved,
)

Call = Callable[[], None]


def _imagined_machine() -> tuple[Callable[[], float], Callable[[str, float], Call], list[str]]:
    """A clock, a maker of calls that take a given time on it, and the list of calls made."""
    now, calls = [100.0], []

    def make(name: str, seconds: float) -> Call:
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    return lambda: now[0], make, calls


def _time(warmup: int, min_repeats: int, min_seconds: float) -> tuple[list[list[float]], list[str]]:
    clock, make, calls = _imagined_machine()
    options = LatencyConfig(warmup=warmup, min_repeats=min_repeats, min_seconds=min_seconds)
    return time_interleaved([make("fp32", 0.25), make("int8", 0.125)], options, clock), calls


def test_calls_are_timed_in_turn() -> None:
    seconds, calls = _time(warmup=1, min_repeats=4, min_seconds=0)
    assert calls == ["fp32", "int8"] * 5
    assert seconds == [[0.25] * 4, [0.125] * 4]


@pytest.mark.parametrize("warmup", [1, 3])
def test_warm_up_is_not_timed(warmup: int) -> None:
    seconds, calls = _time(warmup=warmup, min_repeats=2, min_seconds=0)
    assert len(seconds[0]) == len(seconds[1]) == 2
    assert calls.count("fp32") == calls.count("int8") == warmup + 2


def test_a_slow_first_call_falls_into_the_warm_up() -> None:
    clock, make, _ = _imagined_machine()
    slow, fast = make("first", 9.0), make("later", 0.5)
    left = [slow]
    run = lambda: (left.pop() if left else fast)()  # noqa: E731
    assert time_interleaved([run], LatencyConfig(warmup=1, min_repeats=3, min_seconds=0), clock) == [[0.5] * 3]


@pytest.mark.parametrize(
    ("min_repeats", "min_seconds", "rounds"),
    [(5, 0.0, 5), (5, 1.0, 5), (2, 3.0, 8), (2, 3.1, 9), (2, 0.1, 2)],  # a round takes 0.375 s
)
def test_timing_lasts_for_both_minimums(min_repeats: int, min_seconds: float, rounds: int) -> None:
    seconds, calls = _time(warmup=7, min_repeats=min_repeats, min_seconds=min_seconds)
    assert len(seconds[0]) == len(seconds[1]) == rounds
    assert len(calls) == 2 * (7 + rounds)  # warm-up took 2.6 s, which do not count


def test_both_models_at_every_batch_size() -> None:
    clock, make, calls = _imagined_machine()
    told: list[LatencyRow] = []

    def prepare(batch_size: int) -> tuple[Call, Call]:
        return make(f"fp32 {batch_size}", 0.5 * batch_size), make(f"int8 {batch_size}", 0.125 * batch_size**2)

    options = LatencyConfig(batch_sizes=[1, 2, 8], warmup=1, min_repeats=2, min_seconds=0)
    result = measure_latency(prepare, options, 3, clock, told.append)
    assert [row.batch_size for row in result.rows] == [1, 2, 8]
    assert [row.speedup for row in result.rows] == [4.0, 2.0, 0.5]
    assert [row.fp32.p50_ms for row in result.rows] == [500, 1000, 4000]
    assert [row.int8.p50_ms for row in result.rows] == [125, 500, 8000]
    assert result.smallest_speedup == 0.5 and result.threads == 3
    assert tuple(told) == result.rows
    assert calls == [name for batch in (1, 2, 8) for _ in range(3) for name in (f"fp32 {batch}", f"int8 {batch}")]


def test_statistics_by_hand() -> None:
    """Eleven samples of 1 to 11 ms: the median is 6, 90 % is at the eleventh place but one, 99 % near the last."""
    stats = summarize([n / 1000 for n in (11, 2, 3, 4, 1, 6, 7, 8, 9, 10, 5)], batch_size=12)
    assert stats.p50_ms == pytest.approx(6.0)
    assert stats.p90_ms == pytest.approx(10.0)
    assert stats.p99_ms == pytest.approx(10.9)
    assert stats.images_per_second == pytest.approx(2000)
    assert stats.repeats == 11


def test_an_outlier_moves_the_tail_and_not_the_median() -> None:
    calm, disturbed = summarize([0.01] * 20, 1), summarize([0.01] * 19 + [5.0], 1)
    assert calm.p50_ms == disturbed.p50_ms and calm.images_per_second == disturbed.images_per_second
    assert disturbed.p99_ms > 100 * calm.p99_ms


@pytest.mark.parametrize("count", [1, 2, 3, 20, 101])
def test_statistics_are_those_of_numpy(count: int) -> None:
    seconds = np.random.RandomState(count).gamma(2.0, 0.01, count).tolist()
    stats = summarize(seconds, batch_size=4)
    assert (stats.p50_ms, stats.p90_ms, stats.p99_ms) == pytest.approx(
        tuple(1000 * np.percentile(seconds, [50, 90, 99]))
    )
    for percent in (0, 12.5, 50, 100):
        assert percentile(seconds, percent) == pytest.approx(np.percentile(seconds, percent))


def test_smallest_speedup_is_that_of_the_worst_batch_size() -> None:
    stats = LatencyStats(1.0, 1.0, 1.0, 1.0, 2)
    rows = tuple(LatencyRow(batch, stats, stats, speedup) for batch, speedup in ((1, 3.0), (8, 0.9), (128, 2.0)))
    assert LatencyResult(rows, threads=1).smallest_speedup == 0.9
