"""How threads wait: asleep or spinning as asked, or as the user has chosen; where models are timed, as for a user."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qexp import api
from qexp.config import Config, LatencyConfig
from qexp.errors import InputError
from qexp.foundation import waiting
from qexp.foundation.waiting import DEFAULT, PASSIVE, VARIABLES, may_choose_waiting, wait, waiting_as
from qexp.measurement.latency import measure_latency
from qexp.pipeline import setup


@pytest.fixture(autouse=True)
def _as_at_the_start_of_a_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    with waiting_as(DEFAULT):
        yield
    torch.set_num_threads(threads)


def _idle_cpu_s() -> float:
    """CPU time of this process in ten pauses of 10 ms, each after an operation of two threads."""
    torch.set_num_threads(2)
    values, used = torch.rand(400_000), 0.0
    for _ in range(10):
        values.add_(1)
        before = time.process_time()
        time.sleep(0.01)
        used += time.process_time() - before
    return used


@pytest.mark.skipif(not may_choose_waiting(), reason="an OpenMP library in which it cannot be changed")
def test_threads_sleep_or_spin_as_asked() -> None:
    found = [_idle_cpu_s()]
    for how in (PASSIVE, DEFAULT, PASSIVE):
        wait(how)
        assert waiting.waiting() == how
        found.append(_idle_cpu_s())
    first, asleep, spinning, asleep_again = found
    assert max(asleep, asleep_again) < 0.3 * min(first, spinning)


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "ACTIVE")
    wait(PASSIVE)
    assert not may_choose_waiting() and not _holders()
    assert waiting.waiting() == ("active" if variable == "OMP_WAIT_POLICY" else DEFAULT)


def _holders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "qexp-waiting"]


def test_threads_spin_where_the_system_grants_no_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU's OpenMP library would end the process."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not waiting._can_start(waiting.CPUS)


def test_commands_sleep_but_time_models_as_a_user_runs_them() -> None:
    setup._use_threads(Config(threads=torch.get_num_threads()))
    seen: list[str] = []
    options = LatencyConfig(batch_sizes=[1], loads=1, min_repeats=2, min_seconds=0.0, warmup=1)
    measure_latency(lambda batch: {"model": lambda: seen.append(waiting.waiting())}, "model", "model", options)
    assert set(seen) == {DEFAULT}
    assert waiting.waiting() == (PASSIVE if may_choose_waiting() else DEFAULT)


def test_a_job_in_python_leaves_threads_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*given: object) -> None:
        setup._use_threads(Config(threads=torch.get_num_threads()))
        raise InputError("no")

    monkeypatch.setattr("qexp.pipeline.check.check", run)
    with pytest.raises(InputError, match="no"):
        api.check(torch.nn.Flatten(), tmp_path)
    assert waiting.waiting() == DEFAULT
