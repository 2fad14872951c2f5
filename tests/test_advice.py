"""What to ship: every sentence with values that make it true and with the opposite ones."""

from dataclasses import replace

import pytest
from conftest import latency_row, with_gate, with_int8, with_rows

from qexp import advice
from qexp.evaluation import Accuracy
from qexp.evidence import Bf16Evidence, BudgetCost, Evidence, Judged, from_json
from qexp.gate import GateResult
from qexp.latency import Ratio
from qexp.quantization.budget import BudgetResult, BudgetTry
from qexp.quantization.sensitivity import SensitivityResult

FAILED = GateResult(False, ("top-1 drop 2.5 points is not at most 1",))
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


def test_ship_what_passed_and_is_faster_than_everything_else(evidence: Evidence) -> None:
    first, against = advice.recommendation(evidence)
    assert first == (
        "**Ship `models:/smallnet-digits-int8/1`** (int8_fx): it passes the gate (top-1 falls by 0.50 points, 4.00x "
        "smaller) and is faster than every model that is not int8 (fp32, fp32_traced, bf16, fp32_onnx) at every batch "
        "size."
    )
    assert against.startswith("Against the fastest model that is not int8 (fp32_onnx, bf16), int8 is ")
    assert against.endswith(" as fast.") and "2.0" in against  # 0.5 / 0.25 ms, 1.6 / 0.8, 30 / 10


def test_what_bf16_costs_in_accuracy(evidence: Evidence) -> None:
    bf16 = Bf16Evidence(900_000, Accuracy(93.9, 98.5, 359), 0.1, -0.2, 0.4)
    measured = replace(evidence, measured=replace(evidence.measured, bf16=bf16))
    before, (*_, said) = advice.recommendation(evidence), advice.recommendation(measured)
    assert said == (
        "In bf16, top-1 on the test images falls by 0.10 points (95 % interval of the drop -0.20 to +0.40 points), and "
        "the file has 0.900 MB."
    )
    assert advice.recommendation(measured)[:-1] == before


def test_a_gate_that_failed_comes_before_all_speed(evidence: Evidence) -> None:
    first, against = advice.recommendation(with_gate(evidence, FAILED))
    failed = "**Do not ship int8 yet**: the gate failed: top-1 drop 2.5 points is not at most 1."
    assert first == f"{failed} Ship the fp32 version, `{evidence.fp32.version_uri}`."
    assert "as fast" in against


def test_faster_than_fp32_alone_pays_in_size(evidence: Evidence) -> None:
    """bf16 takes as long as int8 or less, but is no version that could be loaded: int8 is the better one of two."""
    level = {1: {"bf16": 0.9, "int8_fx": 1.0}, 8: {"bf16": 1.0, "int8_fx": 1.0}}
    first, against = advice.recommendation(_with_times(evidence, level))
    assert first.startswith("**Ship `models:/smallnet-digits-int8/1`** (int8_fx) **for its size**: it passes the gate")
    assert "is 4.00x smaller than the fp32 version, and int8 is faster than fp32 at every batch size: 3.9" in first
    assert first.endswith(
        "Yet bf16 of the same weights, which is no registered version, is as fast or faster at every batch size: if "
        "you can serve that, int8 does not pay in time."
    )
    assert "(bf16), int8 is 0.9" in against


def test_as_slow_as_fp32_does_not_pay(evidence: Evidence) -> None:
    level = {1: {"bf16": 0.9, "int8_fx": 4.0}, 8: {"bf16": 1.0, "int8_fx": 4.0}}
    assert advice.recommendation(_with_times(evidence, level))[0] == (
        "**int8 does not pay in time here**: at no batch size is it faster than the fastest model that is not int8, "
        f"beyond the noise. It saves size alone (4.00x). Ship the fp32 version, `{evidence.fp32.version_uri}`."
    )


def test_as_fast_as_bf16_is_no_noise(evidence: Evidence) -> None:
    level = {1: {"bf16": 1.0, "int8_fx": 1.0}, 8: {"bf16": 1.0, "int8_fx": 1.0}}
    assert "** (int8_fx) **for its size**: " in advice.recommendation(_with_times(evidence, level))[0]


def test_few_rounds_are_no_noise(evidence: Evidence) -> None:
    few = with_rows(evidence, latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}, rounds=5))
    assert advice.recommendation(few)[0] == (
        "**Measure with `--min-repeats 6` or more**: fewer rounds tell no two models apart. int8 is 4.00x smaller."
    )


