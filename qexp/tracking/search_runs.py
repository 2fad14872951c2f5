"""The MLflow runs of a search: one parent for the study, whoever works on it, and below it one for each trial.

Fed by search/: job.py opens the parent with `study_run`, trials.py logs each trial; what a trial is, is not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from qexp.errors import InputError, StageError, first_line
from qexp.progress import say
from qexp.tracking import runs as tracking
from qexp.tracking.limits import short_param
from qexp.tracking.store import is_missing, store_name


def find_parent(run_id: str | None, study: str) -> str | None:
    """The study's run as it was started; None if there is none, or it was deleted: a new one takes its place.

    Raises:
        InputError: this store does not have it.
    """
    if run_id is None:
        return None
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise InputError(
            f"MLFLOW_TRACKING_URI {store_name()}: has no run {run_id}, to which study {study} belongs "
            f"({first_line(error)}); all its workers must use the same store"
        ) from None
    return run_id if run.info.lifecycle_stage == "active" else None


@contextmanager
def study_run(note: str, run_id: str | None, leave: Callable[[Callable[[], None]], bool]) -> Iterator[str]:
    """The parent run, new without `run_id`. `leave` takes this worker off the study and says whether it was the last;
    if not, it calls what it is given.

    Only the last worker ends the run, as `tracking.start_run` does; until then the run stays RUNNING, whatever happens
    to a worker.
    """
    problem: BaseException | None = None
    with tracking.start_run("search", note, run_id) as run_id:
        try:
            yield run_id
            leave(_leave_running)
        except BaseException as error:
            if leave(_leave_running):
                raise
            problem = StageError(first_line(error)) if isinstance(error, MlflowException) else error
    if problem:
        raise problem


def _leave_running() -> None:
    try:
        mlflow.end_run("RUNNING")
    except Exception as error:  # of any library, since the store is gone
        say(f"the study's run could not be left ({first_line(error)})")


@contextmanager
def logging_params(run_id: str, params: dict[str, object]) -> Iterator[None]:
    """Parameters of a run, written while the block computes: a database waits for its disk."""
    given = [Param(name, short_param(value)) for name, value in params.items()]
    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(mlflow.MlflowClient().log_batch, run_id, params=given)
        yield
    written.result()


def log_trial(run_id: str, values: dict[str, float], top1_by_seed_percent: Sequence[float], first_seed: int) -> None:
    """Metrics of a trial's run, and top-1 as a curve over the seeds, all in one request."""
    now = mlflow.utils.time.get_current_time_millis()
    metrics = [Metric(name, value, now, 0) for name, value in values.items()]
    metrics += [Metric("val/top1", top1, now, first_seed + index) for index, top1 in enumerate(top1_by_seed_percent)]
    mlflow.MlflowClient().log_batch(run_id, metrics=metrics)


def end_as_killed(run_id: str, reason: str) -> bool:
    """Mark the run of a trial whose worker is gone; False where it was marked before."""
    client = mlflow.MlflowClient()
    if client.get_run(run_id).info.status == "KILLED":
        return False
    client.log_batch(run_id, tags=[RunTag("qexp.error", reason)])
    client.set_terminated(run_id, "KILLED")
    return True


def end_left_open(run_id: str, stages: tuple[str, ...]) -> None:
    """End what killed workers have left RUNNING below the parent, of these stages."""
    runs = [run for run in tracking.children_of(run_id) if tracking.stage_of(run) in stages]
    tracking.end_open_runs(runs, "KILLED")
