"""Progress of long work on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from qexp.errors import hide_passwords

QUIET = os.environ.get("RANK", "0") != "0"  # of several training processes, the first speaks
T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """One plain line on standard error; standard output is kept for the JSON line at the end."""
    if QUIET:
        return
    tqdm.write(hide_passwords(line), file=sys.stderr)
    sys.stderr.flush()


def track(items: Iterable[T], label: str, total: int, initial: int = 0) -> Iterator[T]:
    """Pass `items` on, showing how many of `total` are done, `initial` of them before."""
    if sys.stderr.isatty() and not QUIET:
        yield from tqdm(items, desc=label, total=total, initial=initial, leave=False, file=sys.stderr)
        return
    last = time.monotonic()
    for done, item in enumerate(items, initial):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{label}: {done}/{total}")
        yield item
