"""The gate: every limit alone, values on the limit, versions that do not reload, values that are no numbers; and the
comparison with the champion."""

from dataclasses import replace

import pytest
from conftest import latency_row

from qexp.config import GateConfig
from qexp.evaluation import Accuracy, Comparison, share_interval
from qexp.gate import GateResult, decide_gate, decide_succession
from qexp.latency import LatencyResult, Ratio

LIMITS = GateConfig(max_top1_drop=1.0, min_size_ratio=3.0, min_speedup=1.5)
NO_LIMITS = GateConfig(max_top1_drop=100, min_size_ratio=0, min_speedup=0)
DROP = Comparison(0.25, -0.25, 0.75, 0.0, 99.0, 5, 3, 10_000)


def _decide(
    limits: GateConfig = LIMITS,
    high: float = 0.75,
    size_ratio: float = 3.9,
    low: float = 2.25,
    verified: bool = True,
    top1: float = 90.0,
) -> GateResult:
    drop = replace(DROP, top1_drop_high_points=high)
    return decide_gate(limits, Accuracy(top1, 99.0, 10_000), drop, size_ratio, (8, Ratio(2.5, low, 2.75)), verified)


def test_all_limits_kept() -> None:
    result = _decide()
    assert result.passed
    assert result.reasons == (
        "top-1 drop 0.25 points, upper end 0.75 (at most 1)",
        "size ratio 3.9 (at least 3)",
        "speed-up 2.5 at batch size 8, lower end 2.25 (at least 1.5)",
    )
    assert result.summary == "passed: " + "; ".join(result.reasons)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"high": 1.25}, "top-1 drop 0.25 points, upper end 1.25 (too high by 0.25) is not at most 1"),
        ({"size_ratio": 2.5}, "size ratio 2.5 (too low by 0.5) is not at least 3"),
        (
            {"low": 1.4},
            "speed-up 2.5 at batch size 8, lower end 1.4 (too low by 0.1) is not at least 1.5",
        ),
        ({"high": 70.25}, "top-1 drop 0.25 points, upper end 70.25 (too high by 69) is not at most 1"),
        ({"verified": False}, "a version does not reload bit for bit"),
    ],
)
def test_each_limit_alone_fails_the_gate(changed: dict[str, float], reason: str) -> None:
    result = _decide(**changed)
    assert not result.passed
    assert result.reasons == (reason,)
    assert result.summary == f"failed: {reason}"


@pytest.mark.parametrize("changed", [{"high": 1.0}, {"size_ratio": 3.0}, {"low": 1.5}])
def test_a_value_on_its_limit_passes(changed: dict[str, float]) -> None:
    assert _decide(**changed).passed


@pytest.mark.parametrize(
    ("changed", "rounded"),
    [
        ({"high": 1.001}, "upper end 1.00 "),
        ({"size_ratio": 2.999}, "ratio 3.00 "),
        ({"low": 1.499}, "lower end 1.50 "),
    ],
)
def test_a_value_just_beyond_its_limit_fails_and_does_not_look_like_it(changed: dict[str, float], rounded: str) -> None:
    """`drop 1.00 points is not at most 1` tells nobody why."""
    result = _decide(**changed)
    assert not result.passed
    assert rounded not in result.summary


def test_all_reasons_are_named() -> None:
    result = _decide(high=5.0, size_ratio=1.0, low=0.5, verified=False)
    assert len(result.reasons) == 4


def test_unverified_versions_never_pass() -> None:
    assert _decide(NO_LIMITS).passed
    assert not _decide(NO_LIMITS, verified=False).passed


def test_the_configured_limits_count() -> None:
    assert not _decide(GateConfig(max_top1_drop=0.25)).passed
    assert not _decide(GateConfig(min_size_ratio=4)).passed
    assert not _decide(GateConfig(min_speedup=2.5)).passed


def test_a_negative_limit_asks_for_a_better_int8_model() -> None:
    assert not _decide(GateConfig(max_top1_drop=-0.1), high=0.0).passed
    assert _decide(GateConfig(max_top1_drop=-0.1), high=-0.2).passed


@pytest.mark.parametrize("name", ["high", "size_ratio", "low"])
def test_a_value_that_is_no_number_fails(name: str) -> None:
    result = _decide(**{name: float("nan")})
    assert not result.passed and "nan" in result.summary


