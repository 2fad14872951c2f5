"""The server of `make server`, as a process of its own: it answers, keeps what it has, asks who you are, and stops."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from conftest import environment_for
from postgres import skip_unless_installed

from qexp.config import load_config
from qexp.errors import InputError
from qexp.pipeline import jobs as pipeline
from qexp.postgres import free_port
from qexp.tracking.store import use_store

PASSWORD = "correct-horse-battery"


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that the user postgres can reach, as those of pytest are not for root."""
    skip_unless_installed()
    folder = Path(tempfile.mkdtemp(prefix="qexp server "))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _serving(folder: Path, port: int, *options: str, **variables: str) -> Iterator[None]:
    """It runs in the block, and Ctrl-C ends it."""
    command = [sys.executable, "-m", "entrypoints.server", "--port", str(port), "--workers", "1", *options]
    environment = environment_for("") | variables
    with (folder / "server.log").open("a+") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stderr=log, start_new_session=True)
        try:
            while "Ctrl-C stops it, and the database" not in (folder / "server.log").read_text():
                assert server.poll() is None, (folder / "server.log").read_text()
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.2)
            yield
        finally:
            os.killpg(server.pid, signal.SIGINT)  # as the terminal does: to all of the group
            assert server.wait(60) == 0
    text = (folder / "server.log").read_text()
    assert text.splitlines()[-1] == "stopped" and "Traceback" not in text
    (folder / "server.log").unlink()
    left = [line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if line.exists()]
    assert not [line for line in left if str(port).encode() in line or str(folder).encode() in line]


@pytest.mark.slow
def test_server_keeps_its_runs_and_asks_who_you_are(reachable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    monkeypatch.chdir(reachable)
    with _serving(reachable, port):
        mlflow.set_tracking_uri(url)
        mlflow.set_experiment("first")
        with mlflow.start_run() as run:
            mlflow.log_text("kept", "note.txt")
        assert [file.read_text() for file in reachable.glob("mlartifacts/**/note.txt")] == ["kept"]
        refused = subprocess.run(
            [sys.executable, "-m", "entrypoints.server", "--port", str(port)],
            cwd=reachable, env=environment_for(""), capture_output=True, text=True,
        )  # fmt: skip
        assert refused.returncode == 2 and f"--port {port}: cannot be used" in refused.stderr
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
    with _serving(reachable, port, "--app-name", "basic-auth", **secrets):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password")
        with pytest.raises(InputError, match="401: set MLFLOW_TRACKING_USERNAME"):
            use_store()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/note.txt") == "kept"
        config = load_config(None, {"train": {"epochs": "1"}, "data": {"image_size": "8"}})
        done = pipeline.run_train(config)
        assert done and done["fp32"] == "models:/smallnet-digits-fp32/1"
        found = mlflow.MlflowClient().get_run(done["run_id"])
        assert found.info.status == "FINISHED" and PASSWORD not in str(found.to_dictionary())
        assert PASSWORD not in (reachable / "server.log").read_text()
