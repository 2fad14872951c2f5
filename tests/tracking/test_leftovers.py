"""A disk that fills while a model is logged: a small file system of its own, before SQLite and behind a server."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import run_qexp
from mlflow.entities import LoggedModelStatus
from servers import start_server
from stores import new_store

from qexp.data.datasets import Dataset
from qexp.errors import StageError
from qexp.models.classifier import Classifier
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.training.train import TrainResult

SMALL = "size=2500k"  # takes the weights of SmallNet, 1.8 MB, but not its exported program too


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 2.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", SMALL, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a small file system, and mounting is not permitted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _models(client: mlflow.MlflowClient) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [str(model.status) for model in client.search_logged_models(experiments)]


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_full_disk_leaves_no_model_and_sync_finishes_the_run(tmp_path: Path, small_disk: Path) -> None:
    uri = new_store(tmp_path)
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("qexp-digits", artifact_location=str(small_disk))
    done = run_qexp(tmp_path, "train", "--epochs", "1", "--image-size", "8", uri=uri)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in error and "`qexp sync checkpoints" in error
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FAILED" and "No space left" in run.data.tags["qexp.error"]
    assert client.search_model_versions() == [] and _models(client) == []
    assert not [file for file in small_disk.rglob("model.pt2")]

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = run_qexp(tmp_path, "sync", f"checkpoints/{run.info.run_id}", uri=uri)
    assert done.code == 0 and done.summary["status"] == "FINISHED", done.stderr
    assert _models(client) == [LoggedModelStatus.READY]
    (version,) = client.search_model_versions()
    assert version.tags["verified"] == "true"
    assert "qexp.error" not in client.get_run(run.info.run_id).data.tags


@pytest.mark.slow
def test_full_disk_behind_a_server_leaves_no_model(
    tmp_path: Path,
    small_disk: Path,
    trained: tuple[Classifier, TrainResult],
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    model, _ = trained
    (small_disk / "ballast").write_bytes(os.urandom(1_500_000))
    with start_server(tmp_path, artifacts=small_disk) as server:
        mlflow.set_tracking_uri(server.url)
        tracking.use_experiment("test")
        before = _bytes_below(small_disk)
        with pytest.raises(StageError, match="see the server's log"), tracking.start_run("train-smallnet", "note"):
            registry.register("fp32", model, "digits", model.spec, digits.train.images[:8], {})
        client = mlflow.MlflowClient()
        assert client.search_model_versions() == [] and _models(client) == []
        (left,) = [file for file in small_disk.rglob("*") if file.is_file() and file.name != "ballast"]
        assert left.name == "error.txt" and _bytes_below(small_disk) == before + left.stat().st_size
        assert shutil.disk_usage(small_disk).free > 500_000
