"""The verdict: what to ship, and which limit decided. Computed once from the gate; report, tags and JSON show it."""

from dataclasses import dataclass
from typing import Final, Literal

from qexp.measurement.gate import PASSED, SPEED, TRAINED, UNMEASURED, GateResult
from qexp.measurement.latency import Ratio

SHIP_INT8: Final = "ship int8"
SIZE_ONLY: Final = "ship int8 for its size only"
KEEP_FLOAT: Final = "keep float"
NOT_TRAINED: Final = "not trained"
VerdictWord = Literal[
    "ship int8", "ship int8 for its size only", "keep float", "not measured well enough", "not trained"
]


@dataclass(frozen=True)
class Verdict:
    """What to ship, and why.

    Args:
        word: the answer.
        reason: the limit that decided, with what was measured of it.
        ship: the model to ship: a registered int8 version, or of the float models that were timed the fastest one.
            None where nothing can be said.
    """

    word: VerdictWord
    reason: str
    ship: str | None

    @property
    def ships_int8(self) -> bool:
        """Whether an int8 version is what to ship."""
        return self.word in (SHIP_INT8, SIZE_ONLY)


def decide_verdict(gate: GateResult, over_floats: Ratio, int8: str, best_float: str) -> Verdict:
    """The verdict on an int8 version.

    Args:
        gate: the gate's decision on it.
        over_floats: time of the fastest float at each batch size over that of int8, the weighted geometric mean.
        int8: the int8 version to ship, if one is.
        best_float: the float model to ship, if int8 is not.
    """
    reason = "; ".join(gate.reasons)
    if TRAINED in gate.failed_limits:
        return Verdict(NOT_TRAINED, reason, None)
    if gate.word == UNMEASURED:
        return Verdict(UNMEASURED, reason, None)
    if gate.word == PASSED and over_floats.low > 1:
        return Verdict(SHIP_INT8, reason, int8)
    if gate.word == PASSED or (gate.failed_limits == (SPEED,) and over_floats.high >= 1):
        return Verdict(SIZE_ONLY, f"{_in_the_mean(over_floats)}; {reason}", int8)
    return Verdict(KEEP_FLOAT, reason, best_float)


def _in_the_mean(ratio: Ratio) -> str:
    shown = "slower" if ratio.high < 1 else "not shown to be faster" if ratio.low <= 1 else "faster"
    ends = f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"in the mean {ratio.median:.2f}x as fast as the fastest float ({ends}): {shown}"
