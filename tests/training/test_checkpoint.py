"""Checkpoints: what is written is read back, and old best weights go."""

from pathlib import Path

import pytest
import torch

from qexp.errors import InputError
from qexp.training.checkpoint import (
    best_file,
    checkpoint_exists,
    load_checkpoint,
    save_checkpoint,
)


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
