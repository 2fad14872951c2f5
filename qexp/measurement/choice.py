"""Which of several int8 versions of one model is the best: accuracy first, within its interval; then speed; then size.

Takes what was measured of each, and the latency sweep in which all were timed; feeds the decision and the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qexp.measurement.accuracy import Comparison
from qexp.measurement.latency import LatencyResult


@dataclass(frozen=True)
class Candidate:
    """An int8 version: its name in the sweep, its comparison with fp32 on the test images, bytes as stored, and whether
    it passed the gate and kept the gate's limit of the drop."""

    name: str
    drop: Comparison
    size_bytes: int
    passed: bool
    accurate: bool


@dataclass(frozen=True)
class BestVersion:
    """The best version by its name in the sweep, and of each other one why it is not."""

    name: str
    not_chosen: dict[str, str]


def choose(candidates: Sequence[Candidate], latency: LatencyResult) -> BestVersion:
    """The best of at least one version.

    Left out, in this order, are: those that did not pass the gate, where another one did; those that lose more accuracy
    than the gate allows, where another one does not; those whose drop lies above the interval of the smallest drop;
    those shown to be slower than the fastest, by the weighted geometric mean over batch sizes. Of what is left, the one
    with the smallest drop, then the smallest file, then the first.
    """
    left, reasons = list(candidates), dict[str, str]()

    def leave_out(fails: Callable[[Candidate], bool], reason: Callable[[Candidate], str]) -> None:
        nonlocal left
        kept = [one for one in left if not fails(one)]
        if kept:
            reasons.update({one.name: reason(one) for one in left if fails(one)})
            left = kept

    leave_out(lambda one: not one.passed, lambda one: "it did not pass the gate")
    leave_out(lambda one: not one.accurate, lambda one: "it loses more accuracy than the gate allows")
    best = min(left, key=lambda one: one.drop.top1_drop_points)
    highest = best.drop.top1_drop_high_points
    if any(one.accurate for one in left):
        leave_out(
            lambda one: one.drop.top1_drop_points > highest,
            lambda one: (
                f"it loses {one.drop.top1_drop_points:.2f} points of top-1, more than the upper end of the "
                f"interval of `{best.name}`, {highest:.2f}"
            ),
        )
    else:
        leave_out(lambda one: one is not best, lambda one: f"it loses more accuracy than `{best.name}`")
    fastest, *level = latency.level_with_fastest([one.name for one in left])
    leave_out(
        lambda one: one.name not in (fastest, *level),
        lambda one: f"it takes {latency.mean_ratio([one.name], fastest).median:.2f} times as long as `{fastest}`",
    )
    chosen = min(left, key=lambda one: (one.drop.top1_drop_points, one.size_bytes))
    leave_out(
        lambda one: one is not chosen,
        lambda one: f"as fast as `{chosen.name}`, as far as can be told, and {_worse(one, chosen)}",
    )
    return BestVersion(chosen.name, reasons)


def _worse(one: Candidate, chosen: Candidate) -> str:
    if one.drop.top1_drop_points > chosen.drop.top1_drop_points:
        return "less accurate"
    return "larger" if one.size_bytes > chosen.size_bytes else "in nothing better"
