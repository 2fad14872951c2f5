"""What to ship: every sentence with values that make it true and with the opposite ones."""

from dataclasses import replace

import pytest
from conftest import latency_row, with_int8, with_rows

from qexp.files import from_json
from qexp.measurement.accuracy import Accuracy
from qexp.measurement.gate import GateResult
from qexp.measurement.latency import Ratio
from qexp.quantization.budget import BudgetResult, BudgetTry
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import advice
from qexp.report.results import Bf16Evidence, BudgetCost, Evidence, Judged

FAILED = GateResult("failed", ("top-1 drop 2.5 points is not at most 1",), ("max_top1_drop",))
OTHER = "models:/smallnet-digits-int8/2"


def _with_times(evidence: Evidence, rows: dict[int, dict[str, float]], noise_percent: float = 1.0) -> Evidence:
    made = [latency_row(batch, {"fp32": 4.0} | times, noise_percent=noise_percent) for batch, times in rows.items()]
    return with_rows(evidence, *made)


def _with_other(evidence: Evidence, other_ms: dict[int, float], gate: GateResult, top1_drop_points: float) -> Evidence:
    """With a second version, as int8_onnx in the table; the chosen one takes 1 ms."""
    comparison = {"test": replace(evidence.int8.comparison["test"], top1_drop_points=top1_drop_points)}
    other = replace(evidence.int8, version_uri=OTHER, size_bytes=500_000, comparison=comparison)
    timed = _with_times(evidence, {batch: {"int8_fx": 1.0, "int8_onnx": ms} for batch, ms in other_ms.items()})
    measured = replace(timed.measured, contenders=timed.measured.contenders | {OTHER: ("int8_onnx",)})
    return replace(timed, measured=measured, versions=(*timed.versions, Judged(other, "int8_onnx", gate)))


# --- the recommendation


def _with_bf16(evidence: Evidence, high: float = 0.4) -> Evidence:
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, high)
    return replace(evidence, measured=replace(evidence.measured, bf16=bf16))


def test_what_bf16_costs_in_accuracy_and_whether_it_counts(evidence: Evidence) -> None:
    costs = (
        "In bf16, top-1 on the test images falls by 0.10 points (95 % interval of the drop -0.20 to +0.40 points), and "
        "the file has 0.900 MB: it "
    )
    known = _with_bf16(evidence)
    _, left_out = advice.recommendation(known)
    assert left_out == f"{costs}does not keep the gate's limits on accuracy, so int8 is not held against it."
    _, counted = advice.recommendation(replace(known, floats=(*known.floats, "bf16")))
    assert counted == f"{costs}keeps the gate's limits on accuracy, so int8 is held against it."
    _, unknown = advice.recommendation(evidence)
    assert unknown == "bf16 was timed, but its accuracy is not known: int8 is not held against it."


def test_without_bf16_nothing_is_said_of_it(evidence: Evidence) -> None:
    assert len(advice.recommendation(_with_times(evidence, {1: {"int8_fx": 1.0}}))) == 1


def test_for_size_only_the_fastest_float_is_named(evidence: Evidence) -> None:
    level = _with_times(evidence, {1: {"fp32_onnx": 1.0, "int8_fx": 1.0}, 8: {"fp32_onnx": 1.0, "int8_fx": 1.0}})
    first, instead = advice.recommendation(level)
    assert first.startswith("**Ship int8 for its size only**: in the mean 1.00x as fast as the fastest float (")
    assert instead == (
        "If time matters more than size, `fp32_onnx` (made of the same weights, not registered) is the fastest float."
    )
    failed = replace(level.versions[0], gate=GateResult("failed", ("too slow",), ("min_speedup",)))
    assert "`--min-speedup 0` lets it pass" in advice.recommendation(replace(level, versions=(failed,)))[1]
    alone = advice.recommendation(_with_times(evidence, {1: {"int8_fx": 4.0}}))
    assert alone[1].startswith("If time matters more than size, `fp32` (the registered version)")


