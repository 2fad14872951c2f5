"""Files that are complete or not there."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from qexp import files
from qexp.data import cifar10
from qexp.errors import StageError
from qexp.files import TEMPORARY, own_temporary_folder, replacing
from qexp.models.classifier import Classifier, ModelSpec, save_classifier
from qexp.models.preprocessing import squashed

FULL = """
import resource, sys, torch
from pathlib import Path
from qexp.training.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what a full disk does, at 100 kB
save_checkpoint(Path(sys.argv[1]), {"position": {"best_epoch": 0}, "model": torch.zeros(1_000_000)})
"""


def test_new_text_takes_the_place_of_the_old(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    for text in ("old", "new"):
        with replacing(file) as temporary:
            temporary.write_text(text)
        assert file.read_text() == text and os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """Weights too, which safetensors writes for their owner alone; and the cache of a folder of images."""
    before = os.umask(umask)
    try:
        spec = ModelSpec("smallnet", ("a", "b"), squashed(8))
        save_classifier(Classifier(spec, torch.zeros(3), torch.ones(3)), tmp_path / "new" / "weights.safetensors")
        with replacing(tmp_path / "new" / "text") as temporary:
            temporary.write_text("text")
        images = {"images": torch.zeros(1)}
        cifar10.cached(tmp_path, [], squashed(8), lambda: images, lambda found: True)
        plain = tmp_path / "plain"
        plain.write_text("as everybody does")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4 and {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_error_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with (
        pytest.raises(StageError, match=r"file: cannot be written \(no room; \d+ MB free there\)"),
        replacing(file) as new,
    ):
        new.write_text("half")
        raise OSError("no room")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_text("previous")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 1
        and "StageError" in done.stderr
        and "checkpoint.pt: cannot be written ([Errno 27]" in done.stderr
    )
    assert (tmp_path / "checkpoint.pt").read_text() == "previous" and os.listdir(tmp_path) == ["checkpoint.pt"]


IN_USE = """
import tempfile
from qexp.files import own_temporary_folder
with own_temporary_folder():
    print(tempfile.mkdtemp(), flush=True)
    input()
"""


def test_temporary_files_of_a_killed_process_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "YOUNG_S", -1)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", IN_USE], env=environment, **pipes)  # type: ignore[call-overload]
    theirs = Path(process.stdout.readline().strip())
    (tmp_path / "qexp-notes").mkdir()
    with own_temporary_folder():
        with tempfile.NamedTemporaryFile() as file:
            ours = Path(file.name).parent
        assert theirs.parent.name.startswith(TEMPORARY) and theirs.is_dir()
        assert {ours, theirs.parent, tmp_path / "qexp-notes"} == {*tmp_path.iterdir()}
        child = subprocess.run([sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"], stdout=-1)
        assert child.stdout.decode().strip() == str(ours)
    process.kill()
    process.wait()
    assert theirs.is_dir() and not ours.exists() and tempfile.gettempdir() == str(tmp_path)
    with own_temporary_folder():
        assert not theirs.parent.exists()
    assert os.listdir(tmp_path) == ["qexp-notes"]
