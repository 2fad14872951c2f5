"""A tracking store that fails in the middle of a run: its error in one line, and the run's end.

MLflow's client asks again for about four minutes (MLFLOW_HTTP_REQUEST_MAX_RETRIES), also when nothing listens: a server
that comes back in time is not noticed. What has been sent twice, because an answer was lost, the server stores once.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from qexp.errors import InputError, StageError, StoreError, first_line
from qexp.foundation.text import hide_secrets, printable
from qexp.progress import say
from qexp.tracking.job_folder import has_results, note_end
from qexp.tracking.store import quickly, store_name


class AdvisedError(StoreError):
    """An error whose message says already where the results are, and which command uploads them."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise StoreError, in one line, for what MLflow, or the disk of its artifacts, has to say."""
    try:
        yield
    except (MlflowException, OSError) as error:
        raise _of_store(error) from error


def explain(error: Exception, job: Path) -> Exception:
    """The error that ends a run, as one line. If results are in the job's folder that MLflow lacks, or if the store
    does not answer, the line names the folder and the command that uploads it."""
    if isinstance(error, MlflowException):
        error = _of_store(error)
    elif isinstance(error, OSError):
        error = _with_cause(StoreError(first_line(error)), error)
    if not isinstance(error, StageError) or isinstance(error, AdvisedError) or not job.is_dir():
        return error
    if has_results(job):
        advice = f"the results are in {job}; once this is fixed, `qexp sync {job}` uploads them"
    elif isinstance(error.__cause__, MlflowException):
        advice = f"what is done is in {job}; once this is fixed, `qexp sync {job}` says what is left"
    else:
        return error
    return _with_cause(AdvisedError(f"{error}; {advice}"), error.__cause__)


def _of_store(error: Exception) -> StageError:
    return _with_cause(StoreError(f"MLflow ({store_name()}): {first_line(error)}"), error)


def _with_cause(error: StageError, cause: BaseException | None) -> StageError:
    error.__cause__ = cause
    return error


def end_run(run_id: str, status: int, job: Path, error: Exception | None = None) -> None:
    """End the run. A store that does not answer keeps nobody waiting: the job's folder, if it is there, notes how the
    run ended. The traceback of an error that is not bad input is kept as an artifact."""
    word, said = RunStatus.to_string(status), printable(f"{type(error).__name__}: {error}")[:500] if error else ""
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
        text = hide_secrets("".join(traceback.format_exception(error)))
        with suppress(Exception), quickly():
            mlflow.MlflowClient().log_text(run_id, text, "error.txt")
    if problem:
        later = f"; `qexp sync {job}` does it later" if job.is_dir() else ""
        say(f"run {run_id} could not be marked {word} ({first_line(problem)}){later}")
        note_end(job, run_id, word, said)
