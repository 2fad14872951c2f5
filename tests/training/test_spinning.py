"""When threads stop to spin: once steps are faster without, at the next look."""

from collections.abc import Iterator

import pytest

from qexp.foundation.waiting import DEFAULT, PASSIVE, VARIABLES, may_choose_waiting, waiting, waiting_as
from qexp.training.spinning import EVERY_S, ROUNDS, Spinning


@pytest.fixture(autouse=True)
def _threads_spin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if not may_choose_waiting():
        pytest.skip("an OpenMP library in which it cannot be changed")
    with waiting_as(DEFAULT):
        yield


def _steps(spinning_s: float, seconds: float, asleep_s: float = 1.0) -> list[str]:
    """How threads waited in the steps of a training that lasts so long."""
    now, seen = 0.0, list[str]()

    def step() -> None:
        nonlocal now
        seen.append(waiting())
        now += asleep_s if waiting() == PASSIVE else spinning_s

    spinning = Spinning(clock=lambda: now)
    while now < seconds:
        spinning.run(step)
    return seen


def test_threads_sleep_once_that_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    seen = _steps(spinning_s=4.0, seconds=2 * EVERY_S)
    before = round(EVERY_S / 4)
    assert seen[: before + 2 * ROUNDS] == [DEFAULT] * before + [PASSIVE, DEFAULT] * ROUNDS
    assert set(seen[before + 2 * ROUNDS :]) == {PASSIVE} == {waiting()}
    assert "4.0 times as fast" in capsys.readouterr().err


def test_threads_spin_as_long_as_that_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    seen = _steps(spinning_s=0.5, seconds=5 * EVERY_S)
    assert seen.count(PASSIVE) == 4 * ROUNDS and waiting() == DEFAULT
    assert not capsys.readouterr().err


def test_what_the_user_has_chosen_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert set(_steps(spinning_s=4.0, seconds=2 * EVERY_S)) == {"active"}
