"""A look, every minute, at whether a training whose threads spin is still faster so; loop.py runs its steps through it.

It was when the training began (execution.py). Once another process keeps a core busy, it may be several times slower,
for as long as the training lasts. How threads wait changes no bit, so that steps of the training itself can be timed
both ways.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qexp.foundation.waiting import DEFAULT, PASSIVE, may_choose_waiting, wait, waiting, waiting_as
from qexp.progress import say

EVERY_S = 60.0  # between two looks; at each, a few steps are slower than they could be
ROUNDS = 3  # steps a look with threads that sleep, and as many with threads that spin, in turns


@dataclass
class Spinning:
    """Lets threads sleep for good once that is faster. `clock` gives seconds."""

    clock: Callable[[], float] = time.perf_counter
    looked: float = field(init=False)
    steps_s: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.looked, self.steps_s = self.clock(), {PASSIVE: [], DEFAULT: []}

    def run(self, step: Callable[[], None]) -> None:
        """Do a step of the training; where it is time to, as a part of a look."""
        started = self.clock()
        if waiting() == PASSIVE or started - self.looked < EVERY_S or not may_choose_waiting():
            step()
            return
        how = min(self.steps_s, key=lambda how: len(self.steps_s[how]))
        with waiting_as(how):
            step()
        self.steps_s[how].append(self.clock() - started)
        if len(self.steps_s[DEFAULT]) == ROUNDS:
            asleep, spinning = (statistics.median(self.steps_s[how]) for how in (PASSIVE, DEFAULT))
            self._start_anew()
            if asleep < spinning:
                wait(PASSIVE)
                say(f"threads no longer spin while they wait: steps are {spinning / asleep:.1f} times as fast so")
