"""The folder of a job, checkpoints/RUN_ID: its lock, how its runs ended, and a folder for each stage at work.

The pipeline keeps checkpoints and results there until MLflow has them. A run belongs to the job of its parent, or is a
job of its own. Nothing here asks MLflow.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from qexp.errors import InputError, StageError, first_line
from qexp.files import replacing
from qexp.progress import say

LOCK, LAUNCHER_LOCK = "lock", "launcher.lock"  # of the process that does the job; of one that has started others for it
FOLDER = "checkpoints"  # below the current folder
RESULT = "result.json"  # in the folder of a stage: it has done its work, and this and the files beside it are to upload


def job_folder(run_id: str) -> Path:
    """What is kept of a job until it has finished, below the current folder."""
    return Path(FOLDER, run_id)


def stage_folder(job: Path, name: str) -> Path:
    """That of a stage of the job; `name` is the name of its run."""
    return job / name.replace("/", "-")


def has_results(job: Path) -> bool:
    """Whether a stage has found something that MLflow lacks."""
    return any(job.glob(f"*/{RESULT}"))


def remove_folder(folder: Path) -> None:
    """Remove the folder of a stage or a job, and those above it if nothing else is there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others may have theirs there
        while (folder := folder.parent).name and FOLDER in folder.parts:
            folder.rmdir()


def remove_if_empty(run_id: str) -> None:
    """Remove the folder of a job if nothing but locks that nobody holds is in it."""
    folder, locks = job_folder(run_id), (LOCK, LAUNCHER_LOCK)
    if folder.is_dir() and {file.name for file in folder.iterdir()} <= set(locks):
        with suppress(InputError, StageError), locked(folder, run_id, LOCK), locked(folder, run_id, LAUNCHER_LOCK):
            remove_folder(folder)


def note_end(job: Path, run_id: str, status: str, error: str) -> None:
    """Note how a run has ended that MLflow could not be told of."""
    if job.is_dir():
        try:
            with replacing(_end_of(job, run_id)) as temporary:
                temporary.write_text(json.dumps({"status": status, "error": error}))
        except StageError as problem:
            say(str(problem))


def forget_end(job: Path, run_id: str) -> None:
    """How a run that is resumed ended before is of no more interest."""
    with suppress(OSError):  # there may be no folder, or something else in its place
        _end_of(job, run_id).unlink()


def noted_end(job: Path, run_id: str) -> tuple[str, str] | None:
    """Status and error of a run, as `note_end` wrote them; None if there is no such note.

    Raises:
        InputError: somebody has changed it.
    """
    file = _end_of(job, run_id)
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        status, error = found["status"], found["error"]
        if status not in ("FINISHED", "FAILED", "KILLED") or not isinstance(error, str):
            raise ValueError("it says no end of a run")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise InputError(f"{file}: cannot be read ({first_line(problem)}); remove it") from None
    return status, error


def _end_of(job: Path, run_id: str) -> Path:
    return job / f"ended-{run_id}.json"


def check_unlocked(run_id: str) -> None:
    """Raise InputError if a process is at work on the job of this run."""
    for name in (LOCK, LAUNCHER_LOCK):
        file = job_folder(run_id) / name
        if file.exists() and file.read_text() != str(os.getppid()):  # a training process's own launcher is no other
            with locked(job_folder(run_id), run_id, name):
                pass


def lock_of(run_id: str | None, name: str = LOCK) -> AbstractContextManager[None]:
    """`locked` for the job of this run; without a run, nothing."""
    return locked(job_folder(run_id), run_id, name) if run_id else nullcontext()


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
