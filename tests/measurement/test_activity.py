"""What others do on the cores of this process, from files as the kernel writes them, and on this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qexp.measurement.activity import Activity, watch_machine
from qexp.measurement.host import read_cpus

STAT = """cpu  400 20 60 1000 10 5 5 0 0 0
cpu0 {user} 10 30 500 5 2 3 {steal} 0 0
cpu1 200 10 30 500 5 3 2 0 0 0
intr 12345 0 0
ctxt 67890
"""


@pytest.mark.parametrize(
    ("others_cpu_s", "cores", "threads", "percent"),
    [
        (0.0, 2, 2, 0.0),
        (4.9, 2, 2, 24.5),
        (20.0, 2, 2, 100.0),
        (10.0, 2, 1, 0.0),  # the other core was free
        (15.0, 2, 1, 50.0),
        (300.0, 64, 32, 0.0),
        (330.0, 64, 32, 100 / 32),
    ],
)
def test_others_count_where_they_do_not_fit_on_free_cores(
    others_cpu_s: float, cores: int, threads: int, percent: float
) -> None:
    found = Activity(10.0, 5.0, others_cpu_s, cores, threads)
    assert found.busy_percent == pytest.approx(percent)


def test_time_of_others_is_what_is_not_idle_and_not_our_own(tmp_path: Path) -> None:
    stat, first = tmp_path / "stat", min(os.sched_getaffinity(0))
    ticks = os.sysconf("SC_CLK_TCK")
    text = STAT.replace("cpu0", f"cpu{first}")
    stat.write_text(text.format(user=200, steal=0))
    ended = watch_machine(1, stat)
    stat.write_text(text.format(user=200 + 30 * ticks, steal=10 * ticks))  # 40 s, of which 10 went to other machines
    found = ended()
    assert found and found.others_cpu_s == pytest.approx(40 - found.own_cpu_s, abs=0.1)
    assert found.threads == 1 and found.cores == read_cpus().physical


def test_time_that_the_quota_takes_counts_as_busy(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(user=200, steal=0))
    waited = iter([1.0, 3.5])
    found = watch_machine(1, stat, lambda: next(waited))()
    assert found and found.throttled_s == 2.5
    assert Activity(10.0, 5.0, 0.0, 2, 2, throttled_s=2.5).busy_percent == pytest.approx(25)


def test_where_the_kernel_tells_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert watch_machine(1, tmp_path / "stat")() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_a_process_beside_this_one_is_seen() -> None:
    busy = "import time\nend = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", busy])
    try:
        time.sleep(0.3)
        ended = watch_machine(len(os.sched_getaffinity(0)))
        time.sleep(1.5)
        found = ended()
    finally:
        process.kill()
        process.wait()
    assert found and found.others_cpu_s > 0.3 and found.own_cpu_s < 0.2 and found.busy_percent > 5
