"""MLflow runs: store, run tree, parameters, metrics, data set inputs and artifacts. Nothing is computed here."""

import logging
import os
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
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from qexp import metrics
from qexp.config import Config, flat_params, parse_yaml, to_yaml
from qexp.data import Dataset, Split
from qexp.errors import InputError, first_line
from qexp.evaluation import Accuracy, Comparison
from qexp.evidence import from_json, to_json
from qexp.host import Host
from qexp.latency import LatencyResult
from qexp.tracking.runs import RunFacts, children_of, end_open_runs, find_run, start_run, use_experiment, use_store
from qexp.training import EpochResult

__all__ = ["RunFacts", "children_of", "end_open_runs", "find_run", "start_run", "use_experiment", "use_store"]
T = TypeVar("T")

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def set_note(text: str) -> None:
    """Replace the Markdown note of the active run."""
    mlflow.set_tag("mlflow.note.content", text)


def set_tag(name: str, value: str) -> None:
    """A tag of the active run."""
    mlflow.set_tag(name, value)


def _active_run() -> Run:
    """As the store has it now."""
    active = mlflow.active_run()
    assert active is not None
    return mlflow.MlflowClient().get_run(active.info.run_id)


def log_setup(config: Config, host: Host) -> None:
    """Parameters, the resolved configuration and the host. A run that goes on keeps the parameters that it has."""
    facts = {"host.cpu": host.cpu, "host.features": ",".join(host.features), "host.threads": host.threads}
    logged = _active_run().data.params
    mlflow.log_params({name: value for name, value in (flat_params(config) | facts).items() if name not in logged})
    mlflow.log_text(to_yaml(config), "config.yaml")
    mlflow.log_text(to_json(host), "host.json")


def log_datasets(dataset: Dataset, contexts: tuple[str, ...]) -> None:
    """The splits named (train, validation, test) as data set inputs of the active run, those that it lacks."""
    inputs = _active_run().inputs
    logged = {given.dataset.name for given in inputs.dataset_inputs} if inputs else set()
    for context in contexts:
        split = getattr(dataset, context)
        if f"{dataset.name}-{context}" not in logged:
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
