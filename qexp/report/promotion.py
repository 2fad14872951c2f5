"""What was found about an int8 version that may become `champion`: a result of the pipeline, which `tracking/` logs."""

from dataclasses import dataclass

from qexp.measurement.accuracy import Comparison
from qexp.measurement.gate import UNMEASURED, GateResult, Succession
from qexp.measurement.verdict import Verdict, decide_verdict
from qexp.report.results import LatencyEvidence

CANDIDATE = "candidate"
STAYS, FORCED = "champion stays", "forced"
OVERTAKEN = "another version has become champion meanwhile"


@dataclass(frozen=True)
class Promotion:
    """The gate's decision on a candidate, and that against the champion where there is another.

    `floats` are the models that the candidate's speed was held against. With `force` it becomes champion all the same.
    `overtaken`: another version became champion before this one could.
    """

    uri: str
    champion_uri: str | None
    gate: GateResult
    succession: Succession | None
    drop: Comparison
    drop_from_champion: Comparison | None
    measured: LatencyEvidence
    floats: tuple[str, ...]
    force: bool = False
    overtaken: bool = False

    def check(self) -> None:
        """Raise ValueError where figures contradict each other: the file was changed."""
        self.measured.check()
        for found in filter(None, (self.drop, self.drop_from_champion)):
            found.check()

    @property
    def verdict(self) -> Verdict:
        """That on the candidate, whether or not it takes the champion's place."""
        result = self.measured.latency
        return decide_verdict(
            self.gate, result.mean_ratio(self.floats, CANDIDATE), self.uri, result.winner(self.floats)
        )

    @property
    def earned(self) -> str:
        """`passed`, what the gate says where it did not pass, or `champion stays`."""
        if self.overtaken:
            return "rejected"
        if not self.gate.passed:
            return "rejected" if self.gate.word != UNMEASURED else UNMEASURED
        return STAYS if self.succession and not self.succession.replaces else "passed"

    @property
    def word(self) -> str:
        """The decision: what the candidate has earned, or `forced`."""
        return FORCED if self.force and self.earned != "passed" else self.earned

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why: of the gate where it did not pass, or of both."""
        if self.overtaken:
            return (OVERTAKEN,)
        if self.succession is None or not self.gate.passed:
            return self.gate.reasons
        return self.succession.reasons if not self.succession.replaces else self.gate.reasons + self.succession.reasons

    @property
    def summary(self) -> str:
        """Decision and reasons in one line."""
        return f"{self.word}: {'; '.join(self.reasons)}"

    @property
    def figures(self) -> dict[str, float]:
        """What the last line of the command and the run's metrics show."""
        figures = {
            "top1_drop_points": self.drop.top1_drop_points,
            "smallest_speedup": self.measured.latency.smallest_speedup(CANDIDATE, self.floats),
        }
        if self.drop_from_champion:
            figures["top1_below_champion_points"] = self.drop_from_champion.top1_drop_points
        return figures
