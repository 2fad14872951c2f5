"""A tracking store that fails in the middle of a run: its error in one line, the run's end, and what is kept here.

MLflow's client asks again for about four minutes (MLFLOW_HTTP_REQUEST_MAX_RETRIES), also when nothing listens: a server
that comes back in time is not noticed. What has been sent twice, because an answer was lost, the server stores once.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from qexp.errors import InputError, StageError, StoreError, first_line, hide_passwords
from qexp.files import replacing
from qexp.progress import say
from qexp.tracking.store import quickly, store_name
from qexp.training.checkpoint import TRAINED, checkpoint_folder

ENDED = "ended.json"  # how a run has ended that the store could not be told of


class AdvisedError(StoreError):
    """One that already says where what was kept is, and how it is uploaded."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise StoreError, in one line, for what MLflow, or the disk of its artifacts, has to say."""
    try:
        yield
    except (MlflowException, OSError) as error:
        raise _of_store(error) from error


def explain(error: Exception, run_id: str) -> Exception:
    """The error that ends a run, as one line; if it is the store's, with the folder of what was kept here and the
    command that uploads it."""
    if isinstance(error, MlflowException):
        error = _of_store(error)
    elif isinstance(error, OSError):
        error = _with_cause(StoreError(first_line(error)), error)
    folder = checkpoint_folder(run_id)
    if not isinstance(error, StageError) or isinstance(error, AdvisedError) or not folder.is_dir():
        return error
    if (folder / TRAINED).exists():
        kept = (
            f"the trained model and its results are in {folder}; once this is fixed, `qexp sync {folder}` uploads them"
        )
    elif isinstance(error.__cause__, MlflowException):
        kept = f"what is done is in {folder}; once this is fixed, `qexp sync {folder}` says what is left"
    else:
        return error
    return _with_cause(AdvisedError(f"{error}; {kept}"), error.__cause__)


def _of_store(error: Exception) -> StageError:
    return _with_cause(StoreError(f"MLflow ({store_name()}): {first_line(error)}"), error)


def _with_cause(error: StageError, cause: BaseException | None) -> StageError:
    error.__cause__ = cause
    return error


def end_run(run_id: str, status: int, error: Exception | None = None) -> None:
    """End the run. A store that does not answer keeps nobody waiting: the run's folder, if it has one, notes how it
    ended. The traceback of an error that is not bad input is kept as an artifact."""
    word, said = RunStatus.to_string(status), f"{type(error).__name__}: {error}"[:500] if error else ""
    active = mlflow.active_run()
    ours = active is not None and active.info.run_id == run_id  # MLflow forgets a run before it has ended it
    steps: list[Callable[[], object]] = [
        (lambda: mlflow.end_run(word)) if ours else lambda: mlflow.MlflowClient().set_terminated(run_id, word)
    ]
    if error:
        steps.insert(0, lambda: mlflow.MlflowClient().set_tag(run_id, "qexp.error", said))
    problem: Exception | None = None
    for step in steps:
        try:
            with quickly():
                step()
        except Exception as failed:  # a full disk, a server that has gone: any library's
            problem = failed
    if error and not problem and not isinstance(error, InputError):
        text = hide_passwords("".join(traceback.format_exception(error)))
        with suppress(Exception), quickly():
            mlflow.MlflowClient().log_text(run_id, text, "error.txt")
    if problem:
        folder = checkpoint_folder(run_id)
        later = f"; `qexp sync {folder}` does it later" if folder.is_dir() else ""
        say(f"run {run_id} could not be marked {word} ({first_line(problem)}){later}")
        _note_end(folder, word, said)


def _note_end(folder: Path, word: str, said: str) -> None:
    if folder.is_dir():
        try:
            with replacing(folder / ENDED) as temporary:
                temporary.write_text(json.dumps({"status": word, "error": said}))
        except StageError as error:
            say(str(error))


def forget_end(run_id: str) -> None:
    """Of a run that goes on, how it ended before is of no more interest."""
    with suppress(OSError):  # there may be no folder, or something else in its place
        (checkpoint_folder(run_id) / ENDED).unlink()


def noted_end(folder: Path) -> tuple[str, str] | None:
    """How the run of this folder has ended, and its error; None if it could not even note that."""
    file = folder / ENDED
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return found["status"], found["error"]
