"""Whether an int8 model may become `champion`: limits, each compared with the unfavourable end of an interval, and the
comparison with the present champion. Takes what was measured, feeds the verdict and the registry's aliases."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from qexp.config import GateConfig
from qexp.measurement.accuracy import Accuracy, Comparison, share_interval
from qexp.measurement.latency import Ratio, Speedup

PASSED: Final = "passed"
FAILED: Final = "failed"
UNMEASURED: Final = "not measured well enough"
Word = Literal["passed", "failed", "not measured well enough"]
TRAINED, VERIFIED, DROP, SIZE, SPEED, TOP1, AGREEMENT = (
    "trained", "verified", "max_top1_drop", "min_size_ratio", "min_speedup", "min_top1", "min_agreement",
)  # fmt: skip
SMALLER = 0.99  # a successor of at most this share of the champion's size is smaller: files differ by their metadata


@dataclass(frozen=True)
class GateCheck:
    """One limit of the gate: `value` is the measured figure that counts, the unfavourable end of its interval where it
    has one; `bound` is what it is compared with."""

    limit: str
    value: float
    bound: float
    kept: bool


@dataclass(frozen=True)
class GateResult:
    """The decision, its reasons as sentences (those that decided, or all of them when it passed), and the limits that
    failed. `checks` has all limits that could be checked; it is empty in results of earlier versions."""

    word: Word
    reasons: tuple[str, ...]
    failed_limits: tuple[str, ...] = ()
    checks: tuple[GateCheck, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all limits were kept, by measurements that say so."""
        return self.word == PASSED

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.word}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class _Told:
    """A check, and what is said of it."""

    check: GateCheck
    text: str


def decide_gate(
    limits: GateConfig,
    fp32: Accuracy,
    int8: Accuracy,
    guess_percent: float | None,
    drop: Comparison,
    size_ratio: float,
    speedup: Speedup,
    shortcomings: Sequence[str],
    verified: bool,
) -> GateResult:
    """Hold an int8 model against the limits; a value exactly on its limit passes. Unverified versions never pass, nor
    does what came from a model that guesses.

    Args:
        limits: those that count for its name.
        fp32, int8: on the test images.
        guess_percent: top-1 of always naming the most frequent class; None where images have no labels: top-1 then is
            agreement with fp32, and says nothing of fp32 itself.
        drop: int8 against fp32 on the test images; the upper end of its 95 % interval counts.
        size_ratio: fp32 over int8, in bytes as stored.
        speedup: over the fastest float, where its interval reaches lowest; the lower end counts.
        shortcomings: why no verdict may rest on the times. Limits that need no times fail all the same.
        verified: whether both versions gave the same bits in a clean subprocess.
    """
    others = [
        _Told(GateCheck(VERIFIED, float(verified), 1.0, verified), "a version does not reload bit for bit"),
        *([] if guess_percent is None else [_better_than_guessing(fp32, guess_percent)]),
        _shown_by_few(
            _at_most(
                DROP,
                f"top-1 drop {drop.top1_drop_points:.4g} points, upper end {drop.top1_drop_high_points:.4g}",
                drop.top1_drop_high_points,
                limits.max_top1_drop,
            ),
            drop.top1_drop_points <= limits.max_top1_drop,
            drop.images,
        ),
        _at_least(SIZE, f"size ratio {size_ratio:.4g}", size_ratio, limits.min_size_ratio),
    ]
    if limits.min_top1 is not None:
        least, _ = share_interval(int8.top1_percent, int8.images)
        text = f"int8 top-1 {int8.top1_percent:.4g} %, lower end {least:.4g}"
        told = _at_least(TOP1, text, least, limits.min_top1)
        others.append(_shown_by_few(told, int8.top1_percent >= limits.min_top1, int8.images))
    if limits.min_agreement is not None:
        least, _ = share_interval(drop.agreement_percent, drop.images)
        text = f"agreement with fp32 {drop.agreement_percent:.4g} %, lower end {least:.4g}"
        told = _at_least(AGREEMENT, text, least, limits.min_agreement)
        others.append(_shown_by_few(told, drop.agreement_percent >= limits.min_agreement, drop.images))
    at = f"over {speedup.over} at batch size {speedup.batch_size}"
    faster = f"speed-up {speedup.ratio.median:.4g} {at}, lower end {speedup.ratio.low:.4g}"
    speed = _at_least(SPEED, faster, speedup.ratio.low, limits.min_speedup)
    limits_told = others if shortcomings else [*others, speed]
    checks = tuple(one.check for one in limits_told)
    if failed := [one for one in limits_told if not one.check.kept]:
        return GateResult(FAILED, tuple(one.text for one in failed), tuple(one.check.limit for one in failed), checks)
    if shortcomings:
        return GateResult(UNMEASURED, tuple(shortcomings), checks=checks)
    return GateResult(PASSED, tuple(one.text for one in limits_told if one.check.limit != VERIFIED), checks=checks)


