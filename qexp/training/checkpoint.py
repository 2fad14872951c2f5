"""Checkpoints of a training: all that the next step needs, in one folder a training, which the caller names.

`checkpoint.pt` holds weights, optimiser, schedule, random states and position; `best-NNN.safetensors` the best weights
so far, with the number of their epoch. A checkpoint names its best file, so the two always belong together.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qexp.errors import InputError
from qexp.files import replacing

NAME = "checkpoint.pt"
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


def checkpoint_exists(folder: Path) -> bool:
    """Whether a training in this folder can be resumed."""
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
