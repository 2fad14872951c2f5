"""A real server that is killed while a run logs to it: it comes back in time, or it stays away."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest
from conftest import NOT_TIMED, PLAIN, Finished, run_qexp, start_qexp
from forked import Forked
from servers import Server

from qexp.errors import InputError, first_line
from qexp.foundation.text import hide_secrets
from qexp.pipeline.resume import has_stage
from qexp.pipeline.sync import sync_run

TRAIN = ["--epochs", "4", "--image-size", "8", *NOT_TIMED]
EPOCHS = list(range(1, 5))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def _start(server: Server, *arguments: str, retries: int = 7) -> Forked:
    """Between two tries the client waits for 0, 2, 4, 8, 16, 32 and 64 s."""
    waits = {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}
    variables = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)} | waits
    return start_qexp(server.folder, *arguments, uri=server.url, variables=variables)


def _steps(server: Server, run_id: str, name: str) -> list[int]:
    return [point.step for point in mlflow.MlflowClient(server.url).get_metric_history(run_id, name)]


@pytest.mark.slow
def test_server_killed_for_some_seconds_loses_no_metric(tmp_path: Path, stack: ExitStack) -> None:
    """Longer than the first of the waits between two tries of the client."""
    server = Server(tmp_path)
    server.start(stack)
    process = _start(server, "train", *TRAIN)
    process.wait_for_line("epoch 2/4")
    server.kill()
    time.sleep(2.5)
    assert process.poll() is None
    server.start(stack)
    assert process.wait() == 0, process.stderr
    summary = json.loads(process.stdout.splitlines()[-1])
    client = mlflow.MlflowClient(server.url)
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "train/top1", "val/loss", "val/top3", "train/learning_rate", "train/images_per_s"):
        assert _steps(server, run.info.run_id, name) == EPOCHS, name
    mlflow.set_tracking_uri(server.url)
    result = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/results/fp32.json")
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in losses] == [epoch["train_loss"] for epoch in result["train"]["epochs"]]
    assert len(client.search_model_versions()) == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_server_that_stays_away_loses_nothing_and_sync_uploads_it(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole job: its training goes on to the end, and `qexp sync` registers what it has found."""
    server = Server(tmp_path)
    server.start(stack)
    process = _start(server, "run", *PLAIN, *TRAIN, retries=1)
    process.wait_for_line("epoch 2/4")
    server.kill()
    code, stderr = process.wait(), process.stderr
    assert code == 1 and "Traceback" not in stderr, stderr
    assert "training continues" in stderr and "epoch 4/4" in stderr
    error = [line for line in stderr.splitlines() if line.startswith("error: ")]
    (result,) = tmp_path.glob("checkpoints/*/train-smallnet/result.json")
    folder = result.parent.parent
    main, place = folder.name, f"checkpoints{os.sep}{folder.name}"
    assert len(error) == 1 and "no answer (Connection refused)" in error[0]
    assert f"results are in {place}" in error[0] and f"`qexp sync {place}`" in error[0]
    train, kept = json.loads(result.read_text())["run_id"], json.loads(result.read_text())["result"]
    assert len(kept["train"]["epochs"]) == 4 and kept["accuracy"]["test"]["images"] == 359

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(server.url)
    with pytest.raises(InputError, match=r"no answer \(Connection refused\)"):
        sync_run(Path(place))
    assert result.exists()
    server.start(stack)
    client = mlflow.MlflowClient(server.url)
    assert client.get_run(train).data.tags["mlflow.parentRunId"] == main
    done = run_qexp(tmp_path, "sync", place, uri=server.url)
    assert done.code == 0, done.stderr
    left = {"command": "sync", "run_id": main, "status": "FAILED", "next": f"qexp run --resume {main}"}
    assert done.summary == left | {"fp32": "models:/smallnet-digits-fp32/1"}
    assert not result.parent.exists()
    assert sync_run(Path(place)) == left  # again: nothing is left to upload
    assert {run.info.run_id: run.info.status for run in client.search_runs(["1"])} == {
        main: "FAILED",
        train: "FINISHED",
    }
    assert "Connection refused" in client.get_run(main).data.tags["qexp.error"]
    assert _steps(server, train, "train/loss") == _steps(server, train, "val/top1") == EPOCHS
    assert len(_steps(server, train, "test_top1_percent")) == 1
    (version,) = client.search_model_versions()
    assert version.tags["verified"] == "true" and version.run_id == train
    assert client.get_model_version_by_alias(version.name, "challenger").version == version.version
    assert mlflow.pytorch.load_model(f"models:/{version.name}/1")
    assert has_stage(main, "train-smallnet")  # `qexp run --resume` goes on after it


def test_other_folders_are_refused(finished: Finished, tmp_path: Path) -> None:
    refused = run_qexp(tmp_path, "sync", "nothing")
    assert refused.code == 2 and refused.stderr.startswith("error: RUN_DIR nothing: must be the folder of a run")
    assert len(refused.stderr.strip().splitlines()) == 1
    mlflow.set_tracking_uri(finished.uri)
    with pytest.raises(InputError, match="must be the folder of a run"):
        sync_run(tmp_path)
    unknown = tmp_path / ("0123456789abcdef" * 2)
    unknown.mkdir()
    with pytest.raises(InputError, match=f"{unknown.name}: no such run in sqlite"):
        sync_run(unknown)


def test_run_that_has_finished_lacks_nothing(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    run_id = finished.summary["run_id"]
    done = sync_run(finished.folder / "checkpoints" / run_id)
    assert done == {"command": "sync", "run_id": run_id, "status": "FINISHED"}


def test_passwords_are_never_shown() -> None:
    assert hide_secrets("postgresql://me:s3cr3t@host:5432/db") == "postgresql://me:***@host:5432/db"
    assert hide_secrets("a http://u:p:q@h/ b") == "a http://u:***@h/ b"
    assert hide_secrets("models:/name@champion at http://127.0.0.1:5000") == (
        "models:/name@champion at http://127.0.0.1:5000"
    )
    assert "s3cr3t" not in first_line(ValueError("cannot parse 'postgresql://me:s3cr3t@host:port/db'"))
