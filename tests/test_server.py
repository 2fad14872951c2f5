"""`make server` as its users start it: it answers, keeps what it has, asks who you are, and stops on Ctrl-C."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from conftest import EXECUTION, REPOSITORY, environment_for
from postgres import free_port, start_postgres
from servers import stop_group, wait_until_it_answers

from qexp.config import load_config
from qexp.errors import InputError
from qexp.pipeline import jobs as pipeline
from qexp.tracking.store import use_store

PASSWORD = "correct-horse-battery"


@contextmanager
def _serving(folder: Path, port: int, **variables: str) -> Iterator[None]:
    """It runs in the block, and Ctrl-C ends it. `make` takes the environment of these tests for its own."""
    own = {"SERVER_OPTIONS": f"--workers 1 {variables.pop('SERVER_OPTIONS', '')}", "PORT": str(port)}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # In another folder than the repository, which keeps its runs; without `setup`, which would make an environment.
    command = ["make", "--file", str(REPOSITORY / "Makefile"), "--assume-old", "setup", "server", f"PORT={port}"]
    with (folder / "server.log").open("w") as log:
        environment = environment_for("") | own | variables
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_it_answers(f"http://127.0.0.1:{port}", server)
            yield
        finally:
            stop_group(server, signal.SIGINT)  # as the terminal does: to all of the group
    left = [line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if line.exists()]
    assert not [line for line in left if str(port).encode() in line]


@pytest.mark.slow
def test_server_asks_who_you_are_and_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of SQLite, where no database is named."""
    port = free_port()
    monkeypatch.chdir(tmp_path)
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
    with _serving(tmp_path, port, SERVER_OPTIONS="--app-name basic-auth", **secrets):
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password")
        with pytest.raises(InputError, match="401: set MLFLOW_TRACKING_USERNAME"):
            use_store()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        train = {"epochs": "1", **{name: str(value) for name, value in EXECUTION.items()}}
        config = load_config(None, {"train": train, "data": {"image_size": "8"}})
        done = pipeline.run_train(config)
        assert done and done["fp32"] == "models:/smallnet-digits-fp32/1"
        mlflow.MlflowClient().log_text(done["run_id"], "kept", "note.txt")
        assert PASSWORD not in (tmp_path / "server.log").read_text()
    # What the server has kept, once it has ended:
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(done["run_id"])
    assert found.info.status == "FINISHED" and PASSWORD not in str(found.to_dictionary())
    assert [file.read_text() for file in tmp_path.glob("mlartifacts/**/note.txt")] == ["kept"]


@pytest.mark.slow
def test_server_takes_the_database_that_it_is_given(tmp_path: Path) -> None:
    """One on PostgreSQL, whose password is not shown."""
    port = free_port()
    with start_postgres(tmp_path) as database:
        with _serving(tmp_path, port, BACKEND_STORE_URI=database):
            mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
            assert mlflow.set_experiment("first").name == "first"
            assert database not in (tmp_path / "server.log").read_text()
        assert mlflow.MlflowClient(database).get_experiment_by_name("first")
    assert not (tmp_path / "mlflow.db").exists()
