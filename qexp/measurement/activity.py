"""How busy the machine is while models are timed: CPU time that other processes take on the cores of this one."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qexp.foundation.quantities import NotNegative, Some, Timed
from qexp.measurement.host import read_cpus, throttled_s

BUSY_FIELDS = ("user", "nice", "system", "irq", "softirq", "steal")  # of /proc/stat, in seconds once divided
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Activity:
    """CPU time on the CPUs that this process may use, in `wall_s` seconds of wall time.

    `others_cpu_s` is what others took of it, other virtual machines included as far as the kernel knows of them.
    `cores` are physical ones: who takes the other hyper-thread of a core takes of that core. `throttled_s` is how long
    this process's control group had to wait, because it had used up its CPU quota.
    """

    wall_s: Timed
    own_cpu_s: NotNegative
    others_cpu_s: NotNegative
    cores: Some
    threads: Some
    throttled_s: NotNegative = 0.0

    @property
    def busy_percent(self) -> float:
        """Share of the timed cores that others or the quota took: of others, what did not fit on the cores that the
        threads leave free."""
        left_free = max(0, self.cores - self.threads)
        others = max(0.0, self.others_cpu_s / self.wall_s - left_free) / min(self.threads, self.cores)
        return 100 * (others + self.throttled_s / self.wall_s)


def too_busy(percent: float, cores: str, most_percent: float) -> str:
    """In words: the machine was busier than may be."""
    return (
        f"the machine was busy: other programs or the CPU quota took up to {percent:.0f} % of {cores}, and at most "
        f"{most_percent:g} % is allowed (--max-busy-percent)"
    )


def watch_machine(
    threads: int,
    stat: Path = Path("/proc/stat"),
    throttled_s: Callable[[], float] = throttled_s,
    own_cpu_s: Callable[[], float] = time.process_time,
) -> Callable[[], Activity | None]:
    """Start watching; the function returned stops it and returns what happened since, None where this is not Linux.

    `own_cpu_s` is the CPU time that is not that of others.
    """
    if not hasattr(os, "sched_getaffinity") or not stat.is_file():
        return lambda: None
    cores, physical, waited = os.sched_getaffinity(0), read_cpus().physical, throttled_s()
    wall, own, busy = time.perf_counter(), own_cpu_s(), _busy_s(stat, cores)

    def ended() -> Activity:
        own_s = own_cpu_s() - own
        others_s = max(0.0, _busy_s(stat, cores) - busy - own_s)
        return Activity(time.perf_counter() - wall, own_s, others_s, physical, threads, throttled_s() - waited)

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
