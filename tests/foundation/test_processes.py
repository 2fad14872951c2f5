"""Processes that qexp starts: they end with the one that has started them, and import nothing from its folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
