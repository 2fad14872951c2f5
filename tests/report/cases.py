"""Made-up evidence for whole reports: each case shows what the others do not. The golden files are named after them."""

from dataclasses import replace

from conftest import latency_row, with_gate, with_int8, with_rows, with_speedups

from qexp.config import GateConfig
from qexp.data.duplicates import Duplicates
from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.activity import Activity
from qexp.measurement.cost import TORCHINFO
from qexp.measurement.gate import GateResult, Succession, decide_gate
from qexp.measurement.latency import Ratio, StartUp
from qexp.models.contents import FileContents
from qexp.quantization.budget import BudgetResult, BudgetTry
from qexp.report.page import Origin
from qexp.report.results import Bf16Evidence, BudgetCost, Evidence, Judged

ORIGIN = Origin("2026-11-26", "0123456789abcdef0123456789abcdef", "https://mlflow.example/#/experiments/1/runs/0123")
ONNX, CHAMPION = "models:/smallnet-digits-int8/2", "models:/smallnet-digits-int8/7"


def judged(evidence: Evidence, limits: GateConfig | None = None) -> Evidence:
    """With the gate's decisions by some limits, as the pipeline makes them; champion if the chosen version passed."""
    startups = tuple(
        StartUp(name, 0.1 * n, 10.0 * n, 300.0 + n) for n, name in enumerate(evidence.latency.rows[0].stats)
    )
    latency = replace(evidence.latency, startups=startups)
    evidence = replace(evidence, measured=replace(evidence.measured, latency=latency))
    versions = tuple(replace(one, gate=_gate(evidence, one, limits or GateConfig())) for one in evidence.versions)
    return replace(evidence, versions=versions, champion=versions[0].gate.passed)


def _gate(evidence: Evidence, one: Judged, limits: GateConfig) -> GateResult:
    fp32, int8, found = evidence.fp32, one.int8, evidence.latency
    return decide_gate(
        limits,
        fp32.accuracy["test"],
        int8.accuracy["test"],
        fp32.data.guess,
        int8.comparison["test"],
        fp32.size_bytes / int8.size_bytes,
        found.least_speedup(one.name, evidence.floats),
        found.shortcomings,
        verified=True,
    )


def ship_int8(evidence: Evidence) -> Evidence:
    """The best case: two engines and one that failed, bf16, a budget met with layers in fp32, two kinds of kernels."""
    kept = ("network.0",)
    quantize = replace(evidence.int8.quantize, kept_layers=kept, int8_layers=("network.3",), float_layers=kept)
    cost = BudgetCost(400_000, 450_000, {1: Ratio(1.25, 1.2, 1.3), 128: Ratio(1.01, 0.99, 1.03)}, (1,))
    budget = BudgetResult(1.0, (BudgetTry((), 1.2, 2.1), BudgetTry(kept, 0.2, 0.9)), True, 5000)
    fp32_data = replace(evidence.fp32.data, duplicates=Duplicates(0, 0, 0, 0, 0), guess_percent=10.3)
    fp32 = replace(evidence.fp32, data=fp32_data, contents=FileContents(1_600_000, 150_000, 50_000))
    found = with_int8(
        replace(evidence, fp32=fp32),
        quantize=quantize,
        budget=budget,
        budget_cost=cost,
        contents=FileContents(420_000, 10_000, 20_000),
    )
    two = with_onnx(found)
    times = {
        1: {"fp32": 1.0, "fp32_eager": 0.9, "bf16": 0.7, "fp32_onnx": 0.5, "int8_fx_onednn": 0.2, "int8_fx": 0.25,
            "int8_onnx": 0.3},
        8: {"fp32": 4.0, "fp32_eager": 3.6, "bf16": 1.6, "fp32_onnx": 2.4, "int8_fx_onednn": 0.7, "int8_fx": 0.8,
            "int8_onnx": 0.9},
        128: {"fp32": 100.0, "fp32_eager": 95.0, "bf16": 30.0, "fp32_onnx": 60.0, "int8_fx_onednn": 9.0,
              "int8_fx": 10.0, "int8_onnx": 12.0},
    }  # fmt: skip
    rows = [
        replace(latency_row(batch, ms), activity=Activity(20.0, 38.0, 0.5, 2, 2), comparisons=21)
        for batch, ms in times.items()
    ]
    floats = ("fp32", "fp32_eager", "bf16", "fp32_onnx")
    chosen = {found.int8.version_uri: ("int8_fx_onednn", "int8_fx"), ONNX: ("int8_onnx",)}
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)
    timed = with_rows(two, *rows)
    measured = replace(timed.measured, names=chosen, bf16=bf16)
    first = replace(timed.versions[0], name="int8_fx_onednn")
    failed = {"pt2e": "Unsupported operator <aten::roll>"}
    versions = (first, *timed.versions[1:])
    return judged(replace(timed, versions=versions, measured=measured, floats=floats, failed_engines=failed))


