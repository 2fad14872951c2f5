"""MLflow's tracking: run tree, parameters, metrics, inputs and outputs, artifacts. Nothing is computed here.

What the stages give is logged here under the names of `metrics.py`; docs/reference/mlflow.md shows what comes out.
"""

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow
import numpy as np
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric, RunStatus
from mlflow.entities import Run as Run
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from qexp.config import Config, flat_params, parse_yaml, to_yaml
from qexp.data.datasets import Dataset, Split
from qexp.errors import InputError, first_line, naming_copies
from qexp.files import from_json, to_json
from qexp.foundation.text import as_markdown
from qexp.measurement.host import Host
from qexp.progress import say
from qexp.tracking import metrics, outage
from qexp.tracking.job_folder import forget_end, job_folder
from qexp.tracking.limits import short_param
from qexp.tracking.outage import store_errors
from qexp.tracking.store import again, all_pages, is_missing, store_name

T = TypeVar("T")
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named
TO_RESUME = {  # a run of a stage that was stopped
    "main": "`qexp run --resume {}` resumes it",
    "train": "`qexp train --resume {}` resumes it",
    "search": "the same command resumes it",
}
# The sections of the configuration that a stage's work depends on: their options, and those of every stage, are the
# parameters of its run.
OF_EVERY_STAGE = ("config.model", "config.seed", "config.threads")
SECTIONS = {
    "train": ("data", "preprocess", "train"),
    "import": ("data", "preprocess"),
    "sensitivity": ("data", "preprocess", "quantize"),
    "quantize": ("data", "preprocess", "quantize"),
    "latency": ("latency",),
    "throughput": ("throughput",),
    "report": ("gate",),
    "promote": ("latency", "gate"),
    "search": ("data", "preprocess", "quantize", "search"),
}
# A job's run has of all sections what differs from the defaults, and these in any case.
OF_EVERY_JOB = (
    "config.model", "config.seed", "data.dataset", "data.image_size", "train.epochs",
    "quantize.engine", "quantize.calibration_samples", "quantize.observer", "latency.batch_sizes",
)  # fmt: skip
AUTO = "auto"  # how a parameter reads that was neither given nor settled
NOTE = "mlflow.note.content"
EXPERIMENT_KIND = "mlflow.experimentKind"
ABOUT_EXPERIMENT = """Can an image classifier ship as int8 on this CPU?

A job of qexp is a run named after its model and data; its stages are the runs below it. The tags `qexp.verdict` and
`qexp.engine` and the metrics `headline/…` give the answer: *Views* > *Verdicts* shows them as columns."""
# A saved view of the table of runs, as the UI's button *Views* stores it: the answer as columns, jobs only.
VIEW = "mlflow.sharedViewState.qexp-verdicts"
VIEW_COLUMNS = (
    *(f"tags.`qexp.{name}`" for name in ("verdict", "engine")),
    *(f"metrics.`headline/{name}`" for name in metrics.HEADLINE),
)


def use_experiment(dataset_name: str, resume: str | None = None) -> None:
    """One experiment a data set, unless MLflow was told another: by `mlflow run` or MLFLOW_EXPERIMENT_NAME or _ID.

    A resumed run stays in its own. StoreError if it was deleted, or may not be used.
    """
    with store_errors():  # one that was deleted, or that basic-auth refuses
        if resume:
            mlflow.set_experiment(experiment_id=mlflow.MlflowClient().get_run(resume).info.experiment_id)
        elif not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            found = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", f"qexp-{dataset_name}"))
            mlflow.set_experiment(experiment_id=found.experiment_id)  # of two that make it at once, MLflow sets one's


