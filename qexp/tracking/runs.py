"""Runs of MLflow: the store, the experiment, how a run begins and ends, and what is known of one."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException

from qexp import metrics
from qexp.errors import InputError, first_line

GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named
EXPERIMENT_KIND = "mlflow.experimentKind"
STORE_ANSWER_TIMEOUT_S = 10


def use_store() -> None:
    """Check once, without MLflow's minutes of retries, that the tracking store answers.

    Raises:
        InputError: it does not; the message names its URI.
    """
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(STORE_ANSWER_TIMEOUT_S)}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update(patience)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:  # no server, wrong scheme, no database driver, a store of another version: any library's
        raise InputError(
            f"MLFLOW_TRACKING_URI {mlflow.get_tracking_uri()}: the tracking store does not answer "
            f"({first_line(error)}); start it, or unset the variable to use sqlite:///mlflow.db"
        ) from None
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def use_experiment(dataset_name: str, resume: str | None = None) -> None:
    """One experiment a data set, unless MLflow was told another: by `mlflow run` or MLFLOW_EXPERIMENT_NAME or _ID.

    A run that goes on stays in its own.
    """
    if resume:
        mlflow.set_experiment(experiment_id=mlflow.MlflowClient().get_run(resume).info.experiment_id)
    elif not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
        mlflow.set_experiment(f"qexp-{dataset_name}")


@contextmanager
def start_run(name: str, note: str, resume: str | None = None) -> Iterator[str]:
    """A run that always ends: FINISHED, FAILED with its error as a tag, or KILLED on Ctrl-C and SIGTERM.

    Inside another run it is nested; inside `mlflow run` the first one is the run that MLflow has started. With `resume`
    it is that run, which goes on. Yields its id. `note` is Markdown for the run's page.
    """
    run = _begin(name, resume, {"qexp.stage": name.split("-")[0], "mlflow.note.content": note})
    status = RunStatus.FAILED
    try:
        _show_as_training(run.info.experiment_id)
        yield run.info.run_id
        status = RunStatus.FINISHED
    except (KeyboardInterrupt, SystemExit):
        status = RunStatus.KILLED
        raise
    except Exception as error:
        mlflow.set_tag("qexp.error", f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        mlflow.end_run(RunStatus.to_string(status))


def _begin(name: str, resume: str | None, tags: dict[str, str]) -> mlflow.ActiveRun:
    nested = mlflow.active_run() is not None
    given = None if nested else os.environ.pop("MLFLOW_RUN_ID", None)  # by `mlflow run`, or by the launcher
    if resume is None and given is None:
        return mlflow.start_run(run_name=name, nested=nested, tags=tags)
    run = mlflow.start_run(run_id=resume or given, nested=nested)
    mlflow.set_tags(tags)
    mlflow.delete_tag("qexp.error") if "qexp.error" in run.data.tags else None
    if given and resume and given != resume:
        mlflow.MlflowClient().set_tag(given, "mlflow.note.content", f"Went on with run `{resume}`.")
    if GENERATED_NAME.fullmatch(run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)
    return run


def _show_as_training(experiment_id: str) -> None:
    """Without this tag the UI guesses, and shows its pages for language models."""
    client = mlflow.MlflowClient()
    if EXPERIMENT_KIND not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, EXPERIMENT_KIND, "custom_model_development")


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run: its stage (main, train, …), status, the run above it, the epochs that it has logged."""

    run_id: str
    stage: str
    status: str
    parent_id: str | None
    model_uri: str | None
    epochs: tuple[int, ...]


def find_run(run_id: str) -> RunFacts:
    """Raises InputError if there is no such run."""
    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise InputError(
            f"--resume {run_id}: no such run in {mlflow.get_tracking_uri()} ({first_line(error)})"
        ) from None
    if run.info.lifecycle_stage != "active":
        raise InputError(f"--resume {run_id}: this run was deleted; restore it first (mlflow runs restore)")
    return _facts(run)


def _facts(run: Run) -> RunFacts:
    tags = run.data.tags
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, metrics.FIRST_OF_EPOCH)
    return RunFacts(
        run_id=run.info.run_id,
        stage=tags.get("qexp.stage", ""),
        status=run.info.status,
        parent_id=tags.get("mlflow.parentRunId"),
        model_uri=tags.get("qexp.model_uri"),
        epochs=tuple(sorted({metric.step for metric in history})),
    )


def children_of(run_id: str) -> list[RunFacts]:
    """The runs below a run, newest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    return [_facts(run) for run in client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")]


def end_open_runs(runs: list[RunFacts], status: str) -> None:
    """End the runs that a killed process has left in RUNNING."""
    for run in runs:
        if run.status == "RUNNING":
            mlflow.MlflowClient().set_terminated(run.run_id, status)
