"""MLflow runs: store, run tree, parameters, metrics, data set inputs and artifacts. Nothing is computed here."""

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output ends with our JSON line

import mlflow
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from qexp import metrics
from qexp.config import Config, flat_params, parse_yaml, to_yaml
from qexp.data import Dataset, Split
from qexp.errors import InputError, first_line
from qexp.evaluation import Accuracy, Comparison
from qexp.evidence import from_json, to_json
from qexp.host import Host
from qexp.latency import LatencyResult
from qexp.training import EpochResult

T = TypeVar("T")
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named
EXPERIMENT_KIND = "mlflow.experimentKind"
STORE_ANSWER_TIMEOUT_S = 10

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


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


def use_experiment(dataset_name: str) -> None:
    """One experiment a data set, unless MLflow was told another: by `mlflow run` or MLFLOW_EXPERIMENT_NAME or _ID."""
    if not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
        mlflow.set_experiment(f"qexp-{dataset_name}")


@contextmanager
def start_run(name: str, note: str) -> Iterator[str]:
    """A run that always ends: FINISHED, FAILED with its error as a tag, or KILLED on Ctrl-C and SIGTERM.

    Inside another run it is nested; inside `mlflow run` the first one is the run that MLflow has started.
    Yields its id. `note` is Markdown for the run's page.
    """
    resumed = "MLFLOW_RUN_ID" in os.environ
    run = mlflow.start_run(run_name=None if resumed else name, nested=mlflow.active_run() is not None)
    _show_as_training(run.info.experiment_id)
    if resumed and GENERATED_NAME.fullmatch(run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)
    status = RunStatus.FAILED
    try:
        mlflow.set_tags({"qexp.stage": name.split("-")[0], "mlflow.note.content": note})
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


def _show_as_training(experiment_id: str) -> None:
    """Without this tag the UI guesses, and shows its pages for language models."""
    client = mlflow.MlflowClient()
    if EXPERIMENT_KIND not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, EXPERIMENT_KIND, "custom_model_development")


def set_note(text: str) -> None:
    """Replace the Markdown note of the active run."""
    mlflow.set_tag("mlflow.note.content", text)


def log_setup(config: Config, host: Host) -> None:
    """Parameters, the resolved configuration and the host."""
    facts = {"host.cpu": host.cpu, "host.features": ",".join(host.features), "host.threads": host.threads}
    mlflow.log_params(flat_params(config) | facts)
    mlflow.log_text(to_yaml(config), "config.yaml")
    mlflow.log_text(to_json(host), "host.json")


def log_datasets(dataset: Dataset, contexts: tuple[str, ...]) -> None:
    """The splits named (train, validation, test) as data set inputs of the active run."""
    for context in contexts:
        split = getattr(dataset, context)
        _log_input(split, dataset, context, split.digest)


def log_calibration(subset: Split, dataset: Dataset, digest: str) -> None:
    """The calibration subset as an input; its digest is that of the indices."""
    _log_input(subset, dataset, "calibration", digest)


def _log_input(split: Split, dataset: Dataset, context: str, digest: str) -> None:
    arrays = split.images.numpy(), split.labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow wonders aloud which of its classes the source's name belongs to
        described = from_numpy(
            arrays[0], source=dataset.source, targets=arrays[1], name=f"{dataset.name}-{context}", digest=digest
        )
    mlflow.log_input(described, context=context)


def log_epoch(result: EpochResult) -> None:
    """The curves: step is the epoch."""
    mlflow.log_metrics(metrics.of_epoch(result), step=result.epoch)


def log_model_metrics(model_id: str, accuracy: dict[str, Accuracy], size_bytes: int, parameters: int) -> None:
    """What is known of one logged model, in the active run and on the model's own page."""
    mlflow.log_metrics(metrics.of_model(accuracy, size_bytes, parameters), model_id=model_id)