@contextmanager
def start_run(name: str, note: str, resume: str | None = None, stage: str | None = None) -> Iterator[str]:
    """A run that always ends: FINISHED, FAILED with its error as a tag, or KILLED on Ctrl-C and SIGTERM.

    Inside another run it is nested; inside `mlflow run` the first one is the run that MLflow has started. With `resume`
    it is that run, resumed. Yields its id. Raises StageError if the store fails; whatever else happens in the block is
    raised as it is.

    Args:
        note: Markdown for the run's page; values of others in it are `opaque`.
        stage: main, train, quantize, …, by which the run is found again; None: what `name` begins with.
    """
    stage = stage or name.split("-")[0]
    told = mlflow.active_run() is not None or "MLFLOW_RUN_ID" in os.environ
    with store_errors():
        run = _begin(name, resume, {"qexp.stage": stage, NOTE: as_markdown(note)})
    if not told:
        say(f"run {run.info.run_id}")
    job = job_folder(run.data.tags.get("mlflow.parentRunId", run.info.run_id))
    forget_end(job, run.info.run_id)
    try:
        _describe_experiment(run.info.experiment_id)
        yield run.info.run_id
        mlflow.end_run()
    except (KeyboardInterrupt, SystemExit):
        outage.end_run(run.info.run_id, RunStatus.KILLED, job)
        if not told and (hint := TO_RESUME.get(stage)):
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
        mlflow.MlflowClient().set_tag(given, NOTE, f"Resumed as run `{resume}`.")
    if GENERATED_NAME.fullmatch(run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)
    return run


def _describe_experiment(experiment_id: str) -> None:
    """What an experiment's page shows, where nobody has set it: its kind, without which the UI guesses and shows its
    pages for language models; a description; a view of the table of runs. MLflow's Default belongs to others too."""
    client = mlflow.MlflowClient()
    found = client.get_experiment(experiment_id)
    wanted = {EXPERIMENT_KIND: "custom_model_development"}
    if found.name != "Default":
        wanted |= {NOTE: ABOUT_EXPERIMENT, VIEW: _view()}
    for key, value in wanted.items():
        if key not in found.tags:
            again(partial(client.set_experiment_tag, experiment_id, key, value))