def keep_float(evidence: Evidence) -> Evidence:
    """The drop is too large, and int8 is slower at batch size 1; a training that was resumed and stopped early."""
    layers = tuple(
        replace(layer, only_int8_lost_images=20, only_fp32_gained_images=12)
        for layer in (evidence.int8.sensitivity.layers if evidence.int8.sensitivity else ())
    )
    sensitivity = replace(evidence.int8.sensitivity, layers=layers) if evidence.int8.sensitivity else None
    drop = Comparison(3.5, 1.9, 5.1, 1.25, 93.0, 15, 2.5, 359)
    accuracy = {**evidence.int8.accuracy, "test": Accuracy(90.5, 97.25, 359, 1, 3)}
    comparison = {**evidence.int8.comparison, "test": drop}
    train = replace(
        evidence.fp32.train, stopped_early=True, best_epoch=2, times_resumed=2, processes=4, device="cuda", bf16=False
    )
    data = replace(evidence.fp32.data, duplicates=Duplicates(38, 3, 40, 5, 2))
    fp32 = replace(evidence.fp32, train=train, data=data)
    worse = with_int8(replace(evidence, fp32=fp32), accuracy=accuracy, comparison=comparison, sensitivity=sensitivity)
    rows = [
        latency_row(1, {"fp32": 1.0, "bf16": 0.9, "fp32_onnx": 0.5, "int8_fx": 0.8}),
        latency_row(8, {"fp32": 4.0, "bf16": 3.5, "fp32_onnx": 2.4, "int8_fx": 2.41}),
        latency_row(64, {"fp32": 30.0, "bf16": 20.0, "fp32_onnx": 18.0, "int8_fx": 9.0}),
    ]
    bf16 = Bf16Evidence(900_000, Accuracy(88.0, 96.0, 359), 6.0, 4.0, 8.0)
    found = with_rows(worse, *rows)
    return judged(replace(found, measured=replace(found.measured, bf16=bf16)), GateConfig(min_top1=92))


def not_measured(evidence: Evidence) -> Evidence:
    """Too few rounds on a busy machine; a budget that the images cannot show to be met; a champion of other data."""
    budget = BudgetResult(0.5, (BudgetTry((), 0.25, 1.5),), False, images=144)
    found = with_speedups(with_int8(evidence, budget=budget, sensitivity=None), {1: 2.0, 8: 2.5}, rounds=5)
    rows = [replace(row, activity=Activity(10.0, 12.0, 4.0, 2, 2)) for row in found.latency.rows]
    busy = with_rows(found, *rows)
    latency = replace(busy.latency, max_busy_percent=5.0)
    return judged(replace(busy, measured=replace(busy.measured, latency=latency)))


def champion_stays(evidence: Evidence) -> Evidence:
    """Good, but no better than the champion that it was compared with."""
    why = (f"beside {CHAMPION}: as good, but in nothing better: top-1 +0.10 points below the champion's",)
    found = judged(with_speedups(evidence, {1: 2.0, 8: 4.0}))
    return replace(found, champion=False, succession=Succession(False, why), before_uri=CHAMPION)


