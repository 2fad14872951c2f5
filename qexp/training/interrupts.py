"""SIGINT and SIGTERM as a request that training checks between two steps, instead of an exception at any point."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qexp.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Which signal has asked to stop, if one has."""

    def __init__(self) -> None:
        self.signal = 0

    def act(self) -> None:
        """Stop as the signal would have: KeyboardInterrupt, or SystemExit with 128 + its number."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.signal)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block the first signal only sets the request; a second one acts at once.

    Outside the main thread, which alone may set handlers, the request stays unset.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal:
            request.act()
        request.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ or number == signal.SIGINT:  # the launcher's SIGTERM is no user's
            say(f"{signal.Signals(number).name}: stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.signal:  # it came after the last look at it
        request.act()
