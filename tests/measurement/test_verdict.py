"""The one verdict: from the gate and the speed, the same wherever it is shown."""

from dataclasses import replace

import pytest
from conftest import latency_row, with_gate, with_rows, with_speedups

from qexp.measurement.gate import GateResult, Succession
from qexp.measurement.latency import Ratio
from qexp.measurement.verdict import Verdict, decide_verdict
from qexp.report import sentences
from qexp.report.page import render_markdown
from qexp.report.results import Evidence, Judged

PASSED = GateResult("passed", ("speed-up 1.2 (at least 1)",))
SLOW = GateResult("failed", ("speed-up 0.99 is not at least 1",), ("min_speedup",))
INACCURATE = GateResult("failed", ("top-1 drop 3 is not at most 2",), ("max_top1_drop",))
BUSY = GateResult("not measured well enough", ("the machine was busy",))
GUESSING = GateResult("failed", ("fp32 top-1 is not better than guessing",), ("trained",))
FASTER, LEVEL, SLOWER = Ratio(1.2, 1.1, 1.3), Ratio(1.0, 0.9, 1.1), Ratio(0.8, 0.7, 0.9)
INT8, FLOAT = "models:/smallnet-digits-int8/1", "bf16"


@pytest.mark.parametrize(
    ("gate", "ratio", "word", "ship"),
    [
        (PASSED, FASTER, "ship int8", INT8),
        (PASSED, LEVEL, "ship int8 for its size only", INT8),
        (PASSED, SLOWER, "ship int8 for its size only", INT8),  # by a gate that asks for no speed
        (SLOW, LEVEL, "ship int8 for its size only", INT8),
        (SLOW, SLOWER, "keep float", FLOAT),
        (SLOW, FASTER, "ship int8 for its size only", INT8),  # in the mean, but not shown at each batch size
        (SLOW, Ratio(1.0, 0.5, 2.0), "ship int8 for its size only", INT8),
        (INACCURATE, FASTER, "keep float", FLOAT),
        (BUSY, FASTER, "not measured well enough", None),
        (GUESSING, FASTER, "not trained", None),
    ],
)
def test_verdict(gate: GateResult, ratio: Ratio, word: str, ship: str | None) -> None:
    found = decide_verdict(gate, ratio, INT8, FLOAT)
    assert (found.word, found.ship) == (word, ship)
    assert gate.reasons[0] in found.reason


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (FASTER, "1.20x as fast as the fastest float (1.10 to 1.30): faster"),
        (LEVEL, ": not shown to be faster"),
        (SLOWER, ": slower"),
    ],
)
def test_a_verdict_for_size_says_how_int8_compares_in_time(ratio: Ratio, words: str) -> None:
    permissive = PASSED if ratio is not FASTER else SLOW
    assert words in decide_verdict(permissive, ratio, INT8, FLOAT).reason


def test_a_model_that_guesses_is_not_trained_whatever_else_failed() -> None:
    both = replace(GUESSING, failed_limits=("trained", "min_speedup"))
    assert decide_verdict(both, SLOWER, INT8, FLOAT).word == "not trained"


@pytest.mark.parametrize("gate", [PASSED, SLOW, INACCURATE, BUSY, GUESSING])
def test_the_same_verdict_stands_everywhere(evidence: Evidence, gate: GateResult) -> None:
    found = with_gate(evidence, gate)
    words, page = sentences.verdict(found), render_markdown(found)
    assert words.startswith(f"**{found.verdict.word.capitalize()}.** ")
    assert sentences.answer(found).startswith(words) and page.count(words) == 1
    assert found.decision["verdict"] == found.verdict.word and found.decision["ship"] == found.verdict.ship
    for other in ("Ship int8", "Keep float", "Not measured well enough", "Not trained", "Ship int8 for its size only"):
        assert (f"**{other}.**" in page) == (other == found.verdict.word.capitalize())


def test_what_is_kept_is_the_fastest_float_there_is(evidence: Evidence) -> None:
    """Not the registered program where another runtime computes the same weights in half the time."""
    found = with_gate(evidence, INACCURATE)
    assert found.verdict.ship == "fp32_onnx, made from models:/smallnet-digits-fp32/1"
    alone = with_rows(found, latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}))
    assert alone.verdict.ship == "models:/smallnet-digits-fp32/1"


def test_a_champion_that_stays_is_what_to_ship(evidence: Evidence) -> None:
    before, now = "models:/smallnet-digits-int8/7", "models:/smallnet-digits-int8/9"
    stays = Succession(False, ("as good, but in nothing better",))
    found = replace(evidence, champion=False, succession=stays, before_uri=before)
    assert (found.verdict.word, found.verdict.ship) == ("ship int8", before)
    assert replace(found, now_uri=now).verdict.ship == now
    said = sentences.verdict(found)
    assert f"Take `{before}`, which stays champion" in said and said.endswith(": as good, but in nothing better.")
    replaced = replace(found, champion=True, succession=Succession(True, ("better: size",)))
    assert replaced.verdict.ship == evidence.int8.version_uri


def test_what_was_not_compared_with_the_champion_ships_by_itself(evidence: Evidence) -> None:
    """The champion may be for another image size: its name beside the candidate's figures would mislead."""
    why = Succession(False, ("it was made with other data or another image size",), compared=False)
    found = replace(evidence, champion=False, succession=why, before_uri="models:/smallnet-digits-int8/7")
    assert found.verdict.ship == evidence.int8.version_uri
    assert "It was not compared with the champion, `models:/smallnet-digits-int8/7`" in sentences.verdict(found)


def test_a_better_version_beside_the_one_asked_for_is_what_to_ship(evidence: Evidence) -> None:
    other_uri = "models:/smallnet-digits-int8/2"
    other = Judged(replace(evidence.int8, version_uri=other_uri), "int8_onnx", evidence.gate)
    timed = with_rows(evidence, latency_row(1, {"fp32": 4.0, "int8_fx": 1.0, "int8_onnx": 0.5}))
    measured = replace(timed.measured, names=timed.measured.names | {other_uri: ("int8_onnx",)})
    both = replace(timed, versions=(*timed.versions, other), measured=measured)
    assert both.verdict.ship == other_uri and f"Take `{other_uri}` (`int8_onnx`)" in sentences.verdict(both)
    failed = replace(both, versions=(both.versions[0], replace(other, gate=INACCURATE)))
    assert failed.verdict.ship == evidence.int8.version_uri


def test_headline_figures_are_over_the_fastest_float(evidence: Evidence) -> None:
    """fp32_onnx at batch 1, 0.5 ms, and fp32_onnx at 8 and 128: bf16 is faster there, but its accuracy is not known."""
    found = evidence.headline
    assert found["smallest_speedup"] == pytest.approx(0.5 / 0.25, rel=0.02)
    assert found["largest_speedup"] == pytest.approx(60 / 10, rel=0.02)
    assert found["mean_speedup"] == pytest.approx((2 * 3 * 6) ** (1 / 3), rel=0.02)
    assert found["smallest_speedup_over_fp32"] == pytest.approx(4, rel=0.02)
    with_bf16 = replace(evidence, floats=(*evidence.floats, "bf16"))
    assert with_bf16.headline["largest_speedup"] == pytest.approx(3, rel=0.02)


def test_a_verdict_has_all_it_needs(evidence: Evidence) -> None:
    assert isinstance(evidence.verdict, Verdict) and evidence.verdict.ships_int8
    slow = with_speedups(with_gate(evidence, INACCURATE), {1: 0.5})
    assert not slow.verdict.ships_int8
