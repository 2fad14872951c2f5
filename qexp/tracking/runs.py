"""MLflow's tracking: store, run tree, parameters, metrics, data set inputs and artifacts. Nothing is computed here."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Run as Run
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from qexp.config import Config, flat_params, parse_yaml, to_yaml
from qexp.data.datasets import Dataset, Split
from qexp.errors import InputError, first_line
from qexp.files import from_json, to_json
from qexp.measurement.host import Host
from qexp.progress import say
from qexp.tracking import outage
from qexp.tracking.job_folder import forget_end, job_folder
from qexp.tracking.outage import store_errors
from qexp.tracking.store import again, all_pages, is_missing, store_name

T = TypeVar("T")
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named
GOING_ON = {  # how a run of a stage that was stopped goes on
    "main": "`qexp run --resume {}` goes on",
    "train": "`qexp train --resume {}` goes on",
    "search": "the same command goes on",
}
SETTLED_BY_TIMING = ("train.bf16", "train.channels_last", "train.train_threads")
EXPERIMENT_KIND = "mlflow.experimentKind"


def use_experiment(dataset_name: str, resume: str | None = None) -> None:
    """One experiment a data set, unless MLflow was told another: by `mlflow run` or MLFLOW_EXPERIMENT_NAME or _ID.

    A run that goes on stays in its own. StoreError if it was deleted, or may not be used.
    """
    with store_errors():  # one that was deleted, or that basic-auth refuses
        if resume:
            mlflow.set_experiment(experiment_id=mlflow.MlflowClient().get_run(resume).info.experiment_id)
        elif not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            found = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", f"qexp-{dataset_name}"))
            mlflow.set_experiment(experiment_id=found.experiment_id)  # of two that make it at once, MLflow sets one's


@contextmanager
def start_run(name: str, note: str, resume: str | None = None) -> Iterator[str]:
    """A run that always ends: FINISHED, FAILED with its error as a tag, or KILLED on Ctrl-C and SIGTERM.

    Inside another run it is nested; inside `mlflow run` the first one is the run that MLflow has started. With `resume`
    it is that run, which goes on. Yields its id. `note` is Markdown for the run's page. Raises StageError if the store
    fails; whatever else happens in the block is raised as it is.
    """
    told = mlflow.active_run() is not None or "MLFLOW_RUN_ID" in os.environ
    with store_errors():
        run = _begin(name, resume, {"qexp.stage": name.split("-")[0], "mlflow.note.content": note})
    if not told:
        say(f"run {run.info.run_id}")
    job = job_folder(run.data.tags.get("mlflow.parentRunId", run.info.run_id))
    forget_end(job, run.info.run_id)
    try:
        _show_as_training(run.info.experiment_id)
        yield run.info.run_id
        mlflow.end_run()
    except (KeyboardInterrupt, SystemExit):
        outage.end_run(run.info.run_id, RunStatus.KILLED, job)
        if not told and (hint := GOING_ON.get(name.split("-")[0])):
            say(f"stopped; {hint.format(run.info.run_id)}")
        raise
    except Exception as error:
        error = outage.explain(error, job)
        outage.end_run(run.info.run_id, RunStatus.FAILED, job, error)
        raise error


def _begin(name: str, resume: str | None, tags: dict[str, str]) -> mlflow.ActiveRun:
    nested = mlflow.active_run() is not None
    given = None if nested else os.environ.pop("MLFLOW_RUN_ID", None)  # by `mlflow run`, or by the launcher
    if resume is None and given is None:
        return mlflow.start_run(run_name=name, nested=nested, tags=tags)
    run = mlflow.start_run(run_id=resume or given, nested=nested)
    mlflow.set_tags(tags)
    if "qexp.error" in run.data.tags:
        mlflow.delete_tag("qexp.error")
    if given and resume and given != resume:
        mlflow.MlflowClient().set_tag(given, "mlflow.note.content", f"Resumed as run `{resume}`.")
    if GENERATED_NAME.fullmatch(run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)
    return run


def _show_as_training(experiment_id: str) -> None:
    """Without this tag the UI guesses, and shows its pages for language models."""
    client = mlflow.MlflowClient()
    if EXPERIMENT_KIND not in client.get_experiment(experiment_id).tags:
        again(lambda: client.set_experiment_tag(experiment_id, EXPERIMENT_KIND, "custom_model_development"))


def find_run(run_id: str, option: str = "--resume") -> Run:
    """A run of the store, which `option` has named.

    Raises:
        InputError: there is none, or it was deleted.
    """
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
        where = "give the command in the folder where the run was started, or set MLFLOW_TRACKING_URI"
        raise InputError(f"{option} {run_id}: no such run in {store_name()} ({first_line(error)}); {where}") from None
    if run.info.lifecycle_stage != "active":
        raise InputError(f"{option} {run_id}: this run was deleted; restore it first (mlflow runs restore)")
    return run


def children_of(run_id: str) -> list[Run]:
    """The runs below a run, newest first."""
    experiment = mlflow.MlflowClient().get_run(run_id).info.experiment_id
    below = f"tags.mlflow.parentRunId = '{run_id}'"
    return list(all_pages(partial(mlflow.MlflowClient().search_runs, [experiment], below)))


def stage_of(run: Run) -> str:
    """The stage whose run this is: main, train, quantize, …; the empty text if it is not ours."""
    return str(run.data.tags.get("qexp.stage", ""))


def end_open_runs(runs: list[Run], status: str, error: str = "") -> None:
    """End the runs that a killed process has left in RUNNING."""
    for run in runs:
        if run.info.status == "RUNNING":
            if error:
                mlflow.MlflowClient().set_tag(run.info.run_id, "qexp.error", error)
            mlflow.MlflowClient().set_terminated(run.info.run_id, status)


def logged_steps(run_id: str, metric: str) -> set[int]:
    """The steps at which a run has logged a metric."""
    return {point.step for point in mlflow.MlflowClient().get_metric_history(run_id, metric)}


def set_note(text: str) -> None:
    """Replace the Markdown note of the active run."""
    set_tag("mlflow.note.content", text)


def set_tag(name: str, value: str) -> None:
    """A tag of the active run."""
    mlflow.set_tag(name, value)


def _active_run() -> Run:
    active = mlflow.active_run()
    assert active is not None
    return mlflow.MlflowClient().get_run(active.info.run_id)


def log_setup(config: Config, host: Host) -> None:
    """Parameters, the resolved configuration and the host. A run that goes on keeps the parameters that it has; those
    that training will settle by timing are logged once it has."""
    facts = {"host.cpu": host.cpu, "host.features": ",".join(host.features), "host.threads": host.threads}
    facts |= {"host.physical_cores": host.physical_cores, "host.cpu_quota": host.cpu_quota or "none"}
    logged = _active_run().data.params
    params = flat_params(config) | facts
    waiting = [name for name in SETTLED_BY_TIMING if params[name] == "auto"]
    mlflow.log_params({name: value for name, value in params.items() if name not in [*logged, *waiting]})
    with store_errors():
        mlflow.log_text(to_yaml(config), "config.yaml")
        mlflow.log_text(to_json(host), "host.json")


def log_datasets(dataset: Dataset, contexts: tuple[str, ...]) -> None:
    """The splits named (train, validation, test) as data set inputs of the active run, those that it lacks."""
    inputs = _active_run().inputs
    logged = {given.dataset.name for given in inputs.dataset_inputs} if inputs else set()
    for context in contexts:
        if f"{dataset.name}-{context}" not in logged:
            split = getattr(dataset, context)
            log_dataset(split, dataset, context, split.digest)


def log_dataset(split: Split, dataset: Dataset, context: str, digest: str) -> None:
    """Some images of a data set as an input of the active run; `context` is what they are used for."""
    images, labels = split.images.numpy(), split.labels.numpy()
    name = f"{dataset.name}-{context}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow wonders aloud which of its classes the source's name belongs to
        described = from_numpy(images, source=dataset.source, targets=labels, name=name, digest=digest)
    again(lambda: mlflow.log_input(described, context=context))


def log_metrics(
    values: dict[str, float],
    step: int | None = None,
    owner: tuple[str, str | None] | None = None,
    at_ms: int | None = None,
) -> None:
    """Metrics of the active run, or of `owner` (ids of run and model); `step` is the epoch or the batch size.

    Logged again with the same time `at_ms`, in ms since 1970, they are there once.
    """
    run_id, model_id = owner or (None, None)
    mlflow.log_metrics(values, step=step, run_id=run_id, model_id=model_id, timestamp=at_ms)


def log_table(columns: dict[str, list[Any]], name: str) -> None:
    """A table of the UI, from its columns by name; it takes the place of one that is there."""
    file = f"tables/{name}.json"
    with store_errors():
        if file in [found.path for found in mlflow.MlflowClient().list_artifacts(_active_run().info.run_id, "tables")]:
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            mlflow.log_dict({"columns": list(columns), "data": rows}, file)  # to which MLflow would append
        else:
            mlflow.log_table(columns, file)


def log_text(text: str, file: str) -> None:
    """A text artifact of the active run."""
    with store_errors():
        mlflow.log_text(text, file)


def log_result(name: str, result: object) -> None:
    """A stage's result as `results/<name>.json`, which `read_result` reads back."""
    log_text(to_json(result), f"results/{name}.json")


def read_result(kind: type[T], run_id: str, name: str) -> T:
    """The result that a run logged under `name`.

    Raises:
        InputError: the run or the artifact is not there.
    """
    return from_json(kind, _read_text(run_id, f"results/{name}.json"))


def read_config(run_id: str) -> Config:
    """The resolved configuration of a run.

    Raises:
        InputError: the run or the artifact is not there.
    """
    return parse_yaml(_read_text(run_id, "config.yaml"))


def _read_text(run_id: str, path: str) -> str:
    with downloaded(f"runs:/{run_id}/{path}") as file:
        return file.read_text()


def log_folder(folder: Path, artifact_folder: str, run_id: str | None = None) -> None:
    """All files below `folder` as artifacts of a run, the active one unless named."""
    with store_errors():
        mlflow.log_artifacts(str(folder), artifact_folder, run_id=run_id)


@contextmanager
def downloaded(uri: str) -> Iterator[Path]:
    """A local copy of an artifact (`runs:/…`) for as long as the block lasts; InputError if it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
        except (MlflowException, OSError) as error:
            raise InputError(f"{uri}: cannot be read ({first_line(error)})") from None
        yield file
