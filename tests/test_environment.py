"""How threads wait: without spinning in our own processes, as the user's would in those that are timed."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from qexp.environment import SET_BY_QEXP, WAIT_POLICY, as_the_user_set, wait_without_spinning, waiting
from qexp.tracking import registry


@pytest.fixture(autouse=True)
def _no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (WAIT_POLICY, SET_BY_QEXP):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever a test sets
        monkeypatch.delenv(name)


def test_threads_do_not_spin_here_but_do_where_a_user_would_have_it_so() -> None:
    assert waiting() == "default"
    wait_without_spinning()
    assert waiting() == "passive"
    assert WAIT_POLICY not in registry.child_environment(1)
    assert as_the_user_set({"A": "1"}) == {"A": "1"}


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT_POLICY, "ACTIVE")
    wait_without_spinning()
    assert waiting() == "active" and registry.child_environment(1)[WAIT_POLICY] == "ACTIVE"


def test_a_command_sets_it_before_openmp_is_loaded() -> None:
    """OpenMP reads it once, when torch is imported."""
    code = """
import os, sys
import entrypoints.cli
from entrypoints.options import finish
assert "torch" not in sys.modules
finish(lambda: {"waiting": os.environ["OMP_WAIT_POLICY"], "torch": "torch" in sys.modules})
"""
    environment = {name: value for name, value in os.environ.items() if name not in (WAIT_POLICY, SET_BY_QEXP)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == '{"waiting": "passive", "torch": false}', done.stderr
