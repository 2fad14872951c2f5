"""The gate: every limit alone, values on the limit, versions that do not reload, values that are no numbers."""

import pytest

from qexp.config import GateConfig
from qexp.gate import GateResult, decide_gate

LIMITS = GateConfig(max_top1_drop=1.0, min_size_ratio=3.0, min_speedup=1.5)
GOOD = {"top1_drop_points": 0.5, "size_ratio": 3.9, "smallest_speedup": 2.25, "verified": True}


def _decide(limits: GateConfig = LIMITS, **changed: float) -> GateResult:
    return decide_gate(limits, **{**GOOD, **changed})


def test_all_limits_kept() -> None:
    result = _decide()
    assert result.passed
    assert result.reasons == (
        "top-1 drop 0.5 points (at most 1)",
        "size ratio 3.9 (at least 3)",
        "smallest speed-up 2.25 (at least 1.5)",
    )
    assert result.summary == "passed: " + "; ".join(result.reasons)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"top1_drop_points": 1.25}, "top-1 drop 1.25 points is not at most 1"),
        ({"size_ratio": 2.5}, "size ratio 2.5 is not at least 3"),
        ({"smallest_speedup": 1.4}, "smallest speed-up 1.4 is not at least 1.5"),
        ({"verified": False}, "a version does not reload bit for bit"),
    ],
)
def test_each_limit_alone_fails_the_gate(changed: dict[str, float], reason: str) -> None:
    result = _decide(**changed)
    assert not result.passed
    assert result.reasons == (reason,)
    assert result.summary == f"failed: {reason}"


@pytest.mark.parametrize("changed", [{"top1_drop_points": 1.0}, {"size_ratio": 3.0}, {"smallest_speedup": 1.5}])
def test_a_value_on_its_limit_passes(changed: dict[str, float]) -> None:
    assert _decide(**changed).passed


@pytest.mark.parametrize(
    ("changed", "rounded"),
    [
        ({"top1_drop_points": 1.001}, "drop 1.00 points"),
        ({"size_ratio": 2.999}, "ratio 3.00 "),
        ({"smallest_speedup": 1.499}, "speed-up 1.50 "),
    ],
)
def test_a_value_just_beyond_its_limit_fails_and_does_not_look_like_it(changed: dict[str, float], rounded: str) -> None:
    """`drop 1.00 points is not at most 1` tells nobody why."""
    result = _decide(**changed)
    assert not result.passed
    assert rounded not in result.summary


def test_all_reasons_are_named() -> None:
    result = _decide(top1_drop_points=5.0, size_ratio=1.0, smallest_speedup=0.5, verified=False)
    assert len(result.reasons) == 4


def test_unverified_versions_never_pass() -> None:
    anything = GateConfig(max_top1_drop=100, min_size_ratio=0, min_speedup=0)
    assert _decide(anything).passed
    assert not _decide(anything, verified=False).passed


def test_the_configured_limits_count() -> None:
    assert not _decide(GateConfig(max_top1_drop=0.25)).passed
    assert not _decide(GateConfig(min_size_ratio=4)).passed
    assert not _decide(GateConfig(min_speedup=2.5)).passed


def test_a_negative_limit_asks_for_a_better_int8_model() -> None:
    assert not _decide(GateConfig(max_top1_drop=-0.1), top1_drop_points=0.0).passed
    assert _decide(GateConfig(max_top1_drop=-0.1), top1_drop_points=-0.2).passed


@pytest.mark.parametrize("name", ["top1_drop_points", "size_ratio", "smallest_speedup"])
def test_a_value_that_is_no_number_fails(name: str) -> None:
    result = _decide(**{name: float("nan")})
    assert not result.passed and "nan" in result.summary
