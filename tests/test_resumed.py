"""Killed and resumed: the same run, the same weights bit for bit, a curve without gaps or doubled steps."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from conftest import Finished, environment_for, run_qexp

OPTIONS = "--epochs 6 --image-size 8 --batch-size 32 --checkpoint-minutes 0.001".split()
CURVES = ("train/loss", "train/top1", "val/loss", "val/top1", "train/learning_rate")


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "entrypoints.cli", *arguments]
    environment = environment_for(f"sqlite:///{folder}/mlflow.db")
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _wait_for_line(process: subprocess.Popen[str], start: str) -> None:
    assert process.stderr
    for line in process.stderr:
        if line.startswith(start):
            return
    raise AssertionError(f"no line {start}")


def _run_id(folder: Path) -> str:
    return next((path.name for path in (folder / "checkpoints").glob("*")), "")


def _weights(folder: Path, run_id: str) -> bytes:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    file = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/weights/model.safetensors")
    return Path(file).read_bytes()


def _run(folder: Path, run_id: str) -> mlflow.entities.Run:
    return mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(run_id)


def _steps(folder: Path, run_id: str, name: str) -> list[int]:
    history = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").get_metric_history(run_id, name)
    return sorted(metric.step for metric in history)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, float]:
    """A training that nothing interrupts, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("not interrupted")
    started = time.monotonic()
    done = run_qexp(folder, "train", *OPTIONS)
    assert done.code == 0, done.stderr
    return done, time.monotonic() - started


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(
    reference: tuple[Finished, float], tmp_path: Path
) -> None:
    done, duration_s = reference
    run_id, kills = "", 0
    moments = random.Random()  # other moments in every run of the tests
    while kills < 5:
        process = _start(tmp_path, "train", *(["--resume", run_id] if run_id else OPTIONS))
        try:
            process.wait(moments.uniform(0.3, 0.9) * duration_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            run_id = run_id or _run_id(tmp_path)
        else:
            assert process.returncode == 0, process.communicate()[1]
            break
    if _run_id(tmp_path):
        last = run_qexp(tmp_path, "train", "--resume", run_id)
        assert last.code == 0 and last.summary["run_id"] == run_id, last.stderr
    assert _run(tmp_path, run_id).info.status == "FINISHED"
    assert _weights(tmp_path, run_id) == _weights(done.folder, done.summary["run_id"])
    assert {name: _steps(tmp_path, run_id, name) for name in CURVES} == {name: [1, 2, 3, 4, 5, 6] for name in CURVES}
    assert len(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])) == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_run_as_killed_and_it_goes_on(
    reference: tuple[Finished, float], tmp_path: Path, number: int, code: int
) -> None:
    process = _start(tmp_path, "train", *OPTIONS)
    _wait_for_line(process, "epoch 1/6")
    run_id = _run_id(tmp_path)
    refused = run_qexp(tmp_path, "train", "--resume", run_id)
    assert refused.code == 2 and f"process {process.pid} is still at work" in refused.stderr
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("training was over before the signal came: too few epochs for this machine")
    assert process.returncode == code and "error: " in errors and "Traceback" not in errors
    assert _run(tmp_path, run_id).info.status == "KILLED"
    done = run_qexp(tmp_path, "train", "--resume", run_id)
    assert done.code == 0, done.stderr
    assert _run(tmp_path, run_id).info.status == "FINISHED"
    assert _weights(tmp_path, run_id) == _weights(reference[0].folder, reference[0].summary["run_id"])


@pytest.mark.slow
def test_whole_job_goes_on(reference: tuple[Finished, float], tmp_path: Path) -> None:
    """Killed in the middle of training: the run of `qexp run` goes on, with the training below it."""
    sweep = "--batch-sizes 1 --min-repeats 2 --min-seconds 0 --warmup 1 --calibration-samples 32".split()
    process = _start(tmp_path, "run", *OPTIONS, *sweep)
    _wait_for_line(process, "epoch 2/6")
    process.kill()
    process.wait()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    before = {run.data.tags["qexp.stage"]: run for run in client.search_runs(["1"])}
    assert {stage: run.info.status for stage, run in before.items()} == {"main": "RUNNING", "train": "RUNNING"}
    main, train = before["main"].info.run_id, before["train"].info.run_id
    wrong = run_qexp(tmp_path, "train", "--resume", main)
    assert wrong.code == 2 and f"use `qexp run --resume {main}`" in wrong.stderr
    done = run_qexp(tmp_path, "run", "--resume", main)
    assert done.code == 0, done.stderr
    assert done.summary["run_id"] == main
    runs = {run.data.tags["qexp.stage"]: run for run in client.search_runs(["1"])}
    assert set(runs) == {"main", "train", "quantize", "latency", "report"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["train"].info.run_id == train
    assert _weights(tmp_path, train) == _weights(reference[0].folder, reference[0].summary["run_id"])


def test_what_cannot_go_on_is_said(reference: tuple[Finished, float], tmp_path: Path) -> None:
    done = reference[0]
    run_id = done.summary["run_id"]
    for arguments, said in (
        (["--resume", "nothing"], "--resume nothing: no such run"),
        (["--resume", run_id], f"--resume {run_id}: this run has finished"),
    ):
        refused = run_qexp(done.folder, "train", *arguments)
        assert refused.code == 2 and f"error: {said}" in refused.stderr and "Traceback" not in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    client = mlflow.MlflowClient(done.uri)
    client.set_terminated(run_id, "KILLED")  # as if it had been stopped; its checkpoints are gone
    try:
        refused = run_qexp(done.folder, "train", "--resume", run_id)
        assert refused.code == 2 and f"no checkpoint in checkpoints{os.sep}{run_id}" in refused.stderr
        refused = run_qexp(done.folder, "train", "--resume", run_id, "--momentum", "0.5")
        assert refused.code == 2 and f"--momentum 0.5: run {run_id} was started with 0.9" in refused.stderr
    finally:
        client.set_terminated(run_id, "FINISHED")