def size_only(evidence: Evidence) -> Evidence:
    """As fast as float: the gate's limit on speed is missed, the size is not. A pool is folded away in one version."""
    small, large = ({1: count, 8: 8 * count} for count in (15_000_000, 120_000_000))
    layers = {batch: 96 * count // 100 for batch, count in small.items()}
    folded = replace(evidence.int8.cost, macs=small, conv_linear_macs=layers, int8_macs=layers)
    before = replace(evidence.int8.fp32_cost, macs=large, conv_linear_macs=large)
    folded = replace(folded, parameters=150_000)
    first, plain = evidence.versions[0].int8, "models:/smallnet-digits-int8/1"
    small = "models:/smallnet-digits-int8/2"
    quantize = replace(first.quantize, folded=True)
    both = with_int8(evidence, version_uri=small, quantize=quantize, cost=folded, fp32_cost=before, size_bytes=160_000)
    versions = (
        replace(both.versions[0], name="int8_fx_folded"),
        replace(evidence.versions[0], int8=replace(first, version_uri=plain, fp32_cost=before, cost=before)),
    )
    floats = ("fp32", "fp32_onnx", "fp32_onnx_folded", "bf16_folded")
    ms = {"fp32": 4.0, "fp32_onnx": 3.0, "fp32_onnx_folded": 2.0, "bf16_folded": 2.5, "int8_fx_folded": 2.0}
    level = [latency_row(batch, {name: batch * one for name, one in (ms | {"int8_fx": 2.9}).items()})
             for batch in (1, 8)]  # fmt: skip
    bf16 = {"bf16_folded": Bf16Evidence(300_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)}
    names = {small: ("int8_fx_folded",), plain: ("int8_fx",)}
    measured = replace(both.measured, names=names, folded_bf16=bf16)
    found = with_rows(replace(both, versions=versions, measured=measured, floats=floats), *level)
    weighted = replace(found.latency, weights={1: 3.0, 8: 1.0})
    return judged(replace(found, measured=replace(found.measured, latency=weighted)))


def not_trained(evidence: Evidence) -> Evidence:
    """The fp32 model guesses."""
    fp32 = replace(evidence.fp32, accuracy={**evidence.fp32.accuracy, "test": Accuracy(11.0, 31.0, 359)})
    return judged(with_int8(replace(evidence, fp32=fp32), sensitivity=None))


def earlier_version(evidence: Evidence) -> Evidence:
    """As a result of an earlier version: no checks of the gate, MACs by torchinfo, one load; `champion` since then."""
    macs = {1: 1010, 8: 8080}
    old = {"macs": macs, "conv_linear_macs": {1: 1000, 8: 8000}, "counted_by": TORCHINFO}
    cost = replace(evidence.int8.cost, int8_macs={1: 1000, 8: 8000}, **old)  # type: ignore[arg-type]
    found = with_int8(evidence, cost=cost, fp32_cost=cost, sensitivity=None)
    rows = [replace(row, loads=()) for row in with_speedups(found, {1: 2.0, 8: 4.0}).latency.rows]
    return with_gate(with_rows(found, *rows), evidence.gate, champion=True)


def with_onnx(evidence: Evidence) -> Evidence:
    """With a second version of engine onnx, timed at batch sizes 1 and 8."""
    quantize = replace(evidence.int8.quantize, engine="onnx", float_layers=(), kept_layers=())
    accuracy = evidence.int8.accuracy | {"test": Accuracy(92.5, 97.0, 359)}
    comparison = {**evidence.int8.comparison, "test": Comparison(1.5, 0.2, 2.8, 1.5, 98.0, 8, 3, 359)}
    other = replace(
        evidence.int8, version_uri=ONNX, size_bytes=600_000, quantize=quantize, accuracy=accuracy,
        comparison=comparison, budget=None, budget_cost=None,
    )  # fmt: skip
    measured = replace(evidence.measured, names=evidence.measured.names | {ONNX: ("int8_onnx",)})
    two = replace(evidence, measured=measured, versions=(*evidence.versions, Judged(other, "int8_onnx", evidence.gate)))
    rows = [(1, {"fp32": 4.0, "int8_fx": 1.0, "int8_onnx": 2.0}), (8, {"fp32": 8.0, "int8_fx": 4.0, "int8_onnx": 8.0})]
    return with_rows(two, *(latency_row(batch, times) for batch, times in rows))


CASES = {
    case.__name__: case
    for case in (ship_int8, keep_float, not_measured, champion_stays, size_only, not_trained, earlier_version)
}
