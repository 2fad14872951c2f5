"""Whether an int8 model may become `champion`: limits, each held against the unfavourable end of what was measured, and
the comparison with the model that is it now."""

from dataclasses import dataclass
from statistics import geometric_mean

from qexp.config import GateConfig
from qexp.evaluation import Accuracy, Comparison, share_interval
from qexp.latency import FEWEST_PAIRS, LatencyResult, Ratio

SLOWER_AT_ONE_SIZE = 1.05  # loaded anew, the same model may differ by some percent: where its memory lies


@dataclass(frozen=True)
class GateResult:
    """The decision, and its reasons as sentences: those that failed, or all of them when it passed."""

    passed: bool
    reasons: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.word}: {'; '.join(self.reasons)}"

    @property
    def word(self) -> str:
        """`passed` or `failed`."""
        return "passed" if self.passed else "failed"


def decide_gate(
    limits: GateConfig,
    accuracy: Accuracy,
    drop: Comparison,
    size_ratio: float,
    speedup: tuple[int, Ratio],
    verified: bool,
) -> GateResult:
    """Hold an int8 model against the limits; a value exactly on its limit passes. Unverified versions never pass.

    Args:
        limits: those that count for its name.
        accuracy: of the int8 model on the test images.
        drop: int8 against fp32 on the test images; the upper end of its 95 % interval counts.
        size_ratio: fp32 over int8, in bytes as stored.
        speedup: the batch size at which its interval reaches lowest, and that interval, of which the lower end counts.
        verified: whether both versions gave the same bits in a bare process.
    """
    high, (batch_size, ratio) = drop.top1_drop_high_points, speedup
    faster = f"speed-up {ratio.median:.4g} at batch size {batch_size}, lower end {ratio.low:.4g}"
    checks = [
        _at_most(f"top-1 drop {drop.top1_drop_points:.4g} points, upper end {high:.4g}", high, limits.max_top1_drop),
        _at_least(f"size ratio {size_ratio:.4g}", size_ratio, limits.min_size_ratio),
        _at_least(faster, ratio.low, limits.min_speedup),
    ]
    if limits.min_top1 is not None:
        least, _ = share_interval(accuracy.top1_percent, accuracy.images)
        text = f"int8 top-1 {accuracy.top1_percent:.4g} %, lower end {least:.4g}"
        checks.append(_at_least(text, least, limits.min_top1))
    failed = ["a version does not reload bit for bit"] if not verified else []
    failed += [text for ok, text in checks if not ok]
    return GateResult(not failed, tuple(failed or [text for _, text in checks]))


def _at_most(text: str, value: float, limit: float) -> tuple[bool, str]:
    if value <= limit:
        return True, f"{text} (at most {limit:g})"
    return False, f"{text} (too high by {_amount(value - limit)}) is not at most {limit:g}"


def _at_least(text: str, value: float, limit: float) -> tuple[bool, str]:
    if value >= limit:
        return True, f"{text} (at least {limit:g})"
    return False, f"{text} (too low by {_amount(limit - value)}) is not at least {limit:g}"


def _amount(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def decide_succession(drop: Comparison, latency: LatencyResult, champion: str, candidate: str) -> GateResult:
    """Whether a candidate is no worse than the champion, as far as the measurements show.

    It is worse if the whole 95 % interval of the drop is above 0; if it is slower beyond the noise in the geometric
    mean over the batch sizes; or if it is, at any of them, slower beyond the noise and by more than 5 %.

    Args:
        drop: the candidate against the champion, as int8 against fp32, on the same test images.
        latency: has both, under these names.
    """
    low, high = drop.top1_drop_low_points, drop.top1_drop_high_points
    lost = f"top-1 {drop.top1_drop_points:.2f} points below the champion's, 95 % interval {low:+.2f} to {high:+.2f}"
    ratios = {row.batch_size: row.ratio(champion, candidate) for row in latency.rows}
    mean, best = (geometric_mean(getattr(ratio, end) for ratio in ratios.values()) for end in ("median", "high"))
    edge = geometric_mean(row.noise_edge for row in latency.rows)
    few = min(len(row.round_ms[candidate]) for row in latency.rows) < FEWEST_PAIRS
    limits = f"fewer than {FEWEST_PAIRS} rounds tell no more" if few else f"at best {best:.2f}x, noise {edge:.2f}x"
    speed = f"{mean:.2f}x as fast as the champion (geometric mean; {limits})"
    level = few or best >= 1 / edge
    checks = [
        (low <= 0, lost if low <= 0 else f"{lost}: worse by at least {low:.2g} points"),
        (level, speed if level else f"{speed}: slower beyond the noise"),
    ]
    for row in latency.rows:
        ratio = ratios[row.batch_size]
        if row.compared(champion, candidate) < 0 and ratio.median * SLOWER_AT_ONE_SIZE < 1:
            at = f"at batch size {row.batch_size}, {1 / ratio.median:.2f}x as slow as the champion"
            checks.append((False, f"{at} ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"))
    failed = tuple(text for ok, text in checks if not ok)
    return GateResult(not failed, failed or tuple(text for _, text in checks))
