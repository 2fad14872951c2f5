"""Progress of long work on standard error: a bar on a terminal, plain lines with the time left elsewhere.

Every stage says what it does; what takes longer than ten seconds shows how far it is, too.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from qexp.foundation.text import printable

QUIET = os.environ.get("RANK", "0") != "0"  # of several training processes, the first speaks
T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0
_announced: list[str] = []
BAR = "{l_bar}{bar}| {elapsed}, {remaining} left"


def say(line: str) -> None:
    """One plain line on standard error; standard output is kept for the result at the end."""
    if QUIET:
        return
    clear_line()
    tqdm.write(printable(line), file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def quiet(logger_name: str, level: int = logging.ERROR) -> Iterator[None]:
    """While the block lasts, a library's logger and those below it say nothing below this level."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def clean_logs() -> None:
    """What libraries log or warn of is shown as `say` shows a line; for a program of ours, not for a user's."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*given: Any, **named: Any) -> logging.LogRecord:
        made = make(*given, **named)
        made.msg, made.args = printable(made.getMessage()), ()
        return made

    def warning(message: Warning | str, *given: Any, **named: Any) -> str:
        return form(printable(str(message)), *given, **named)

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning


def announce(what: str) -> None:
    """Show on a terminal what is being done, until the next line or bar; nothing elsewhere."""
    if sys.stderr.isatty() and not QUIET:
        clear_line()
        print(f"{printable(what)} …", end="", file=sys.stderr, flush=True)
        _announced.append(what)


def clear_line() -> None:
    """Take away what `announce` has shown."""
    if _announced:
        _announced.clear()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Progress:
    """How much of some work is done, as a bar on a terminal, or as a line every ten seconds elsewhere.

    Args:
        label: what the work is.
        total: all of it, in any unit: items, or the seconds that it is expected to take.
        initial: how much of it was done before; the time left is judged by what comes after.
        counted: whether `total` is a number of items, which lines then show; they show percent otherwise.
    """

    def __init__(self, label: str, total: float, initial: float = 0, counted: bool = True) -> None:
        self.label, self.total, self.done, self.counted = printable(label), total, initial, counted
        self._initial, self._started = initial, time.monotonic()
        self._last = self._started
        clear_line()
        bar = sys.stderr.isatty() and not QUIET
        form = None if counted else BAR
        self._bar = (
            tqdm(desc=self.label, total=total, initial=initial, leave=False, file=sys.stderr, bar_format=form)
            if bar
            else None
        )

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(min(amount, max(0, self.total - self._bar.n)))
        elif self.done < self.total and time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            share = min(1.0, self.done / self.total) if self.total else 1.0
            state = f"{self.done:g}/{self.total:g}" if self.counted else f"{100 * share:.0f} %"
            say(f"{self.label}: {state}{self._left()}")

    def _left(self) -> str:
        done, left = self.done - self._initial, self.total - self.done
        seconds = (time.monotonic() - self._started) / done * left if done > 0 else 0.0
        return f", about {in_words(seconds)} left" if seconds >= 1 else ""

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[T], label: str, total: int, initial: int = 0) -> Iterator[T]:
    """Pass `items` on, showing how many of `total` are done, `initial` of them before, and the time left."""
    progress = Progress(label, total, initial)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.close()


def in_words(seconds: float) -> str:
    """`40 s`, `3 min` or `2 h 10 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
