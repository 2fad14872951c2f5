"""Files that are written whole or not at all, and results as JSON."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qexp.errors import StageError, first_line

T = TypeVar("T")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; what stands there at the end takes the place of `file` in one step.

    Neither a crash nor a full disk leaves `file` half written: until the rename the old one stays as it was.

    Raises:
        StageError: the disk is full or the folder cannot be written.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with by_umask(temporary):
            yield temporary
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    except Exception as error:  # torch and safetensors have their own types for a full disk
        raise StageError(f"{file}: cannot be written ({first_line(_root(error))}{_room(file.parent)})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def by_umask(file: Path) -> Iterator[None]:
    """What the block writes as `file` may be read by those whom the umask lets read a new file: safetensors writes
    for its owner alone."""
    file.touch()
    mode = file.stat().st_mode
    yield
    file.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root(error: BaseException) -> BaseException:
    """What the system said, where a library says something else about it."""
    deeper: BaseException | None = error
    while deeper and not isinstance(deeper, OSError):
        deeper = deeper.__cause__ or deeper.__context__
    return deeper or error


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:.0f} MB free there"
    except OSError:
        return ""


def to_json(result: object) -> str:
    """A result as indented JSON."""
    return TypeAdapter(type(result)).dump_json(result, indent=2).decode()


def from_json(kind: type[T], text: str) -> T:
    """The result that `to_json` wrote."""
    return TypeAdapter(kind).validate_json(text)