def log_comparison(model_id: str, comparison: Comparison, int8_macs_percent: float) -> None:
    """int8 against fp32 on the test images, in the active run and on the int8 model's page."""
    mlflow.log_metrics(metrics.of_comparison(comparison, int8_macs_percent), model_id=model_id)


def log_macs(macs: dict[int, int], run_id: str, model_id: str) -> None:
    """Multiply-accumulates of one model; step is the batch size."""
    for batch_size, count in macs.items():
        mlflow.log_metrics({"model/macs": count}, step=batch_size, run_id=run_id, model_id=model_id)


def log_latency(result: LatencyResult, owners: dict[str, tuple[str, str]]) -> None:
    """Both models' latency in the active run, and each one's on its own run and model; step is the batch size.

    The p50 and the speed-up are there as scalars too: a table of runs shows only the value at the largest step.

    Args:
        owners: run id and model id of "fp32" and "int8".
    """
    for row in result.rows:
        step, scalar = row.batch_size, f"_batch{row.batch_size}"
        mlflow.log_metrics({"latency/speedup": row.speedup}, step=step)
        mlflow.log_metrics({f"latency/speedup{scalar}": row.speedup})
        for kind, (run_id, model_id) in owners.items():
            stats = getattr(row, kind)
            log_own = partial(mlflow.log_metrics, run_id=run_id, model_id=model_id)
            log_own(metrics.of_latency(stats, "latency/"), step=step)
            log_own({f"latency/p50_ms{scalar}": stats.p50_ms})
            mlflow.log_metrics(metrics.of_latency(stats, f"latency/{kind}_"), step=step)
            mlflow.log_metrics({f"latency/{kind}_p50_ms{scalar}": stats.p50_ms})
    log_table(metrics.latency_table(result.rows), "latency")


def log_table(columns: dict[str, list[Any]], name: str) -> None:
    """A table of the UI, from its columns by name."""
    mlflow.log_table(columns, f"tables/{name}.json")


def log_values(values: dict[str, float], step: int | None = None) -> None:
    """Metrics of the active run that belong to no single model."""
    mlflow.log_metrics(values, step=step)


def log_result(name: str, result: object) -> None:
    """A stage's result as `results/<name>.json`, which `read_result` reads back."""
    mlflow.log_text(to_json(result), f"results/{name}.json")


def read_result(kind: type[T], run_id: str, name: str) -> T:
    """The result that a run logged under `name`.

    Raises:
        InputError: the run or the artifact is not there.
    """
    try:
        return from_json(kind, mlflow.artifacts.load_text(f"runs:/{run_id}/results/{name}.json"))
    except (MlflowException, OSError, ValueError) as error:
        raise InputError(f"run {run_id}: results/{name}.json cannot be read ({first_line(error)})") from None


def read_config(run_id: str) -> Config:
    """The resolved configuration of a run.

    Raises:
        InputError: the run or the artifact is not there.
    """
    with downloaded(f"runs:/{run_id}/config.yaml") as file:
        return parse_yaml(file.read_text())


def log_file(file: Path, folder: str) -> None:
    """One file as an artifact."""
    mlflow.log_artifact(str(file), folder)


def log_folder(folder: Path, artifact_folder: str, run_id: str) -> None:
    """All files below `folder` as artifacts of a run."""
    mlflow.log_artifacts(str(folder), artifact_folder, run_id=run_id)


@contextmanager
def new_folder(artifact_folder: str) -> Iterator[Path]:
    """An empty folder; what the block leaves in it becomes artifacts of the active run."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        mlflow.log_artifacts(folder, artifact_folder)


@contextmanager
def downloaded(uri: str) -> Iterator[Path]:
    """A local copy of an artifact (`runs:/…`) for as long as the block lasts.

    Raises:
        InputError: it is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
        except (MlflowException, OSError) as error:
            raise InputError(f"{uri}: cannot be read ({first_line(error)})") from None
        yield file
