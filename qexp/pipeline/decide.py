"""The decision: each int8 version held against the gate, and the best of them chosen. Pure functions on results."""

from collections.abc import Sequence

from qexp.config import Config
from qexp.measurement.choice import choose
from qexp.measurement.gate import GateResult, decide_gate
from qexp.measurement.sweep_models import backend_in
from qexp.quantization import KERNELS
from qexp.report.results import Evidence, Fp32Evidence, Int8Evidence, Judged, LatencyEvidence


def decide(
    config: Config,
    fp32: Fp32Evidence,
    int8s: Sequence[Int8Evidence],
    latency: LatencyEvidence,
    failed_engines: dict[str, str] | None = None,
) -> Evidence:
    """Hold each int8 version against the gate, and choose one.

    `choose` says by what rule.
    """
    judged = [judge(config, fp32, int8, latency) for int8 in int8s]
    best = choose([one.candidate for one in judged], latency.latency).name
    judged.sort(key=lambda one: one.name != best)
    floats = latency.fair_floats(config.gate.of(_name(judged[0].int8)))
    return Evidence(fp32, tuple(judged), latency, judged[0].gate.passed, floats, failed_engines or {})


def judge(config: Config, fp32: Fp32Evidence, int8: Int8Evidence, latency: LatencyEvidence) -> Judged:
    """The gate's decision on an int8 version from what was measured, in the runtime that `qexp.load` gives."""
    limits, name, engine = config.gate.of(_name(int8)), latency.name_of(int8.version_uri), int8.quantize.engine
    int8 = int8.in_runtime(backend_in(name, engine) or KERNELS[engine][0])
    gate: GateResult = decide_gate(
        limits,
        fp32.accuracy["test"],
        int8.accuracy["test"],
        fp32.data.guess if fp32.data.labelled else None,
        int8.comparison["test"],
        fp32.size_bytes / int8.size_bytes,
        latency.latency.least_speedup(name, latency.fair_floats(limits)),
        latency.latency.shortcomings,
        fp32.verified and int8.verified,
    )
    return Judged(int8, name, gate)


def _name(int8: Int8Evidence) -> str:
    """Of the registered model that a version belongs to."""
    return int8.version_uri.removeprefix("models:/").partition("/")[0]
