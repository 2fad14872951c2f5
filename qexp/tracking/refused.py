"""The reason on a run that `mlflow run` has started, and that ended before a stage took it: for a wrong option."""

import mlflow
from mlflow.entities import RunStatus

from qexp.tracking.address import check, connect, use_plain_paths
from qexp.tracking.store import quickly


def end_refused(run_id: str, reason: str) -> None:
    """Tag the run with `reason` as `qexp.error`, and end it as FAILED. A store that does not answer is ignored: the
    reason is on standard error as well."""
    try:
        with quickly():
            for address in use_plain_paths():  # MLflow would make a database where there is none
                check(address)
                connect(address)
            client = mlflow.MlflowClient()
            client.set_tag(run_id, "qexp.error", reason)
            client.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
    except Exception:  # any library's: of the database, of the connection
        return
