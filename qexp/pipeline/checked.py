"""What `qexp.check` returns: the answer as a result that prints as the report's first table, and shows as HTML."""

from dataclasses import dataclass

from qexp.foundation.tables import Shown, Table
from qexp.measurement.verdict import Verdict
from qexp.report import sentences, tables
from qexp.report.results import Evidence


@dataclass(frozen=True)
class Checked(Shown):
    """Whether a classifier can ship as int8 on this CPU.

    `evidence` holds every figure. `run_id` and `report_uri` are empty where nothing was registered.
    """

    evidence: Evidence
    run_id: str = ""
    report_uri: str = ""

    @property
    def verdict(self) -> Verdict:
        """The one answer: its word, the reason, and what to ship."""
        return self.evidence.verdict

    def tables(self) -> tuple[Table, ...]:
        """Best float and int8 side by side, and the limits of the gate."""
        return (answer_table(self.evidence),)


def answer_table(evidence: Evidence) -> Table:
    """The report's first table and its verdict, without marks of Markdown."""
    columns, rows = tables.summary(evidence)
    plain = tuple(tuple(cell.replace("`", "").replace("**", "") for cell in row) for row in rows)
    data, model = evidence.fp32.data, evidence.fp32.model
    title = f"Can {model} ship as int8 on this CPU? {data.test_images:,} test images of {data.name}"
    verdict = sentences.verdict(evidence).replace("`", "").replace("**", "")
    return Table(title, tuple(columns), plain, (verdict,))
