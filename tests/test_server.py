"""What `make server` gives to MLflow's server, and a server that asks who one is.

`make server` itself is started in tests/test_mlflow_run.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import mlflow
import pytest
from servers import command_of_make, start_server

from qexp.errors import InputError
from qexp.tracking.runs import start_run, use_experiment
from qexp.tracking.store import use_store

# In place of `mlflow`: what it was told.
PROGRAM = """#!/bin/sh
echo "$@"
echo "$MLFLOW_BACKEND_STORE_URI ${MLFLOW_TRACKING_URI-unset}"
"""
PASSWORD = "correct-horse-battery"
GIVEN = "postgresql://me:secret@db/mlflow"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("variables", "store", "more"),
    [
        ({}, "sqlite:///mlflow.db", "--artifacts-destination mlartifacts"),
        ({"BACKEND_STORE_URI": GIVEN}, GIVEN, "--artifacts-destination mlartifacts"),
        (
            {"ARTIFACTS_DESTINATION": "s3://bucket/x", "SERVER_OPTIONS": "--workers 2"},
            "sqlite:///mlflow.db",
            "--artifacts-destination s3://bucket/x --workers 2",
        ),
    ],
)
def test_the_server_gets_what_the_environment_says(
    variables: dict[str, str], store: str, more: str, tmp_path: Path
) -> None:
    program = tmp_path / "mlflow"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    environment = dict(os.environ) | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | variables
    environment["MLFLOW_TRACKING_URI"] = "sqlite:///of-the-user.db"
    done = subprocess.run(command_of_make(5001), cwd=tmp_path, env=environment, capture_output=True, text=True)
    words, stores = done.stdout.splitlines()[-2:]
    assert words.split() == f"server --host 127.0.0.1 --port 5001 {more}".split() and stores == f"{store} unset"
    assert "secret" not in done.stdout.replace(stores, "") + done.stderr


@pytest.mark.slow
def test_server_asks_who_you_are_and_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few requests: it takes a tenth of a second to check a password."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "of this test")
    with start_server(tmp_path, "", None, "--app-name", "basic-auth") as server:
        mlflow.set_tracking_uri(server.url)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password")
        with pytest.raises(InputError, match="401: set MLFLOW_TRACKING_USERNAME"):
            use_store()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        use_store()
        use_experiment("digits")
        with start_run("train-x", "note") as run_id:
            mlflow.log_text("kept", "note.txt")
        assert PASSWORD not in (tmp_path / "server.log").read_text()
    # What the server has kept, once it has ended:
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id)
    assert found.info.status == "FINISHED" and PASSWORD not in str(found.to_dictionary())
    assert [file.read_text() for file in tmp_path.glob("artifacts/**/note.txt")] == ["kept"]
