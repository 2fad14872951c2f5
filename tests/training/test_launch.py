"""Training in several processes: the same curve, one run, and what happens when one of them dies."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import NO_FIGURES, PLAIN, environment_for, of_pictures, run_qexp, start_qexp
from forked import start_python
from shadows import write_shadows
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from qexp.config import Config, TrainConfig
from qexp.errors import InputError, StageError
from qexp.training.launch import run_workers

# A small learning rate: rounding differences grow with every step, the faster the higher it is.
OPTIONS = "--epochs 3 --batch-size 16 --learning-rate 0.003 --seed 3".split()
CURVES = ("train/loss", "val/loss")
# In the second epoch, the training processes wait for the signal.
WAITS = """
import time
from qexp.training import loop
step = loop._step
def waits(state, *given):
    while state.position.epoch == 2 and not state.stop.signal:
        time.sleep(0.01)
    step(state, *given)
loop._step = waits
"""


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
def test_process_that_dies_ends_the_run_as_failed(pictures: Path, tmp_path: Path) -> None:
    """Real processes, which do not import from the current folder."""
    options = [*"--epochs 9999 --patience 9999 --batch-size 16 --processes 2".split(), *of_pictures(pictures)]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_shadows(tmp_path)
    process = start_qexp(tmp_path, "train", *options, before="import forked; forked.real_workers()")
    process.wait_for_line("epoch 2/9999")
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
def test_whole_job_in_two_processes_is_stopped_and_resumed(pictures: Path, tmp_path: Path) -> None:
    sweep = "--batch-sizes 1 --min-repeats 2 --min-seconds 0 --warmup 1 --calibration-samples 32".split()
    options = [*"--epochs 6 --patience 6 --batch-size 16 --processes 2".split(), *of_pictures(pictures)]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    waits = f"import forked; forked.before_workers({WAITS!r})"
    process = start_qexp(tmp_path, "run", *options, *sweep, *PLAIN, before=waits)
    process.wait_for_line("epoch 1/6")
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 143 and "Traceback" not in process.stderr, process.stderr
    client = mlflow.MlflowClient(uri)
    stopped = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert {name: info.status for name, info in stopped.items()} == {
        "smallnet-three-digits": "KILLED",
        "train-smallnet": "KILLED",
    }
    job, train = (stopped[name].run_id for name in ("smallnet-three-digits", "train-smallnet"))
    process = start_qexp(tmp_path, "run", "--resume", job, before=NO_FIGURES)
    process.wait_for_line("resuming in epoch")
    refused = run_qexp(tmp_path, "run", "--resume", job)
    assert refused.code == 2 and "is still at work on it" in refused.stderr
    assert process.wait() == 0, process.stderr
    runs = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert len(runs) == 5 and {info.status for info in runs.values()} == {"FINISHED"}
    assert runs["smallnet-three-digits"].run_id == job and runs["train-smallnet"].run_id == train
    assert [point.step for point in client.get_metric_history(train, "train/loss")] == list(range(1, 7))
    assert process.stderr.count("resuming in epoch") == 1 and len(process.stdout.splitlines()) == 1


@pytest.mark.slow
def test_torchrun_on_two_machines_makes_one_run_with_the_curve_of_one_process(pictures: Path, tmp_path: Path) -> None:
    """Two launchers that meet at a port, each in a folder of its own; only the first one's has a store afterwards."""
    options = [*OPTIONS, *of_pictures(pictures)]
    one = run_qexp(tmp_path, "train", *options)
    assert one.code == 0, one.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    for rank in (0, 1):
        folder = tmp_path / f"machine {rank}"
        folder.mkdir()
        meeting = f"--nnodes 2 --node-rank {rank} --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
        command = ("-m", "torch.distributed.run", *meeting.split(), "-m", "entrypoints.train", *options)
        launchers.append(start_python(folder, command, environment_for(f"sqlite:///{folder}/mlflow.db")))
    codes, errors = [launcher.wait() for launcher in launchers], launchers[0].stderr
    first, second = (launcher.stdout for launcher in launchers)
    assert codes == [0, 0], errors
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
