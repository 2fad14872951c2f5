"""The commit of the code: only of a repository that tracks it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qexp.tracking.commit import UNKNOWN, read_commit


def _git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    subprocess.run(["git", *settings, *arguments], check=True, capture_output=True)


def test_commit_of_tracked_code_and_whether_it_has_changed(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text("")
    assert read_commit(code) == UNKNOWN
    _git(tmp_path, "init")
    (tmp_path / "readme").write_text("another project, in whose folder the code is installed")
    _git(tmp_path, "add", "readme")
    _git(tmp_path, "commit", "-m", "first")
    assert read_commit(code) == UNKNOWN
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "second")
    commit = read_commit(code)
    assert len(commit) == 40
    (code / "notes").write_text("not tracked")
    assert read_commit(code) == commit
    (code / "__init__.py").write_text("changed = True")
    assert read_commit(code) == f"{commit}-dirty"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_repository_of_another_user_runs_nothing(tmp_path: Path) -> None:
    """It may lie anywhere above the code, and its settings name a program that `git status` runs."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text("")
    _git(tmp_path, "init")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    _git(tmp_path, "config", "core.fsmonitor", f"touch {tmp_path}/ran; false")
    shutil.chown(tmp_path / ".git", 1234)
    assert read_commit(code) == UNKNOWN and not (tmp_path / "ran").exists()
    shutil.chown(code, 1234)  # all is another user's, who could as well have changed the code
    assert len(read_commit(code)) >= 40
