"""How OpenMP's threads, on which torch computes, wait for each other: they sleep at once, or spin for a while before.

Spinning, which is OpenMP's default, is faster on an idle machine. Beside another busy process it is several times
slower, since a thread that spins keeps the core from the very thread that it waits for. So the commands let threads
sleep, training finds by timing whether it pays to spin (training/execution.py), and models are timed with what a user's
process would have (measurement/latency.py). No result depends on it.

OpenMP reads its own setting, OMP_WAIT_POLICY, only once, when it is loaded. Later, in a running process:

- GNU's library (torch for Linux) spins 100 times instead of 300,000 while it has more threads than there are CPUs
  (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html): idle threads are added, and taken away again.
- Intel's and LLVM's (torch for macOS) have `kmp_set_blocktime`.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

PASSIVE, DEFAULT = "passive", "default"  # they sleep at once; they spin for a while before
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by which a user chooses
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_wake: Callable[[], object] | None = None  # undoes what lets the threads sleep


def waiting() -> str:
    """How threads wait in this process: PASSIVE, DEFAULT, or another value that OMP_WAIT_POLICY has."""
    return os.environ.get(VARIABLES[0], DEFAULT if _wake is None else PASSIVE).lower()


def may_choose_waiting() -> bool:
    """Whether it can be changed, and the user has not chosen."""
    return not any(name in os.environ for name in VARIABLES) and _openmp() is not None


def wait(how: str) -> None:
    """Let the threads of this process sleep from now on while they wait, if `how` is PASSIVE, or else spin before;
    nothing happens where `may_choose_waiting` is false."""
    global _wake
    if (how == PASSIVE) == (_wake is not None) or not may_choose_waiting():
        return
    if _wake is None:
        _wake = _put_to_sleep()
    else:
        _wake()
        _wake = None


@contextmanager
def waiting_as(how: str) -> Iterator[None]:
    """`wait`, and as before after the block."""
    before = waiting()
    wait(how)
    try:
        yield
    finally:
        wait(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch calls, if it is one of those in which waiting can be changed."""
    import torch  # which loads it, and takes seconds

    if not torch.backends.openmp.is_available():
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "kmp_set_blocktime"):
        return library
    return library if hasattr(library, "GOMP_parallel") and _can_start(CPUS) else None


def _can_start(threads: int) -> bool:
    """Whether the system grants so many threads: where it does not, GNU's library ends the process."""
    end, started = threading.Event(), []
    try:
        for _ in range(threads):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        end.set()
        for thread in started:
            thread.join()
    return True


def _put_to_sleep() -> Callable[[], object]:
    """Let threads sleep while they wait, until what is returned is called."""
    library = _openmp()
    assert library is not None
    if hasattr(library, "kmp_set_blocktime"):
        before = library.kmp_get_blocktime()
        library.kmp_set_blocktime(0)
        return partial(library.kmp_set_blocktime, before)
    ready, end = threading.Event(), threading.Event()

    def hold() -> None:
        """Have a team of one thread more than there are CPUs, which does nothing, as long as this thread lives."""
        library.GOMP_parallel(library.omp_get_thread_num, None, CPUS + 1, 0)
        ready.set()
        end.wait()

    holder = threading.Thread(target=hold, name="qexp-waiting", daemon=True)
    holder.start()
    ready.wait()

    def wake() -> None:
        end.set()
        holder.join()

    return wake
