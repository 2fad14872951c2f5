"""A bar on a terminal, plain lines elsewhere, nothing on standard output."""

import pytest

from qexp import progress


def test_items_pass_unchanged_and_lines_say_how_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(progress.track(range(3), "counting", 3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["counting: 1/3", "counting: 2/3"] and captured.out == ""


def test_lines_say_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = progress.Progress("baking", total=100, initial=10, counted=False)
    for now[0], amount in ((9, 10), (18, 10), (27, 10), (1800, 0), (1900, 60)):
        work.advance(amount)
    assert capsys.readouterr().err.splitlines() == [
        "baking: 30 %, about 63 s left",  # 70 left after 20 in 18 s
        "baking: 40 %, about 60 min left",
    ]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track("abc", "spelling", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track(range(3), "counting", 3)) == [0, 1, 2]
    assert "counting" in capsys.readouterr().err