@pytest.mark.parametrize("other_ms", [2.0, 0.5])
def test_other_versions_are_compared_with_the_chosen_one(evidence: Evidence, other_ms: float) -> None:
    *_, about = advice.recommendation(_with_other(evidence, {1: other_ms, 8: other_ms}, evidence.gate, -0.25))
    words = f"`{OTHER}` (int8_onnx): top-1 rises by 0.25 points, 0.500 MB, passes the gate; "
    assert about.startswith(words) and about.endswith(" as fast as int8_fx.")
    assert float(about.removeprefix(words).partition("x")[0]) == pytest.approx(1 / other_ms, rel=0.02)


def test_another_version_that_failed(evidence: Evidence) -> None:
    first, *_, about = advice.recommendation(_with_other(evidence, {1: 0.5}, FAILED, 2.5))
    assert "top-1 falls by 2.50 points, 0.500 MB, does not pass the gate" in about
    assert "Ship `models:/smallnet-digits-int8/1`" in first  # the faster one failed


def test_engines_that_failed_are_named(evidence: Evidence) -> None:
    *_, said = advice.recommendation(replace(evidence, failed_engines={"fx": "an operation is unknown"}))
    assert said == "Engine fx could not quantize it: an operation is unknown."


# --- sensitivity


def test_the_most_sensitive_layers_are_named(evidence: Evidence) -> None:
    found = evidence.int8.sensitivity
    assert found
    overall, divergent, noisiest, top1 = advice.sensitivity(found)
    assert overall == (
        "On 64 validation images, top-1 is 95.00 % in fp32 and 93.00 % with all layers in int8 (simulated: histogram "
        "ranges, weights per channel of 8 bits, in 1 layer of 7, as with engine fx)."
    )
    assert divergent == (
        "Quantizing only `network.0` moves the class probabilities most: their mean Kullback-Leibler divergence from "
        "fp32 is 0.025 nats then, and 0.031 with all layers in int8."
    )
    assert noisiest == "The output of `network.0` has the lowest signal-to-noise ratio (31.5 dB)."
    assert top1 == (  # 1 image lost of 64, and 1 gained: the largest difference, and no finding
        "No layer, alone in int8 or alone in fp32, changes top-1 beyond chance on these images (McNemar's exact test, "
        "corrected for 2 layers)."
    )
    silent = tuple(replace(layer, sqnr_db=None, kl_only_int8_nats=0.0) for layer in found.layers)
    said = advice.sensitivity(replace(found, layers=silent))
    assert len(said) == 3 and said[1] == "No layer alone in int8 moves the class probabilities."
    other = replace(found, per_channel=False, observer="minmax", engines=("pt2e", "onnx"))
    eight = tuple(replace(layer, weight_bits=8) for layer in found.layers)
    overall = advice.sensitivity(replace(other, layers=eight))[0]
    assert "minmax ranges, weights per layer of 8 bits, as with engine pt2e or onnx)" in overall


def test_a_layer_that_costs_more_than_chance_does(evidence: Evidence) -> None:
    found = evidence.int8.sensitivity
    assert found
    worse = replace(found.layers[0], only_int8_lost_images=10, top1_only_int8_percent=79.38)
    better = replace(found.layers[1], only_fp32_gained_images=9, top1_only_fp32_percent=96.0)
    assert advice.sensitivity(replace(found, layers=(worse, found.layers[1])))[-1] == (
        "Beyond chance (McNemar's exact test, corrected for 2 layers), alone in int8 lowers top-1: `network.0` "
        "(79.38 %)."
    )
    assert advice.sensitivity(replace(found, layers=(worse, better)))[-1].endswith(
        "(79.38 %); alone in fp32 raises it above that of all layers in int8: `network.3` (96.00 %)."
    )


