"""What a run that did not come to its end has left in the registry, and in the artifact store: removed."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from qexp.errors import first_line
from qexp.outage import store_errors
from qexp.progress import say
from qexp.store import quickly


def discard_versions(run_id: str) -> None:
    """Delete versions and logged models of a run that did not come to its end: another will take their place."""
    client = mlflow.MlflowClient()
    for found in client.search_model_versions(f"run_id = '{run_id}'"):
        client.delete_model_version(found.name, found.version)
    for model_id in _model_ids(client, run_id):
        client.delete_logged_model(model_id)


@contextmanager
def whole_or_nothing() -> Iterator[None]:
    """A model that is logged in the active run in this block is there as a whole, or not at all.

    Raises:
        StageError: it could not be stored, for instance on a full disk.
    """
    try:
        with store_errors():
            yield
    except Exception:
        if active := mlflow.active_run():
            try:
                with quickly():
                    _remove_unfinished(active.info.run_id)
            except (MlflowException, OSError) as error:  # `--resume` and `qexp sync` will try again
                say(f"what was stored of the model could not be removed ({first_line(error)})")
        raise


def _remove_unfinished(run_id: str) -> None:
    """Its files too: they may be what fills the disk."""
    client = mlflow.MlflowClient()
    for model_id in _model_ids(client, run_id):
        model = client.get_logged_model(model_id)
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model_id)
            get_artifact_repository(model.artifact_location).delete_artifacts()


def _model_ids(client: mlflow.MlflowClient, run_id: str) -> list[str]:
    outputs = client.get_run(run_id).outputs
    return [model.model_id for model in outputs.model_outputs] if outputs else []