def _view() -> str:
    now = round(1000 * time.time())
    state: dict[str, Any] = {"searchFilter": "tags.`qexp.stage` = 'main'", "selectedColumns": VIEW_COLUMNS}
    # Pixels: columns are too narrow for their names otherwise.
    state |= {
        "columnOrder": VIEW_COLUMNS,
        "columnWidths": {name: max(190, 7 * len(name) - 30) for name in VIEW_COLUMNS},
    }
    return json.dumps({"name": "Verdicts", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


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


def active_run_id() -> str:
    """The active run's id, without asking the store."""
    active = mlflow.active_run()
    assert active is not None
    return str(active.info.run_id)


def run_page(run_id: str) -> str:
    """Where the MLflow UI shows a run of the active run's experiment; the empty text where no server is known."""
    active, server = mlflow.active_run(), urlsplit(mlflow.get_tracking_uri())
    if active is None or server.scheme not in ("http", "https"):
        return ""
    host = server.netloc.rpartition("@")[2]  # without a password
    page = f"#/experiments/{active.info.experiment_id}/runs/{run_id}"
    return f"{server.scheme}://{host}{server.path.rstrip('/')}/{page}"


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
    """Replace the Markdown note of the active run; values of others in it are `opaque`."""
    set_tag(NOTE, as_markdown(text))


def set_tag(name: str, value: str) -> None:
    """A tag of the active run."""
    mlflow.set_tag(name, value)


def _active_run() -> Run:
    active = mlflow.active_run()
    assert active is not None
    return mlflow.MlflowClient().get_run(active.info.run_id)


def log_setup(config: Config, host: Host) -> None:
    """Parameters, the resolved configuration and the host. A resumed run keeps the parameters that it has; those that
    training will settle by timing are logged once it has."""
    run = _active_run()
    params = params_of(stage_of(run), config) | {"host.cpu": host.cpu}
    mlflow.log_params({name: short_param(value) for name, value in params.items() if name not in run.data.params})
    with store_errors():
        mlflow.log_text(to_yaml(config), "config.yaml")
        mlflow.log_text(to_json(host), "host.json")


def params_of(stage: str, config: Config) -> dict[str, Any]:
    """What was given or settled and matters for a stage: the options of its sections, or of a whole job those that are
    not the defaults. config.yaml has all others."""
    values, defaults = flat_params(config), flat_params(Config())
    known = {name: value for name, value in values.items() if value not in (AUTO, {})}
    if config.quantize.percentile_used is None:
        known.pop("quantize.percentile")
    if config.quantize.max_top1_drop is None:
        known.pop("quantize.max_tries")
    if stage not in SECTIONS:
        return {name: known[name] for name in known if name in OF_EVERY_JOB or known[name] != defaults[name]}
    return {name: known[name] for name in known if name in OF_EVERY_STAGE or name.split(".")[0] in SECTIONS[stage]}


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
    # MLflow wants shape and type alone, and has a digest: an array of one value, repeated, has both without memory.
    images, labels = np.broadcast_to(np.uint8(0), tuple(split.images.shape)), split.labels.numpy()
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
    """Metrics of the active run, or of `owner` (ids of run and model), in one request; `step` is the epoch or the batch
    size. What a model has reached on a split carries that data set, an input of the run.

    Logged again with the same time `at_ms`, in ms since 1970, they are there once.
    """
    run_id, model_id = owner or (_active_run().info.run_id, None)
    client, at_ms = mlflow.MlflowClient(), at_ms or round(1000 * time.time())
    splits = {name: metrics.split_of(name) for name in values} if model_id else {}
    datasets = _datasets_of(client.get_run(run_id)) if any(splits.values()) else {}
    points = []
    for name, value in values.items():
        dataset, digest = datasets.get(splits.get(name) or "", (None, None))
        points.append(Metric(name, value, at_ms, step or 0, model_id, dataset, digest, run_id))
    client.log_batch(run_id, metrics=points)


def _datasets_of(run: Run) -> dict[str, tuple[str, str]]:
    """Name and digest of the data sets that a run has as inputs, by what they are used for."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {tag.value: (found.dataset.name, found.dataset.digest) for found in inputs for tag in found.tags}


def log_models(inputs: Iterable[str] = (), outputs: Iterable[str] = ()) -> None:
    """Logged models, by their ids, that the active run has read or made, those that it lacks: its page shows them."""
    run, client = _active_run(), mlflow.MlflowClient()
    read = {found.model_id for found in run.inputs.model_inputs} if run.inputs else set[str]()
    made = {found.model_id for found in run.outputs.model_outputs} if run.outputs else set[str]()
    with store_errors():
        if new := [LoggedModelInput(one) for one in dict.fromkeys(inputs) if one not in read]:
            client.log_inputs(run.info.run_id, models=new)
        if new_outputs := [LoggedModelOutput(one, 0) for one in dict.fromkeys(outputs) if one not in made]:
            client.log_outputs(run.info.run_id, new_outputs)


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
        InputError: the run or the artifact is not there, or is damaged: what it says is none of the values that a
            result can have.
    """
    file = f"results/{name}.json"
    text = _read_text(run_id, file)
    try:
        return from_json(kind, text)
    except ValidationError as error:
        first = error.errors()[0]
        why = " at ".join([first["msg"], *filter(None, [".".join(map(str, first["loc"]))])])
    except ValueError as error:
        why = str(error)
    raise InputError(f"runs:/{run_id}/{file}: is damaged ({why})")


def read_config(run_id: str) -> Config:
    """The resolved configuration of a run.

    Raises:
        InputError: the run or the artifact is not there.
    """
    return parse_yaml(_read_text(run_id, "config.yaml"))


def _read_text(run_id: str, path: str) -> str:
    uri = f"runs:/{run_id}/{path}"
    with downloaded(uri) as file:
        try:
            return file.read_text()
        except (OSError, ValueError) as error:  # a folder, or no text
            raise InputError(f"{uri}: is damaged ({first_line(error)})") from None


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
        with naming_copies(folder, uri):
            yield file
