"""Checkpoints of a training: all that goes on from one step to the next, in one folder a run.

`checkpoint.pt` holds weights, optimiser, schedule, random states and position; `best-NNN.safetensors` the best weights
so far, with the number of their epoch. A checkpoint names its best file, so the two always belong together.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qexp.errors import InputError, StageError
from qexp.files import replacing

NAME, LOCK, LAUNCHER_LOCK = "checkpoint.pt", "lock", "launcher.lock"  # of the process that trains; that starts others
TRAINED = "trained.json"  # there when the training is over (qexp/trained.py)
FORMAT = 2


@dataclass
class Position:
    """How far a training has come: the epoch under way, its steps done, and what the epochs before it found."""

    epoch: int = 1
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # loss, hits, top-3 hits, images of the epoch so far
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    learning_rate: float = 0.0  # of the last step
    epoch_s: float = 0.0  # spent in the epoch's steps so far
    total_s: float = 0.0  # spent in all, without the pauses between processes
    times_resumed: int = 0
    skipped_steps: int = 0  # whose gradient was not finite
    skipped_in_epoch: int = 0


def checkpoint_folder(run_id: str) -> Path:
    """Where the training of this run keeps its checkpoints, below the current folder."""
    return Path("checkpoints", run_id)


def checkpoint_exists(folder: Path) -> bool:
    """Whether a training in this folder can go on."""
    return (folder / NAME).is_file()


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors and plain values), then remove best weights that it no longer needs.

    Raises:
        StageError: it cannot be written; the one before is intact.
    """
    with replacing(folder / NAME) as temporary, temporary.open("wb") as file:
        torch.save(state | {"format": FORMAT}, file)
    for weights in folder.glob("best-*.safetensors"):
        if weights != best_file(folder, state["position"]["best_epoch"]):
            weights.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        InputError: it is not there, or not one of ours.
    """
    file = folder / NAME
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile have many words for a file that is none of theirs
        raise InputError(f"checkpoint {file}: cannot be read ({type(error).__name__}); it is damaged") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"checkpoint {file}: not written by this version of qexp")
    return state


def best_file(folder: Path, epoch: int) -> Path:
    """The file of the weights after this epoch."""
    return folder / f"best-{epoch:03d}.safetensors"


def remove_checkpoints(run_id: str) -> None:
    """Remove what is of no more use once a run has finished."""
    folder = checkpoint_folder(run_id)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another training may have its own there
        folder.parent.rmdir()


def check_unlocked(folder: Path, run_id: str) -> None:
    """Raise InputError if a process is at work in the folder."""
    for name in (LOCK, LAUNCHER_LOCK):
        file = folder / name
        if file.exists() and file.read_text() != str(os.getppid()):  # a training process's own launcher is no other
            with locked(folder, run_id, name):
                pass


def lock_of(run_id: str | None, name: str = LOCK) -> AbstractContextManager[None]:
    """`locked` for the folder of this run; without a run, nothing."""
    return locked(checkpoint_folder(run_id), run_id, name) if run_id else nullcontext()


@contextmanager
def locked(folder: Path, run_id: str, name: str = LOCK) -> Iterator[None]:
    """Only one process at a time works in a folder; the lock ends with its process, however that ends.

    Raises:
        InputError: another process has it.
        StageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+")
    except OSError as error:
        raise StageError(f"{folder}: checkpoints cannot be written there ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(
                f"run {run_id}: process {file.read().strip() or '?'} is still at work on it; stop it first"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