def test_a_network_at_chance_fails_where_a_floor_is_set() -> None:
    assert _decide(NO_LIMITS, top1=10.0).passed
    result = _decide(NO_LIMITS.model_copy(update={"min_top1": 50.0}), top1=10.0)
    least, _ = share_interval(10.0, 10_000)
    expected = f"int8 top-1 10 %, lower end {least:.4g} (too low by {50 - least:.2g}) is not at least 50"
    assert not result.passed and result.reasons == (expected,)


def test_the_floor_is_held_against_the_lower_end() -> None:
    floor = GateConfig(max_top1_drop=100, min_size_ratio=0, min_speedup=0, min_top1=90.0)
    assert not _decide(floor, top1=90.5).passed
    assert _decide(floor, top1=90.7).passed


def test_limits_of_one_model() -> None:
    gate = GateConfig(min_top1=50, models={"vgg16-cifar10-int8": {"max_top1_drop": 0.5}})
    own = gate.of("vgg16-cifar10-int8")
    assert (own.max_top1_drop, own.min_size_ratio, own.min_top1) == (0.5, 3.0, 50)
    assert gate.of("smallnet-cifar10-int8") == gate
    assert not _decide(own).passed and _decide(gate).passed


# --- against the champion


def _latency(candidate_ms: dict[int, float], noise_percent: float = 1.0, rounds: int = 20) -> LatencyResult:
    """The champion takes 1 ms at every batch size."""
    rows = [
        latency_row(batch, {"fp32": 4.0, "champion": 1.0, "candidate": ms}, rounds=rounds, noise_percent=noise_percent)
        for batch, ms in candidate_ms.items()
    ]
    return LatencyResult("fp32", tuple(rows), (), threads=2)


def _succeeds(drop: Comparison = DROP, **latency: float) -> GateResult:
    times = {1: 1.0, 8: 1.0, 64: 1.0} | {int(name.removeprefix("ms_")): ms for name, ms in latency.items()}
    return decide_succession(drop, _latency(times), "champion", "candidate")


def test_an_equal_model_may_succeed_and_so_may_a_better_one() -> None:
    assert _succeeds().passed
    better = _succeeds(replace(DROP, top1_drop_points=-2.0, top1_drop_low_points=-3.0), ms_1=0.5)
    assert better.passed
    assert better.reasons[0].startswith("top-1 -2.00 points below the champion's, 95 % interval -3.00")
    assert better.reasons[1].startswith("1.26x as fast as the champion")


def test_a_loss_of_accuracy_counts_where_the_whole_interval_shows_it() -> None:
    assert _succeeds(replace(DROP, top1_drop_points=1.0, top1_drop_low_points=-0.01)).passed
    result = _succeeds(replace(DROP, top1_drop_points=1.0, top1_drop_low_points=0.5, top1_drop_high_points=1.5))
    assert not result.passed
    lost = "top-1 1.00 points below the champion's, 95 % interval +0.50 to +1.50: worse by at least 0.5 points"
    assert result.reasons == (lost,)


def test_slower_at_one_batch_size_is_named_although_the_mean_is_better() -> None:
    result = _succeeds(ms_1=1.2, ms_8=0.5)
    (reason,) = result.reasons
    assert not result.passed and reason.startswith("at batch size 1, 1.20x as slow as the champion (")


def test_a_little_slower_at_one_batch_size_is_how_a_model_was_loaded() -> None:
    assert _succeeds(ms_8=1.04).passed


def test_a_little_slower_everywhere_is_slower() -> None:
    result = _succeeds(ms_1=1.04, ms_8=1.04, ms_64=1.04)
    (reason,) = result.reasons
    assert not result.passed and reason.startswith("0.96x as fast") and reason.endswith("slower beyond the noise")


def test_too_few_rounds_are_not_held_against_a_candidate() -> None:
    few, enough = (
        decide_succession(DROP, _latency({1: 1.5, 8: 1.5}, rounds=rounds), "champion", "candidate") for rounds in (5, 6)
    )
    assert few.passed and "fewer than 6 rounds tell no more" in few.reasons[1] and not enough.passed


def test_what_the_noise_hides_is_not_held_against_a_candidate() -> None:
    noisy = _latency({1: 1.2, 8: 1.2}, noise_percent=30)
    assert decide_succession(DROP, noisy, "champion", "candidate").passed
