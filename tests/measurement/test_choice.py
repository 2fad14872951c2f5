"""Which of several int8 versions is chosen: accuracy first, within its interval; then speed; then size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from qexp.measurement.accuracy import Comparison
from qexp.measurement.choice import Candidate, choose
from qexp.measurement.latency import LatencyResult, Ratio


class Times:
    """A sweep in which each model took so many milliseconds, with an interval of 5 % to both sides."""

    def __init__(self, **times_ms: float) -> None:
        self.times_ms = times_ms

    def mean_ratio(self, slow: Sequence[str], fast: str) -> Ratio:
        ratio = min(self.times_ms[name] for name in slow) / self.times_ms[fast]
        return Ratio(ratio, ratio / 1.05, ratio * 1.05)

    def level_with_fastest(self, names: Sequence[str]) -> tuple[str, ...]:
        best = min(names, key=lambda name: self.times_ms[name])
        return best, *(name for name in names if name != best and self.mean_ratio([name], best).low <= 1)


def _candidate(name: str, drop: float, size_bytes: int = 100, high: float | None = None, **more: bool) -> Candidate:
    top = drop + 0.3 if high is None else high
    found = cast(Comparison, _Drop(drop, top))
    return Candidate(name, found, size_bytes, **{"passed": True, "accurate": True} | more)


class _Drop:
    def __init__(self, points: float, high: float) -> None:
        self.top1_drop_points, self.top1_drop_high_points = points, high


def _chosen(times: Times, *candidates: Candidate) -> tuple[str, dict[str, str]]:
    found = choose(candidates, cast(LatencyResult, cast(Any, times)))
    return found.name, found.not_chosen


def test_a_version_beyond_the_interval_of_the_most_accurate_is_out_however_fast() -> None:
    fast, good, level = _candidate("fast", 0.9), _candidate("good", 0.0, high=0.4), _candidate("level", 0.4)
    name, why = _chosen(Times(fast=1, good=3, level=2), fast, good, level)
    assert name == "level"
    assert why["fast"] == "it loses 0.90 points of top-1, more than the upper end of the interval of `good`, 0.40"
    assert why["good"] == "it takes 1.50 times as long as `level`"


def test_of_equally_fast_ones_the_more_accurate_then_the_smaller_then_the_first() -> None:
    one, two, small = _candidate("one", 0.1), _candidate("two", 0.0), _candidate("small", 0.0, 99)
    name, why = _chosen(Times(one=1.0, two=1.02, small=1.03), one, two, small)
    assert name == "small"
    assert why == {
        "one": "as fast as `small`, as far as can be told, and less accurate",
        "two": "as fast as `small`, as far as can be told, and larger",
    }
    twin = replace(two, name="twin")
    assert _chosen(Times(two=1, twin=1), two, twin)[0] == "two"


def test_those_that_passed_the_gate_come_first_then_those_that_are_accurate_enough() -> None:
    fast = _candidate("fast", 47.0, passed=False, accurate=False)
    good = _candidate("good", 0.5, passed=False)
    bad = _candidate("bad", 3.0, passed=False, accurate=False)
    times = Times(fast=1, good=4, bad=2)
    assert _chosen(times, fast, good, bad)[0] == "good"
    assert _chosen(times, fast, bad) == ("bad", {"fast": "it loses more accuracy than `bad`"})
    name, why = _chosen(times, good, replace(bad, passed=True, accurate=True))
    assert (name, why) == ("bad", {"good": "it did not pass the gate"})


def test_a_single_version_is_chosen() -> None:
    assert _chosen(Times(bad=1), _candidate("bad", 3.0, passed=False, accurate=False)) == ("bad", {})