def test_a_result_of_an_earlier_version_has_no_divergence() -> None:
    text = (
        '{"layers": [{"layer": "a", "sqnr_db": 40.0, "top1_only_int8_percent": 70.0, "top1_only_fp32_percent": 95.0}], '
        '"fp32_top1_percent": 95.0, "int8_top1_percent": 95.0, "images": 1000, "observer": "minmax", '
        '"per_channel": true}'
    )
    overall, noisiest = advice.sensitivity(from_json(SensitivityResult, text))
    assert overall.startswith("On 1,000 validation images") and overall.endswith("weights per channel).")
    assert "`a` has the lowest signal-to-noise ratio" in noisiest


# --- budget


def _with_budget(
    evidence: Evidence, tries: tuple[BudgetTry, ...], met: bool, kept: tuple[str, ...], cost: BudgetCost | None = None
) -> list[str]:
    quantize = replace(evidence.int8.quantize, kept_layers=kept)
    budget = BudgetResult(0.5, tries, met)
    return advice.budget(with_int8(evidence, quantize=quantize, budget=budget, budget_cost=cost))


def test_without_a_budget_nothing_is_said(evidence: Evidence) -> None:
    assert advice.budget(evidence) == []


def test_a_budget_met_at_once(evidence: Evidence) -> None:
    assert _with_budget(evidence, (BudgetTry((), 0.25),), True, ()) == [
        "The budget of 0.5 points on validation images is met after 1 try; 0 layers stay fp32.",
        "With all layers in int8, top-1 falls by 0.25 points there.",
    ]


def test_a_budget_met_with_the_layers_that_were_asked_for(evidence: Evidence) -> None:
    assert _with_budget(evidence, (BudgetTry(("network.0",), -0.25),), True, ("network.0",)) == [
        "The budget of 0.5 points on validation images is met after 1 try; 1 layer stays fp32: network.0.",
        "With all other layers in int8, top-1 rises by 0.25 points there.",
    ]


def test_a_budget_that_no_layer_helps_to_meet(evidence: Evidence) -> None:
    """The first try was the best: its drop is what the version has, not that of the last."""
    tries = (BudgetTry((), 1.0), BudgetTry(("network.0",), 1.5), BudgetTry(("network.0", "network.3"), 2.0))
    first, drop = _with_budget(evidence, tries, False, ())
    assert first == "The budget of 0.5 points on validation images **is not met** after 3 tries; 0 layers stay fp32."
    assert drop == "With all layers in int8, top-1 falls by 1.00 points there."


def test_a_budget_that_the_images_cannot_show(evidence: Evidence) -> None:
    budget = BudgetResult(0.5, (BudgetTry((), 0.25, 1.5),), False, images=144)
    first, few, drop = advice.budget(with_int8(evidence, budget=budget))
    assert "**is not met** after 1 try" in first
    assert few == (
        "144 validation images cannot show so small a drop: even where no image changes, the upper end of the 95 % "
        "interval, which counts, is 1.34 points."
    )
    assert drop.endswith("top-1 falls by 0.25 points there (upper end of the 95 % interval of the drop +1.50).")


@pytest.mark.parametrize(("met", "words"), [(True, "is met"), (False, "**is not met**")])
def test_what_layers_in_fp32_cost(evidence: Evidence, met: bool, words: str) -> None:
    kept = ("network.0", "network.3")
    cost = BudgetCost(450_000, 700_000, {1: Ratio(1.25, 1.2, 1.3), 8: Ratio(1.01, 0.99, 1.03)}, (1,))
    tries = (BudgetTry((), 1.0), BudgetTry(kept[:1], 0.75), BudgetTry(kept, 0.25 if met else 0.7))
    assert _with_budget(evidence, tries, met, kept, cost) == [
        f"The budget of 0.5 points on validation images {words} after 3 tries; 2 layers stay fp32: network.0, "
        "network.3.",
        "That costs 0.250 MB, and time: 1.25x (1.20 to 1.30) at batch size 1, 1.01x (0.99 to 1.03) at batch size 8 "
        "(cannot tell apart) as long as with all layers in int8 (both timed in turns in the process that quantized "
        "them).",
    ]
