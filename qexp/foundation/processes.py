"""Every Python process that qexp starts: it ends with the process that has started it, and imports nothing from the
current folder, where people keep files with names such as `random.py`.

The latency sweep, the verification of versions and the training processes are started with `python_command`. It runs
this file as a program, which has imported nothing but the standard library when it does what was asked for.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
OWN_CODE = "QEXP_OWN_CODE"  # the folder from which a training process imports the code of the user's network
POLL_S = 0.5  # between two looks at the parent, where the system does not tell
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where the package is


def python_command(*words: str, warn: bool = True) -> list[str]:
    """The command that runs `-m MODULE ARGUMENTS` or `-c CODE ARGUMENTS` in a Python process that this one starts.

    MODULE is in one of the packages beside this one, which are found without a search path. Without `warn`, Python's
    warnings are not shown.
    """
    options = ["-P"] if warn else ["-P", "-W", "ignore"]
    return [sys.executable, *options, os.path.abspath(__file__), str(os.getpid()), *words]


def python_environment(variables: dict[str, str]) -> dict[str, str]:
    """`variables` for such a process: what it starts itself does not import from the current folder either.

    An empty entry of PYTHONPATH (`PYTHONPATH=:/opt/lib`) stands for that folder; it and the folder's own name go.
    """
    here = os.path.realpath(os.curdir)
    entries = variables.get("PYTHONPATH", "").split(os.pathsep)
    kept = os.pathsep.join(entry for entry in entries if entry and os.path.realpath(entry) != here)
    variables = {name: value for name, value in variables.items() if name != OWN_CODE}
    return variables | {"PYTHONSAFEPATH": "1", "PYTHONPATH": kept}  # an empty one is none


def run_python(
    words: Sequence[str], environment: dict[str, str], capture_output: bool = False, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run `-m MODULE ARGUMENTS` or `-c CODE ARGUMENTS` in a Python process without warnings or input; wait for it.

    Args:
        environment: its environment variables.
        capture_output: return what it writes, which goes where this process writes otherwise.
        options: as of `subprocess.Popen`.
    """
    written = subprocess.PIPE if capture_output else None
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": written, "stderr": written}
    with start_python(words, environment, **streams | options) as process:
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_python(words: Sequence[str], environment: dict[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Start what `run_python` runs, with pipes for its three streams, and return the process; `options` are those of
    `subprocess.Popen`.

    Ctrl-C, which a terminal sends to both processes, ends this one without a word: it waits until `_main` can say so.
    """
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command, variables = python_command(*words, warn=False), python_environment(environment)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, env=variables, **pipes | options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal when its parent ends, however that ends, `kill -9` included.

    Args:
        parent: the process id of the parent. If it has ended already, the signal comes at once.
        number: of the signal.
    """
    if not _told_by_system(number):
        threading.Thread(target=_watch, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _told_by_system(number: int) -> bool:
    """Whether Linux will send the signal."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number) == 0


def _watch(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), number)


def _main(parent: str, kind: str, what: str, *arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a word; its parent has the last one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with(int(parent))
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        return
    for name in dict.fromkeys(("qexp", what.partition(".")[0])):
        _import_from_root(name)
    from qexp.foundation.imports import importing

    with importing():
        import_module(what)  # as a program it finds there what it imports
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    runpy.run_module(what, run_name="__main__", alter_sys=True)


def _import_from_root(name: str) -> None:
    """Import a package from the folder that this file's package is in, and from no other."""
    spec = PathFinder.find_spec(name, [ROOT])
    if spec and spec.loader:
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "__main__":
    _main(*sys.argv[1:])
