"""What else the machine does while something is timed: the CPU time of others on the cores of this process."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BUSY_FIELDS = ("user", "nice", "system", "irq", "softirq", "steal")  # of /proc/stat, in seconds once divided
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Activity:
    """CPU time on the cores that this process may use, in `wall_s` seconds of wall time.

    `others_cpu_s` is what others took of it, other virtual machines included as far as the kernel knows of them.
    """

    wall_s: float
    own_cpu_s: float
    others_cpu_s: float
    cores: int
    threads: int

    @property
    def busy_percent(self) -> float:
        """Share of the timed cores that others took: what did not fit on the cores that the threads leave free."""
        left_free = max(0, self.cores - self.threads)
        return 100 * max(0.0, self.others_cpu_s / self.wall_s - left_free) / min(self.threads, self.cores)


def watch_machine(threads: int, stat: Path = Path("/proc/stat")) -> Callable[[], Activity | None]:
    """Begin to watch; what is returned ends that, and says what happened since. Off Linux it says nothing (None)."""
    if not hasattr(os, "sched_getaffinity") or not stat.is_file():
        return lambda: None
    cores = os.sched_getaffinity(0)
    wall, own, busy = time.perf_counter(), time.process_time(), _busy_s(stat, cores)

    def ended() -> Activity:
        own_s = time.process_time() - own
        others_s = max(0.0, _busy_s(stat, cores) - busy - own_s)
        return Activity(time.perf_counter() - wall, own_s, others_s, len(cores), threads)

    return ended


def _busy_s(stat: Path, cores: set[int]) -> float:
    """Seconds in which these cores were not idle, since the machine was started."""
    ticks = 0
    for line in stat.read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            by_field = dict(zip(FIELDS, map(int, values), strict=False))
            ticks += sum(by_field.get(field, 0) for field in BUSY_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")
