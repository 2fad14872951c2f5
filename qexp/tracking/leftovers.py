"""Models that could not be stored as a whole: what there is of them is removed, since nobody can use it.

A version of the registry is never removed here. One that a killed process has left without all its tags is found again
by its run, and completed.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from qexp.errors import StageError, StoreError, first_line
from qexp.progress import say
from qexp.tracking.outage import store_errors
from qexp.tracking.store import is_missing, quickly


def version_of_run(run_id: str, name: str) -> ModelVersion | None:
    """The version of the registered model `name` that this run has made, complete or not."""
    found = mlflow.MlflowClient().search_model_versions(f"run_id = '{run_id}'")
    return next((version for version in found if version.name == name), None)


def discard_unregistered(run_id: str, others: Collection[str] = ()) -> None:
    """Delete logged models of a run, but for `others`, that never became a version, and their files."""
    client = mlflow.MlflowClient()
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    used = {version.model_id or str(version.source).removeprefix("models:/") for version in versions}
    for model_id in _models_of(run_id) - used - set(others):
        try:
            location = client.get_logged_model(model_id).artifact_location
        except MlflowException as error:
            if is_missing(error):  # it was removed before
                continue
            raise
        with suppress(MlflowException, OSError):  # first, since these may be what fills the disk of the database, too
            get_artifact_repository(location).delete_artifacts()
        client.delete_logged_model(model_id)


def _models_of(run_id: str) -> set[str]:
    """The logged models of a run: its outputs, and what was begun in it and had not become an output yet."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    begun = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    outputs = run.outputs.model_outputs if run.outputs else []
    return {output.model_id for output in outputs} | {model.model_id for model in begun}


@contextmanager
def version_or_nothing() -> Iterator[None]:
    """A model that is registered in the active run in this block becomes a version, or leaves nothing in the store.

    Raises:
        StageError: it could not be stored, for instance on a full disk.
    """
    active = mlflow.active_run()
    assert active is not None
    with store_errors():
        before = _models_of(active.info.run_id)
    try:
        with store_errors():
            yield
    except BaseException as error:
        try:
            with quickly():
                discard_unregistered(active.info.run_id, before)
        except (MlflowException, OSError) as problem:  # `--resume` and `qexp sync` will try again
            say(f"the partly stored model could not be removed ({first_line(problem)})")
        if isinstance(error, Exception) and not isinstance(error, StageError):  # torch has its own for a full disk
            raise StoreError(f"the model cannot be stored: {first_line(error)}") from error
        raise
