"""Whether an int8 model may become `champion`: three limits, each with the measured value that it is held against."""

from dataclasses import dataclass

from qexp.config import GateConfig


@dataclass(frozen=True)
class GateResult:
    """The decision, and its reasons as sentences: those that failed, or all of them when it passed."""

    passed: bool
    reasons: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{'passed' if self.passed else 'failed'}: {'; '.join(self.reasons)}"


def decide_gate(
    options: GateConfig, top1_drop_points: float, size_ratio: float, smallest_speedup: float, verified: bool
) -> GateResult:
    """Hold the three values against the limits; a value exactly on its limit passes. Unverified versions never pass."""
    checks = [
        (
            top1_drop_points <= options.max_top1_drop,
            f"top-1 drop {top1_drop_points:.4g} points",
            f"at most {options.max_top1_drop:g}",
        ),
        (size_ratio >= options.min_size_ratio, f"size ratio {size_ratio:.4g}", f"at least {options.min_size_ratio:g}"),
        (
            smallest_speedup >= options.min_speedup,
            f"smallest speed-up {smallest_speedup:.4g}",
            f"at least {options.min_speedup:g}",
        ),
    ]
    failed = ["a version does not reload bit for bit"] if not verified else []
    failed += [f"{value} is not {limit}" for ok, value, limit in checks if not ok]
    passed = [f"{value} ({limit})" for _, value, limit in checks]
    return GateResult(not failed, tuple(failed or passed))
