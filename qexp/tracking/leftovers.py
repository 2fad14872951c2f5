"""What a run that did not come to its end has left in the registry, and in the artifact store: removed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from qexp.errors import StageError, StoreError, first_line
from qexp.progress import say
from qexp.tracking.outage import store_errors
from qexp.tracking.store import is_missing, quickly


def discard_versions(run_id: str) -> None:
    """Delete versions, logged models and their files of a run that did not come to its end: others take their place."""
    client = mlflow.MlflowClient()
    for found in client.search_model_versions(f"run_id = '{run_id}'"):
        client.delete_model_version(found.name, found.version)
    for model_id in _model_ids(client, run_id):
        try:
            location = client.get_logged_model(model_id).artifact_location
        except MlflowException as error:
            if is_missing(error):  # it was removed before
                continue
            raise
        with suppress(MlflowException, OSError):  # first, since these may be what fills the disk of the database, too
            get_artifact_repository(location).delete_artifacts()
        client.delete_logged_model(model_id)


@contextmanager
def whole_or_nothing() -> Iterator[None]:
    """A version that is registered in the active run in this block is there as a whole, or not at all.

    Raises:
        StageError: it could not be stored, for instance on a full disk.
    """
    try:
        with store_errors():
            yield
    except BaseException as error:
        if active := mlflow.active_run():
            try:
                with quickly():
                    discard_versions(active.info.run_id)
            except (MlflowException, OSError) as problem:  # `--resume` and `qexp sync` will try again
                say(f"the partly stored model could not be removed ({first_line(problem)})")
        if isinstance(error, Exception) and not isinstance(error, StageError):  # torch has its own for a full disk
            raise StoreError(f"the model cannot be stored: {first_line(error)}") from error
        raise


def _model_ids(client: mlflow.MlflowClient, run_id: str) -> list[str]:
    outputs = client.get_run(run_id).outputs
    return [model.model_id for model in outputs.model_outputs] if outputs else []
