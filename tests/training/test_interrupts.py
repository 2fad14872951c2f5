"""Signals as requests: the first is noted, the second acts, handlers are put back."""

import os
import signal
import threading

import pytest

from qexp.training.interrupts import stop_requests


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_first_signal_is_noted_and_the_second_acts(number: int, error: type[BaseException]) -> None:
    before, noted = signal.getsignal(number), []
    with pytest.raises(error) as raised, stop_requests() as request:
        assert not request.signal
        os.kill(os.getpid(), number)
        noted.append(request.signal)
        os.kill(os.getpid(), number)
        noted.append(0)
    assert noted == [number]
    assert number == signal.SIGINT or raised.value.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before


def test_request_that_nobody_looked_at_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def look() -> None:
        with stop_requests() as request:
            seen.extend([signal.getsignal(signal.SIGINT), request.signal])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before, 0]