def _better_than_guessing(fp32: Accuracy, guess_percent: float) -> _Told:
    least, _ = share_interval(fp32.top1_percent, fp32.images)
    found = f"fp32 top-1 {fp32.top1_percent:.4g} %, lower end {least:.4g}"
    check = GateCheck(TRAINED, least, guess_percent, least > guess_percent)
    if check.kept:
        return _Told(check, f"{found} (guessing gives {guess_percent:.4g})")
    why = "it is not trained, or gets other preprocessing or another order of classes than in its training"
    return _Told(check, f"{found}, is not shown to be better than guessing, {guess_percent:.4g} %: {why}")


def _at_most(limit: str, text: str, value: float, most: float) -> _Told:
    check = GateCheck(limit, value, most, value <= most)
    if check.kept:
        return _Told(check, f"{text} (at most {most:g})")
    return _Told(check, f"{text} (too high by {_amount(value - most)}) is not at most {most:g}")


def _at_least(limit: str, text: str, value: float, least: float) -> _Told:
    check = GateCheck(limit, value, least, value >= least)
    if check.kept:
        return _Told(check, f"{text} (at least {least:g})")
    return _Told(check, f"{text} (too low by {_amount(least - value)}) is not at least {least:g}")


def _shown_by_few(told: _Told, measured_is_within: bool, images: int) -> _Told:
    """The same; where what was measured keeps the limit and its interval does not, that more images would help."""
    if told.check.kept or not measured_is_within:
        return told
    return replace(told, text=f"{told.text}: {images:,} test images are too few to show that it is kept")


def _amount(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


@dataclass(frozen=True)
class Succession:
    """Whether a candidate takes the champion's place, and why, as sentences; `compared` is False where that could not
    be measured."""

    replaces: bool
    reasons: tuple[str, ...]
    compared: bool = True

    @property
    def summary(self) -> str:
        """One line."""
        word = "replaces the champion" if self.replaces else "the champion stays"
        return f"{word}: {'; '.join(self.reasons)}"


def decide_succession(
    limits: GateConfig,
    drop: Comparison,
    champion_over_candidate: Ratio,
    size_ratio: float,
    shortcomings: Sequence[str],
) -> Succession:
    """A candidate takes the champion's place if it is shown not to be worse by more than the margins of `limits`, is
    not shown to be less accurate, and is shown to be better in accuracy, speed or size. An equal one does not: the
    champion stays, which is no failure.

    A non-inferiority test in two quantities (Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority,
    2010): the unfavourable end of each 95 % interval must lie within its margin.

    Args:
        drop: the candidate against the champion, as int8 against fp32, on the same test images.
        champion_over_candidate: time, the weighted geometric mean over the batch sizes, with its interval.
        size_ratio: the candidate's bytes over the champion's.
        shortcomings: why nothing may rest on the times.
    """
    low, high = drop.top1_drop_low_points, drop.top1_drop_high_points
    below = f"top-1 {drop.top1_drop_points:+.2f} points below the champion's"
    accuracy = f"{below} (95 % interval {low:+.2f} to {high:+.2f}, at most {limits.champion_top1_margin:g})"
    ratio, slowest = champion_over_candidate, 1 / (1 + limits.champion_slowdown_percent / 100)
    speed = f"{ratio.median:.3f}x as fast ({ratio.low:.3f} to {ratio.high:.3f}, at least {slowest:.3f})"
    size = f"{size_ratio:.3f} of its size"
    if shortcomings:
        return Succession(False, tuple(shortcomings), compared=False)
    if low > 0:  # however little: many small losses are a large one
        return Succession(False, (f"shown to be less accurate: {accuracy}",))
    if high > limits.champion_top1_margin or ratio.low < slowest:
        worse = [accuracy] * (high > limits.champion_top1_margin) + [speed] * (ratio.low < slowest)
        return Succession(False, ("not shown to be as good: " + "; ".join(worse),))
    better = [accuracy] * (high < 0) + [speed] * (ratio.low > 1) + [size] * (size_ratio <= SMALLER)
    if not better:
        return Succession(False, (f"as good, but in nothing better: {accuracy}; {speed}; {size}",))
    level = [text for text in (accuracy, speed) if text not in better]
    return Succession(True, (f"better: {'; '.join(better)}", *level))
