"""Write results/smallnet-cifar10 anew from its metrics.json, after the page has changed: run it without arguments.

Nothing is measured. results/vgg16-cifar10 is left as it is: an earlier version measured it, and its note says what of
it still holds.
"""

from dataclasses import replace
from pathlib import Path

from qexp.config import GateConfig
from qexp.files import from_json
from qexp.measurement.gate import GateResult, decide_gate
from qexp.report.page import write_report
from qexp.report.results import Evidence, Judged

PUBLISHED = Path(__file__).parent.parent / "results" / "smallnet-cifar10"


def with_checks(evidence: Evidence, judged: Judged) -> GateResult:
    """The gate's decision with its checks as numbers, where the default limits give the same reasons again."""
    int8, result = judged.int8, evidence.latency
    gate = decide_gate(
        GateConfig(),
        evidence.fp32.accuracy["test"],
        int8.accuracy["test"],
        evidence.fp32.data.guess,
        int8.comparison["test"],
        evidence.fp32.size_bytes / int8.size_bytes,
        result.least_speedup(judged.name, evidence.floats),
        result.shortcomings,
        verified=True,
    )
    return gate if gate.reasons == judged.gate.reasons else judged.gate


if __name__ == "__main__":
    found = from_json(Evidence, (PUBLISHED / "metrics.json").read_text())
    versions = tuple(replace(one, gate=with_checks(found, one)) for one in found.versions)
    write_report(replace(found, versions=versions), PUBLISHED)
    (PUBLISHED / "report.html").unlink()  # 1 MB with its pictures; report.md is what the repository shows
