"""Processes that qexp starts: they end with the one that has started them, and import nothing from its folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import REPOSITORY
from shadows import write_shadows

from qexp.foundation.processes import python_command, run_python

# Each prints the ids of the processes that must end with the one that runs it.
CHILD_OF_A_CHILD = """
from qexp.foundation.processes import python_command
import os, subprocess
code = '''
import os, runpy, sys, time
ours = runpy.run_path(sys.argv[1])
parent, child = os.getpid(), os.fork()
if child:
    print(parent, child, flush=True)
else:
    ours["end_with"](parent)
time.sleep(60)
'''
subprocess.run(python_command("-c", code, os.environ["PROCESSES"]))
"""
NOT_TOLD = """
from qexp.foundation import processes
import os, time
processes._told_by_system, processes.POLL_S = lambda number: False, 0.05
parent, child = os.getpid(), os.fork()
if child:
    print(child, flush=True)
else:
    processes.end_with(parent)
time.sleep(60)
"""


# It waits for a child that imports numpy, and says nothing of its own at Ctrl-C.
STARTS_A_CHILD = """
import os, signal
from qexp.foundation.processes import run_python
signal.signal(signal.SIGINT, signal.default_int_handler)  # as commands do: after a shell's & it is ignored
print("started", flush=True)
try:
    run_python(["-c", "import numpy, time; time.sleep(60)"], dict(os.environ))
except KeyboardInterrupt:
    os._exit(130)
"""


@pytest.mark.parametrize("program", [CHILD_OF_A_CHILD, NOT_TOLD], ids=["told by the system", "looks itself"])
def test_what_a_killed_process_has_started_ends(program: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PROCESSES": str(REPOSITORY / "qexp" / "foundation" / "processes.py"),
    }
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    with parent.stdout as said:
        children = [int(word) for word in said.readline().split()]
        assert children and all(_runs(child) for child in children)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 10
        while (left := [child for child in children if _runs(child)]) and time.monotonic() < end:
            time.sleep(0.02)
    assert not left


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        return (
            Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )  # nobody has waited for it
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("wait_s", [0.005, 0.02, 0.05, 0.15, 0.4])
def test_an_interrupt_while_a_process_starts_prints_nothing(wait_s: float) -> None:
    """A terminal sends Ctrl-C to all processes that are in front, wherever each one is."""
    command, environment = [sys.executable, "-c", STARTS_A_CHILD], os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment, start_new_session=True)
    assert parent.stdout and parent.stdout.readline()
    time.sleep(wait_s)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate()[1] == "" and parent.returncode == 130


def test_a_process_whose_parent_has_ended_before_does_nothing() -> None:
    python, safe, file, _, *words = python_command("-c", "print('done')")
    command = [python, safe, file, str(2**22 + 1), *words]  # a process id that Linux does not give
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and not done.stdout


IMPORTS = """
import random, statistics, profile, tempfile, queue, subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", "import random, statistics"]).returncode)
"""


@pytest.mark.parametrize("path", ["", ":", ".", "{here}"])
def test_a_child_and_what_it_starts_import_nothing_from_the_current_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shadows(tmp_path)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": path.format(here=tmp_path)}
    done = run_python(["-c", IMPORTS], environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_child_takes_the_package_that_has_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qexp").mkdir()
    (tmp_path / "qexp" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_python(["-m", "entrypoints.cli", "--version"], environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("qexp "), done.stderr
