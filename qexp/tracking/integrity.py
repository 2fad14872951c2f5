"""The files of a registered version: whether they are those that were registered."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.errors import StageError, StoreError, first_line, naming_copies
from qexp.models.stored import SUFFIXES
from qexp.tracking.store import uri_of
from qexp.tracking.tags import tags_of

NOTE = "registered_model_meta"  # which version of what name, written by MLflow after each download


@contextmanager
def checked_copy(found: ModelVersion) -> Iterator[Path]:
    """A private copy of a version's files that has been held against what was registered, before anything of it is
    opened: what is loaded is to be loaded from there.

    Raises:
        InputError: the version has no digest of its files, or one that is none.
        StageError: files are gone, or others than those that were registered.
    """
    recorded = tags_of(found).artifact_sha256
    with copied(uri_of(found)) as copy:
        if (digest := digest_of(copy)) != recorded:
            what = "its files are not those that were registered"
            raise StageError(f"{uri_of(found)}: {what}: SHA-256 {digest[:16]}…, recorded {recorded[:16]}…")
        yield copy


@contextmanager
def copied(uri: str) -> Iterator[Path]:
    """A private copy of what the artifact store has of a version; StageError if its files cannot be read."""
    with tempfile.TemporaryDirectory() as folder, naming_copies(folder, uri):
        try:
            copy = _copy_files(uri, Path(folder))
        except (MlflowException, OSError) as error:
            raise StoreError(f"{uri}: its files cannot be read ({first_line(error)})") from error
        if not any(file.suffix in SUFFIXES for file in copy.rglob("*")):
            raise StageError(f"{uri}: the model's file is gone from the artifact store")
        yield copy


def _copy_files(uri: str, folder: Path) -> Path:
    """Where a copy of a version's files is, in a new folder below `folder`.

    MLflow's client repeats a request that nobody answers, but not a download that is cut off: this does, once.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(dir=folder)))
    except (MlflowException, OSError):
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(dir=folder)))


def digest_of(folder: Path) -> str:
    """SHA-256 of names and contents, without the note of its name and version that MLflow adds to a copy."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NOTE):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {inner}\n".encode())
    return digest.hexdigest()
