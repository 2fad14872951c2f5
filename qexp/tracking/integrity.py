"""The files of a registered version: whether they are those that were registered."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.errors import StageError, first_line
from qexp.models.contents import FileContents, read_contents
from qexp.models.stored import SUFFIXES, model_file
from qexp.progress import say
from qexp.tracking.store import uri_of


def stored_facts(uri: str) -> tuple[str, FileContents]:
    """SHA-256 of what the artifact store has of a version, and what is in the model's file there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_files(uri, Path(folder))
        return _digest_of(copy), read_contents(model_file(copy))


@contextmanager
def checked_copy(found: ModelVersion) -> Iterator[Path]:
    """A local copy of a version's files, compared with what was registered before anything of them is run.

    Raises:
        StageError: files are gone, or others than those that were registered.
    """
    uri, recorded = uri_of(found), found.tags.get("artifact_sha256")
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy = copy_files(uri, Path(folder))
        except (MlflowException, OSError) as error:
            raise StageError(f"{uri}: its files cannot be read ({first_line(error)})") from None
        if not any(file.suffix in SUFFIXES for file in copy.rglob("*")):
            raise StageError(f"{uri}: the model's file is gone from the artifact store")
        if recorded is None:
            say(f"{uri}: no digest of its files was recorded; they are not compared")
        elif (digest := _digest_of(copy)) != recorded:
            what = "its files are not those that were registered"
            raise StageError(f"{uri}: {what}: SHA-256 {digest[:16]}…, recorded {recorded[:16]}…")
        yield copy


def copy_files(uri: str, folder: Path) -> Path:
    """Where a copy of a version's files is, in a new folder below `folder`.

    MLflow's client repeats a request that nobody answers, but not a download that is cut off: this does, once.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(dir=folder)))
    except (MlflowException, OSError):
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(dir=folder)))


def _digest_of(folder: Path) -> str:
    """Of names and contents, without the note of its name and version that MLflow adds to a copy."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "registered_model_meta"):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {inner}\n".encode())
    return digest.hexdigest()