def test_a_better_version_beside_the_one_asked_for(evidence: Evidence) -> None:
    passed = evidence.gate
    asked = _with_other(evidence, {1: 0.5, 8: 0.5}, passed, 0.0)
    first, *_ = advice.recommendation(asked)
    assert first == (
        f"**Ship `{OTHER}`** (int8_onnx) **rather than this version**: it passes the gate too, and is faster than "
        "int8_fx, beyond the noise, at more batch sizes than slower."
    )
    assert advice.recommendation(_with_other(evidence, {1: 1.0}, passed, 0.0))[0].startswith("**Ship `models:/smal")
    assert advice.recommendation(with_gate(asked, FAILED))[0].startswith("**Do not ship int8 yet**")


def test_noise_too_high_to_tell(evidence: Evidence) -> None:
    close = {1: {"fp32_traced": 1.05, "int8_fx": 1.0}, 8: {"fp32_traced": 0.96, "int8_fx": 1.0}}
    first = advice.recommendation(_with_times(evidence, close, noise_percent=10))[0]
    assert first.startswith("**Measure again on a quiet machine**: the noise is too high to tell int8 from the fastest")
    assert "It is 4.00x smaller." in first
    quiet = advice.recommendation(_with_times(evidence, close, noise_percent=0.5))[0]
    assert quiet.startswith("**Ship `models:/smallnet-digits-int8/1`**") and "at batch size 1." in quiet


def test_where_int8_does_not_pay_is_said(evidence: Evidence) -> None:
    times = {
        1: {"bf16": 1.5, "int8_fx": 1.0},
        8: {"bf16": 1.0, "int8_fx": 1.0},
        16: {"bf16": 2.0, "int8_fx": 1.0},
        128: {"bf16": 0.5, "int8_fx": 1.0},
    }
    first, against, slower, same = advice.recommendation(_with_times(evidence, times))
    assert first.endswith("model that is not int8 (fp32, bf16) at batch size 1, 16.")
    assert slower == "int8 does not pay in time at batch size 128: bf16 is faster there."
    assert same == "At batch size 8 int8 is indistinguishable from the fastest of them."
    assert "int8 is 0.5" in against


def test_without_baselines_only_fp32_is_named(evidence: Evidence) -> None:
    first, against = advice.recommendation(_with_times(evidence, {1: {"int8_fx": 1.0}}))
    assert "faster than every model that is not int8 (fp32) at every batch size" in first
    assert "bf16" not in first + against


def test_other_kernels_of_int8_are_no_float_models(evidence: Evidence) -> None:
    timed = _with_times(evidence, {1: {"bf16": 2.0, "int8_fx": 1.0, "int8_fx_onednn": 0.5}})
    both = replace(timed.measured, contenders={evidence.int8.version_uri: ("int8_fx", "int8_fx_onednn")})
    assert advice.float_models(replace(timed, measured=both)) == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("other_ms", "speed"),
    [
        ({1: 2.0, 8: 2.0}, "slower at batch size 1, 8"),
        ({1: 0.5, 8: 0.5}, "faster at batch size 1, 8"),
        ({1: 1.0}, "indistinguishable at batch size 1"),
        (
            {1: 2.0, 8: 0.5, 16: 1.0},
            "slower at batch size 1; faster at batch size 8; indistinguishable at batch size 16",
        ),
    ],
)
def test_other_versions_are_compared_with_the_chosen_one(
    evidence: Evidence, other_ms: dict[int, float], speed: str
) -> None:
    *_, about = advice.recommendation(_with_other(evidence, other_ms, evidence.gate, -0.25))
    assert about == (
        f"`{OTHER}` (int8_onnx): top-1 rises by 0.25 points, 0.500 MB, passes the gate; compared with int8_fx it is "
        f"{speed}."
    )


def test_another_version_that_failed(evidence: Evidence) -> None:
    *_, about = advice.recommendation(_with_other(evidence, {1: 0.5}, FAILED, 2.5))
    assert "top-1 falls by 2.50 points, 0.500 MB, does not pass the gate" in about
    first = advice.recommendation(_with_other(evidence, {1: 0.5}, FAILED, 2.5))[0]
    assert first.startswith("**Ship `models:/smallnet-digits-int8/1`**")  # the faster one is no float model


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
