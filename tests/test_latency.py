"""Timing with a clock that only the timed calls move, and statistics against values by hand, numpy's and chance."""

import random
import statistics
import time
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from conftest import latency_row

from qexp.config import LatencyConfig
from qexp.latency import (
    AGAIN,
    BLOCK_S,
    IDLE_S,
    IDLE_SHARE,
    MOST_WAITS,
    SETTLE_S,
    LatencyResult,
    LatencyRow,
    Ratio,
    measure_latency,
    paired_ratio,
    percentile,
    summarize,
    time_rounds,
    wait_until_idle,
)

Call = Callable[[], None]
SLOW = {"fp32": 0.5, "int8": 0.25}  # seconds a call, so long that each is a block: one call a round


class Machine:
    """A clock that nothing moves but its calls, each of which takes the time it was made with."""

    def __init__(self) -> None:
        self.now, self.calls, self.rested_before = 100.0, list[str](), list[int]()

    def clock(self) -> float:
        return self.now

    def rest(self) -> None:
        self.rested_before.append(len(self.calls))
        self.now += 0.0625  # which counts for no model

    def make(self, name: str, *seconds: float) -> Call:
        """A call that takes these times, the last of them again and again."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call

    def rounds(self, warmup: int, min_repeats: int, min_seconds: float = 0, **seconds: float) -> dict[str, list]:
        options = LatencyConfig(warmup=warmup, min_repeats=min_repeats, min_seconds=min_seconds)
        return time_rounds({name: self.make(name, s) for name, s in seconds.items()}, options, self.clock, self.rest)


# --- rounds


def test_every_round_has_every_model_once_in_an_order_of_its_own() -> None:
    machine = Machine()
    names = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    blocks = machine.rounds(1, 50, **names)
    assert blocks == {name: [[seconds]] * 50 for name, seconds in names.items()}
    assert machine.calls[:4] == list(names)  # warm-up
    orders = [tuple(machine.calls[start : start + 4]) for start in range(4, len(machine.calls), 4)]
    assert len(orders) == 50 and all(sorted(order) == list(names) for order in orders)
    assert len(set(orders)) > 12  # of 24
    for name in names:  # none is always the first, or always after the same one
        assert 3 < sum(order[0] == name for order in orders) < 25


def test_every_block_begins_when_the_one_before_has_come_to_rest() -> None:
    machine = Machine()
    machine.rounds(2, 3, a=1 / 256, b=0.5)
    blocks = machine.rested_before
    assert len(blocks) == 2 * 3 and blocks[0] == 2 * 2  # not in the warm-up
    starts = [machine.calls[at] for at in blocks]
    assert sorted(starts[:2]) == sorted(starts[2:4]) == sorted(starts[4:]) == ["a", "b"]


@pytest.mark.parametrize(("spinning", "waits"), [(0, 1), (1, 2), (8, 9), (99, 100), (1000, 100)])
def test_waiting_lasts_while_something_computes_but_not_for_ever(spinning: int, waits: int) -> None:
    slept = list[float]()

    def cpu_s() -> float:  # of a thread that computes in so many of the intervals
        return sum(slept[:spinning])

    wait_until_idle(cpu_s, slept.append)
    assert slept == [IDLE_S] * waits


def test_an_idle_process_is_seen_as_one() -> None:
    started = time.process_time()
    wait_until_idle()
    assert time.process_time() - started < MOST_WAITS * IDLE_S * IDLE_SHARE


@pytest.mark.parametrize("warmup", [1, 3])
def test_warm_up_is_not_timed(warmup: int) -> None:
    machine = Machine()
    blocks = machine.rounds(warmup, 2, **SLOW)
    assert blocks == {"fp32": [[0.5]] * 2, "int8": [[0.25]] * 2}
    assert machine.calls.count("fp32") == machine.calls.count("int8") == warmup + 2


def test_a_slow_first_call_falls_into_the_warm_up() -> None:
    machine = Machine()
    options = LatencyConfig(warmup=1, min_repeats=3, min_seconds=0)
    assert time_rounds({"a": machine.make("a", 9.0, 0.5)}, options, machine.clock, machine.rest) == {"a": [[0.5]] * 3}


@pytest.mark.parametrize(
    ("min_repeats", "min_seconds", "rounds"),
    [(5, 0.0, 5), (5, 1.0, 5), (2, 7.0, 8), (2, 7.1, 9), (2, 0.1, 2)],  # a round takes 0.875 s
)
def test_timing_lasts_for_both_minimums(min_repeats: int, min_seconds: float, rounds: int) -> None:
    machine = Machine()
    blocks = machine.rounds(7, min_repeats, min_seconds, **SLOW)
    assert len(blocks["fp32"]) == len(blocks["int8"]) == rounds
    assert len(machine.calls) == 2 * (7 + rounds)  # warm-up took 5.25 s, which do not count


def test_calls_in_which_a_model_settles_are_dropped() -> None:
    """Of 4 ms each: those that begin in the first 20 ms of a block are not counted, those until 40 ms are."""
    machine = Machine()
    blocks = machine.rounds(1, 2, quick=1 / 256)
    before, all_of_them = 256 * SETTLE_S, 256 * BLOCK_S
    kept = int(all_of_them) + 1 - (int(before) + 1)  # begun at 6/256 s to 10/256 s
    assert blocks == {"quick": [[1 / 256] * kept] * 2}
    assert machine.calls == ["quick"] * (1 + 2 * (int(all_of_them) + 1))


def test_a_slow_start_of_each_block_is_not_in_its_times() -> None:
    machine = Machine()
    options = LatencyConfig(warmup=1, min_repeats=2, min_seconds=0)
    slow_then_quick = [1 / 256, *[1 / 64, *[1 / 256] * 7] * 2, 1.0]  # warm-up, then 64 + 6 * 4 ms a block and more
    blocks = time_rounds({"a": machine.make("a", *slow_then_quick)}, options, machine.clock, machine.rest)
    assert all(set(block) == {1 / 256} for block in blocks["a"])


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        ((0.5, 0.5), [0.5]),  # one call is more than a block, and settling a small part of it
        ((1 / 16, 1 / 32), [1 / 32]),  # one call is more than a block, and settling a large part of it
        ((1 / 32, 1 / 16), [1 / 16]),  # the second began after the first had settled the model
        ((1 / 64, 1 / 4), [1 / 4]),  # the second began too early, but lasted long
        ((1 / 64, 1 / 8), [0.5]),  # the second began too early, and another had to follow
    ],
)
def test_something_of_a_block_is_always_kept(seconds: tuple[float, float], kept: list[float]) -> None:
    machine = Machine()
    options = LatencyConfig(warmup=1, min_repeats=2, min_seconds=0)
    call = machine.make("a", 1.0, *seconds, 0.5)
    assert time_rounds({"a": call}, options, machine.clock, machine.rest)["a"][0] == kept


# --- rows


def _measure(machine: Machine, told: list[LatencyRow]) -> tuple[LatencyRow, ...]:
    def prepare(batch_size: int) -> dict[str, Call]:
        times = {"fp32": 0.5 * batch_size, "traced": 0.25 * batch_size, "int8": 0.125 * batch_size**2}
        return {name: machine.make(f"{name} {batch_size}", seconds) for name, seconds in times.items()}

    config = LatencyConfig(batch_sizes=[1, 2, 8], warmup=1, min_repeats=6, min_seconds=0)
    return measure_latency(prepare, "fp32", "int8", config, machine.clock, machine.rest, told.append)


def test_all_models_at_every_batch_size() -> None:
    machine, told = Machine(), list[LatencyRow]()
    rows = _measure(machine, told)
    assert [row.batch_size for row in rows] == [1, 2, 8] and tuple(told) == rows
    assert [row.speedups["int8"] for row in rows] == [Ratio(4, 4, 4), Ratio(2, 2, 2), Ratio(0.5, 0.5, 0.5)]
    assert all(row.speedups["fp32"] == Ratio(1, 1, 1) and row.speedups["traced"].median == 2 for row in rows)
    assert [row.stats["fp32"].p50_ms for row in rows] == [500, 1000, 4000]
    assert [row.stats["int8"].p50_ms for row in rows] == [125, 500, 8000]
    assert rows[1].round_ms == {"fp32": (1000.0,) * 6, "traced": (500.0,) * 6, "int8": (500.0,) * 6}
    assert all(row.stats[name].repeats == 6 for row in rows for name in row.stats)


def test_the_noise_is_a_second_measurement_of_one_model_in_every_round() -> None:
    machine = Machine()
    rows = _measure(machine, [])
    assert machine.calls.count("int8 2") == 2 * 7 and machine.calls.count("fp32 2") == 7  # warm-up and six rounds
    assert all(row.noise == Ratio(1, 1, 1) and AGAIN not in row.stats | row.round_ms | row.speedups for row in rows)


def test_the_noise_is_that_of_a_second_copy_if_there_is_one() -> None:
    machine = Machine()

    def prepare(batch_size: int) -> dict[str, Call]:
        return {name: machine.make(name, ms) for name, ms in {"fp32": 1.0, "int8": 0.5, AGAIN: 0.25}.items()}

    config = LatencyConfig(batch_sizes=[1], warmup=1, min_repeats=6, min_seconds=0)
    (row,) = measure_latency(prepare, "fp32", "int8", config, machine.clock, machine.rest)
    assert row.noise == Ratio(2, 2, 2) and list(row.stats) == ["fp32", "int8"]
    assert row.compared("fp32", "int8") == 0  # no more than one copy over the other


def test_a_slow_moment_of_the_machine_does_not_touch_the_speed_up() -> None:
    """It slows all models of a round: their p50 drift apart where a median of ratios does not."""
    slow = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    ratio = paired_ratio([4 * s for s in slow], slow)
    assert ratio == Ratio(4, 4, 4)


# --- ratios


@pytest.mark.parametrize(
    ("count", "left_out"),  # of each end; all but the last two by the exact binomial distribution
    [(1, 0), (2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (200, 85), (1000, 468), (5000, 2429)],
)
def test_interval_of_so_many_pairs(count: int, left_out: int) -> None:
    ratios = [1 + n for n in range(count)]
    random.Random(count).shuffle(ratios)
    found = paired_ratio(ratios, [1.0] * count)
    assert found.median == statistics.median(ratios)
    assert (found.low, found.high) == (1 + left_out, count - left_out)


def test_intervals_are_the_narrowest_with_95_percent() -> None:
    """Sums of the binomial distribution in whole numbers; its normal approximation may leave out one value less."""

    def missed(count: int, cut: int) -> float:
        return 2 * sum(comb(count, k) for k in range(cut + 1)) / 2**count

    for count in (*range(6, 260), 1000, 2000):
        left_out = int(paired_ratio(list(range(1, count + 1)), [1.0] * count).low) - 1
        assert missed(count, left_out) <= 0.05 < missed(count, left_out + (1 if count <= 200 else 2)), count


@pytest.mark.parametrize("count", [6, 20, 50, 300])
def test_the_interval_covers_the_true_median_in_95_of_100(count: int) -> None:
    """Of skewed times with rare outliers, as a machine gives them; the same draws in every run of the tests."""
    draw = np.random.RandomState(count)
    ratios = 2.0 * np.exp(draw.gamma(0.5, 0.2, (2000, count)) * np.where(draw.rand(2000, count) < 0.5, -1, 1))
    found = [paired_ratio(row.tolist(), [1.0] * count) for row in ratios]
    covered = sum(ratio.low <= 2.0 <= ratio.high for ratio in found) / len(found)
    assert 0.93 <= covered <= 0.99


def test_fewer_than_six_pairs_give_all_that_was_seen() -> None:
    assert paired_ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == Ratio(3.0, 2.0, 4.0)


def test_pairs_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0, 2.0], [1.0])


def test_pairs_are_those_of_a_round() -> None:
    row = latency_row(1, {"fp32": 4.0, "int8": 1.0})
    by_hand = [a / b for a, b in zip(row.round_ms["fp32"], row.round_ms["int8"], strict=True)]
    assert row.ratio("fp32", "int8") == row.speedups["int8"]
    assert row.ratio("fp32", "int8").median == statistics.median(by_hand)
    assert row.ratio("int8", "fp32").median == pytest.approx(1 / statistics.median(by_hand))


# --- told apart


@pytest.mark.parametrize(
    ("fast_ms", "noise_percent", "expected"),
    [
        (0.5, 1.0, 1),
        (0.95, 1.0, 1),
        (0.95, 7.0, 0),  # one model differs as much from itself
        (1.0, 0.0, 0),
        (1.002, 0.0, 0),  # within its interval
        (1.05, 1.0, -1),
        (1.05, 7.0, 0),
        (2.0, 1.0, -1),
    ],
)
def test_two_models_are_told_apart_beyond_interval_and_noise(
    fast_ms: float, noise_percent: float, expected: int
) -> None:
    row = latency_row(1, {"fp32": 1.0, "int8": fast_ms}, noise_percent=noise_percent)
    assert row.compared("fp32", "int8") == expected
    assert row.compared("int8", "fp32") == -expected


def test_noise_counts_to_either_side() -> None:
    """The model was 10 % faster than itself: 5 % faster and 5 % slower are no news."""
    quiet = latency_row(1, {"a": 1.0, "faster": 0.95, "slower": 1.05}, noise_percent=0)
    noisy = LatencyRow(1, quiet.stats, quiet.round_ms, quiet.speedups, Ratio(0.95, 0.90, 0.99))
    assert [quiet.compared("a", name) for name in ("faster", "slower")] == [1, -1]
    assert [noisy.compared("a", name) for name in ("faster", "slower")] == [0, 0]


def test_too_few_rounds_tell_nothing() -> None:
    times = {"a": 1.0, "b": 0.1}
    assert [latency_row(1, times, rounds=rounds).compared("a", "b") for rounds in (5, 6)] == [0, 1]


def test_a_wide_interval_tells_nothing() -> None:
    row = latency_row(1, {"a": 1.0, "b": 0.9}, rounds=20)
    wild = row.round_ms | {"b": tuple(0.5 if n % 2 else 1.5 for n in range(20))}
    assert LatencyRow(1, row.stats, wild, row.speedups, row.noise).compared("a", "b") == 0


# --- the result


def _result(*rows: dict[str, float], noise_percent: float = 1.0) -> LatencyResult:
    made = [latency_row(2**n, times, noise_percent=noise_percent) for n, times in enumerate(rows)]
    return LatencyResult("fp32", tuple(made), (), threads=1)


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        ([{"fp32": 1.0, "a": 0.5, "b": 0.4}], "b"),
        ([{"fp32": 1.0, "a": 0.4, "b": 0.5}], "a"),
        ([{"fp32": 1.0, "a": 0.5, "b": 0.499}], "a"),  # not to be told apart: the one named first
        ([{"fp32": 1.0, "a": 0.5, "b": 0.4}, {"fp32": 1.0, "a": 0.4, "b": 0.5}], "a"),  # one all
        ([{"fp32": 1.0, "a": 0.5, "b": 0.4}] * 2 + [{"fp32": 1.0, "a": 0.1, "b": 0.5}], "b"),  # two to one
    ],
)
def test_winner(rows: list[dict[str, float]], winner: str) -> None:
    assert _result(*rows).winner(["a", "b"]) == winner
    assert _result(*rows).winner(["a"]) == "a"


def test_winner_in_noise_is_the_first() -> None:
    assert _result({"fp32": 1.0, "a": 0.5, "b": 0.4}, noise_percent=50).winner(["a", "b"]) == "a"


def test_smallest_and_mean_speedup() -> None:
    result = _result({"fp32": 4.0, "a": 1.0}, {"fp32": 9.0, "a": 10.0}, {"fp32": 2.0, "a": 1.0})
    assert result.smallest_speedup("a") == pytest.approx(0.9, rel=0.01)
    assert result.mean_speedup("a") == pytest.approx((4 * 0.9 * 2) ** (1 / 3), rel=0.01)
    assert result.smallest_speedup("fp32") == result.mean_speedup("fp32") == 1


# --- statistics of one model


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
