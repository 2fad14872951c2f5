"""Checkpoints: what is written is read back, old best weights go, one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from qexp.errors import InputError
from qexp.training.checkpoint import (
    best_file,
    check_unlocked,
    checkpoint_exists,
    load_checkpoint,
    locked,
    remove_checkpoints,
    save_checkpoint,
)

HOLD = """
import sys, time
from pathlib import Path
from qexp.training.checkpoint import locked
with locked(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_written_is_read(tmp_path: Path) -> None:
    assert not checkpoint_exists(tmp_path)
    state = {"position": {"best_epoch": 2, "epochs": [{"loss": 0.1}]}, "model": {"weight": torch.rand(3, 4)}}
    save_checkpoint(tmp_path, state)
    read = load_checkpoint(tmp_path)
    assert checkpoint_exists(tmp_path) and read["position"] == state["position"]
    assert torch.equal(read["model"]["weight"], state["model"]["weight"])


def test_only_the_best_weights_named_stay(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        best_file(tmp_path, epoch).write_text("weights")
    save_checkpoint(tmp_path, {"position": {"best_epoch": 2}})
    assert [file.name for file in tmp_path.glob("best-*")] == ["best-002.safetensors"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"weights": 1}, file) if content is None else file.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint .*checkpoint.pt: (cannot be read|not written by)"):
        load_checkpoint(tmp_path)


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    check_unlocked(tmp_path, "r1")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"run r1: process {holder.pid} is still at work"):
        check_unlocked(tmp_path, "r1")
    holder.kill()
    holder.wait()
    with locked(tmp_path, "r1"):
        pass


def test_folder_of_a_finished_run_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("one", "two"):
        save_checkpoint(Path("checkpoints", run), {"position": {"best_epoch": 0}})
    remove_checkpoints("one")
    assert [path.name for path in Path("checkpoints").iterdir()] == ["two"]
    remove_checkpoints("two")
    assert not Path("checkpoints").exists()
