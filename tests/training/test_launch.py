"""Training in several processes: the same curve, one run, and what happens when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import NOT_TIMED, PLAIN, environment_for, run_qexp, start_qexp
from shadows import write_shadows
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from qexp.config import Config, TrainConfig
from qexp.errors import InputError, StageError
from qexp.training.launch import run_workers

# A small learning rate: rounding differences grow with every step, the faster the higher it is.
OPTIONS = "--epochs 3 --image-size 8 --learning-rate 0.003 --seed 3".split() + NOT_TIMED
CURVES = ("train/loss", "val/loss")


def _curves(uri: str, run_id: str) -> dict[str, list[float]]:
    client = mlflow.MlflowClient(uri)
    histories = {name: client.get_metric_history(run_id, name) for name in CURVES}
    assert all([metric.step for metric in history] == [1, 2, 3] for history in histories.values())
    return {name: [metric.value for metric in history] for name, history in histories.items()}


def _workers(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"entrypoints.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _still_there(workers: list[int]) -> list[int]:
    """Those that have not ended within ten seconds."""
    end = time.monotonic() + 10
    while (left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_process_that_dies_ends_the_run_as_failed(tmp_path: Path) -> None:
    options = [*"--epochs 500 --image-size 8 --processes 2".split(), *NOT_TIMED]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_shadows(tmp_path)  # from which none of them imports
    process = start_qexp(tmp_path, "train", *options)
    process.wait_for_line("epoch 2/500")
    workers = _workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(90) == 1
    errors = process.stderr
    said = f"training process of rank 1 (pid {workers[1]}; 2 in all) was ended by SIGKILL"
    assert f"error: {said}" in errors and "Traceback" not in errors
    (run,) = mlflow.MlflowClient(uri).search_runs(["1"])
    assert run.info.status == "FAILED" and said in run.data.tags["qexp.error"]
    assert not _still_there(workers)


@pytest.mark.slow
def test_whole_job_in_two_processes_is_stopped_and_resumed(tmp_path: Path) -> None:
    sweep = "--batch-sizes 1 --min-repeats 2 --min-seconds 0 --warmup 1 --calibration-samples 32".split()
    options = [*"--epochs 6 --patience 6 --image-size 8 --processes 2".split(), *NOT_TIMED]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = start_qexp(tmp_path, "run", *options, *sweep, *PLAIN)
    process.wait_for_line("epoch 2/6")
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 143 and "Traceback" not in process.stderr, process.stderr
    client = mlflow.MlflowClient(uri)
    stopped = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert {name: info.status for name, info in stopped.items()} == {
        "smallnet-digits": "KILLED",
        "train-smallnet": "KILLED",
    }
    process = start_qexp(tmp_path, "run", "--resume", stopped["smallnet-digits"].run_id)
    process.wait_for_line("resuming in epoch")
    refused = run_qexp(tmp_path, "run", "--resume", stopped["smallnet-digits"].run_id)
    assert refused.code == 2 and "is still at work on it" in refused.stderr
    assert process.wait() == 0, process.stderr
    runs = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert len(runs) == 5 and {info.status for info in runs.values()} == {"FINISHED"}
    train = stopped["train-smallnet"].run_id
    assert (
        runs["smallnet-digits"].run_id == stopped["smallnet-digits"].run_id and runs["train-smallnet"].run_id == train
    )
    assert [point.step for point in client.get_metric_history(train, "train/loss")] == list(range(1, 7))
    assert process.stderr.count("resuming in epoch") == 1 and len(process.stdout.splitlines()) == 1


@pytest.mark.slow
def test_torchrun_on_two_machines_makes_one_run_with_the_curve_of_one_process(tmp_path: Path) -> None:
    """Two launchers that meet at a port, each in a folder of its own; only the first one's has a store afterwards."""
    one = run_qexp(tmp_path, "train", *OPTIONS)
    assert one.code == 0, one.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    for rank in (0, 1):
        folder = tmp_path / f"machine {rank}"
        folder.mkdir()
        meeting = f"--nnodes 2 --node-rank {rank} --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
        train = [*meeting.split(), "-m", "entrypoints.train", *OPTIONS]
        command = [sys.executable, "-m", "torch.distributed.run", *train]
        environment = environment_for(f"sqlite:///{folder}/mlflow.db")
        pipe = subprocess.PIPE
        launchers.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe))
    (first, errors), (second, _) = (launcher.communicate(timeout=300) for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert second == "" and not (tmp_path / "machine 1" / "mlflow.db").exists()
    uri = f"sqlite:///{tmp_path}/machine 0/mlflow.db"
    runs = mlflow.MlflowClient(uri).search_runs(["1"])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(json.loads(first)["run_id"], "FINISHED")]
    assert errors.count("epoch 1/3") == 1 and len(first.splitlines()) == 1
    alone, together = _curves(one.uri, one.summary["run_id"]), _curves(uri, runs[0].info.run_id)
    for name in CURVES:
        assert together[name] == pytest.approx(alone[name], rel=2e-3)
        assert alone[name][0] != alone[name][2]


@pytest.mark.parametrize(("code", "said"), [(1, "the loss is nan"), (2, "--device tpu")])
def test_error_of_a_process_is_that_of_the_training(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's launcher hands it on; a process that has refused its input makes the training bad input."""
    failure = ProcessFailure(1, 4711, code, str(tmp_path / "no file"))
    failure.message = said
    error = ChildFailedError("entrypoints.train", {1: failure})

    def launch(*given: object) -> Callable[..., None]:
        def start(*arguments: str) -> None:
            raise error

        return start

    monkeypatch.setattr("qexp.training.launch.elastic_launch", launch)
    kind = InputError if code == 2 else StageError
    line = rf"rank 1 \(pid 4711; 2 in all\) ended with exit code {code}: .*{said}$"
    with pytest.raises(kind, match=line):
        run_workers(["-m", "entrypoints.train"], Config(train=TrainConfig(processes=2)), {"MLFLOW_RUN_ID": "0" * 32})


@pytest.mark.slow
def test_bad_input_is_refused_before_there_are_processes(tmp_path: Path) -> None:
    for arguments in (["--processes", "0"], ["--processes", "2", "--model", "vgg17"]):
        done = run_qexp(tmp_path, "train", *arguments)
        assert done.code == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = run_qexp(tmp_path, "search", "--processes", "2")
    assert done.code == 2 and "--processes 2: " in done.stderr
