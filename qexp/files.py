"""Files that are written whole or not at all, results as JSON, and the folder of a command's temporary files."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qexp.errors import StageError, first_line
from qexp.foundation.environment import environment

T = TypeVar("T")
TEMPORARY = "qexp-work-"  # begins the names of folders for temporary files
YOUNG_S = 60  # a folder may be younger than its lock


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
    """The result that `to_json` wrote.

    Raises:
        ValueError: the text is no result of this kind, or its figures are none that it can have (quantities.py) or
            contradict each other, as its method `check` says where it has one.
    """
    found = TypeAdapter(kind).validate_json(text)
    if check := getattr(found, "check", None):
        check()
    return found


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Within the block, the temporary files of this process, of its libraries and of its children are in one folder,
    which is removed at the end. So are those that this user's killed processes have left."""
    above = tempfile.tempdir
    try:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        held = _lock(folder)
    except OSError:  # nothing can be written there: what needs a file says so
        yield
        return
    try:
        _remove_abandoned(folder.parent)
        tempfile.tempdir = str(folder)
        with environment(TMPDIR=str(folder)):
            yield
    finally:
        tempfile.tempdir = above
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _remove_abandoned(above: Path) -> None:
    """Remove the folders whose process is gone: its lock went with it."""
    for folder in above.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # another user's, or another process removes it now
            found = folder.lstat()
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > YOUNG_S:
                held = _lock(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder for this process and its forks; OSError if another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
