"""Killed and resumed: the same run, the same weights bit for bit, a curve without gaps or doubled steps."""

import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import NO_FIGURES, PLAIN, SEED, Finished, of_pictures, run_qexp, start_qexp

from qexp.config import DataConfig
from qexp.data.datasets import load_dataset
from qexp.errors import InputError
from qexp.pipeline.resume import check_data_of_run

EPOCHS = list(range(1, 7))
OPTIONS = "--epochs 6 --patience 6 --batch-size 16 --checkpoint-minutes 0.00001".split()  # of four steps each
CURVES = ("train/loss", "train/top1", "val/loss", "val/top1", "train/learning_rate")
SWEEP = ["--batch-sizes", "1", "--min-repeats", "2", "--min-seconds", "0", "--warmup", "1", *PLAIN]
SWEEP += ["--calibration-samples", "32"]
DIES = """
import os, signal
from qexp.training import loop
step, left = loop._step, [{steps}]
def dies(*given):
    step(*given)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
loop._step = dies
"""
WAITS = """
import time
from qexp.training import loop
step = loop._step
def waits(state, *given):
    step(state, *given)
    while state.position.epoch == 2 and not state.stop.signal:
        time.sleep(0.01)
loop._step = waits
"""


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
def options(pictures: Path) -> list[str]:
    return [*OPTIONS, *of_pictures(pictures)]


@pytest.fixture(scope="module")
def reference(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A training that nothing interrupts."""
    done = run_qexp(tmp_path_factory.mktemp("not interrupted"), "train", *options)
    assert done.code == 0, done.stderr
    return done


@pytest.mark.slow
def test_killed_at_random_steps_and_resumed_gives_the_same_bits(
    reference: Finished, options: list[str], tmp_path: Path
) -> None:
    """Three kills in the middle of an epoch; after the second, the steps since the epoch began are done again."""
    moments = random.Random(SEED)
    run_id, said = "", ""
    for checkpoint_minutes in ("0.00001", "60", "0.00001"):
        words = ["--resume", run_id] if run_id else options
        dies = DIES.format(steps=moments.choice([6, 7]))
        died = run_qexp(tmp_path, "train", *words, "--checkpoint-minutes", checkpoint_minutes, before=dies)
        assert died.code == -signal.SIGKILL, died.stderr
        run_id, said = _run_id(tmp_path), said + died.stderr
        assert _run(tmp_path, run_id).info.status == "RUNNING"
    done = run_qexp(tmp_path, "train", "--resume", run_id)
    assert done.code == 0 and done.summary["run_id"] == run_id, done.stderr
    resumed = re.findall(r"resuming in epoch \d after step (\d)", said + done.stderr)
    assert len(resumed) == 3 and [step != "0" for step in resumed] == [True, False, True]
    assert _run(tmp_path, run_id).info.status == "FINISHED"
    assert _weights(tmp_path, run_id) == _weights(reference.folder, reference.summary["run_id"])
    assert {name: _steps(tmp_path, run_id, name) for name in CURVES} == {name: EPOCHS for name in CURVES}
    assert len(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])) == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_signal_ends_the_run_as_killed_and_it_goes_on(reference: Finished, options: list[str], tmp_path: Path) -> None:
    process = start_qexp(tmp_path, "train", *options, before=WAITS)
    process.wait_for_line("epoch 1/")
    run_id = _run_id(tmp_path)
    refused = run_qexp(tmp_path, "train", "--resume", run_id)
    assert refused.code == 2 and f"process {process.pid} is still at work" in refused.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "error: " in process.stderr and "Traceback" not in process.stderr
    assert f"stopped; `qexp train --resume {run_id}` resumes it" in process.stderr
    assert _run(tmp_path, run_id).info.status == "KILLED"
    done = run_qexp(tmp_path, "train", "--resume", run_id)
    assert done.code == 0, done.stderr
    assert _run(tmp_path, run_id).info.status == "FINISHED"
    assert _weights(tmp_path, run_id) == _weights(reference.folder, reference.summary["run_id"])


@pytest.mark.slow
def test_whole_job_goes_on(reference: Finished, options: list[str], tmp_path: Path) -> None:
    """Killed in the middle of training: the run of `qexp run` goes on, with the training below it."""
    died = run_qexp(tmp_path, "run", *options, *SWEEP, before=DIES.format(steps=10))
    assert died.code == -signal.SIGKILL, died.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    before = {run.data.tags["qexp.stage"]: run for run in client.search_runs(["1"])}
    assert {stage: run.info.status for stage, run in before.items()} == {"main": "RUNNING", "train": "RUNNING"}
    main, train = before["main"].info.run_id, before["train"].info.run_id
    wrong = run_qexp(tmp_path, "train", "--resume", main)
    assert wrong.code == 2 and f"use `qexp run --resume {main}`" in wrong.stderr
    process = start_qexp(tmp_path, "run", "--resume", main, before=NO_FIGURES)
    process.wait_for_line("latency of 3 models at batch size 1")
    process.kill()  # once more, after quantization: that is not done again
    done = run_qexp(tmp_path, "run", "--resume", main, before=NO_FIGURES)
    assert done.code == 0, done.stderr
    assert done.summary["run_id"] == main and done.summary["int8"] == "models:/smallnet-three-digits-int8/1"
    found = client.search_runs(["1"])
    stages = sorted((run.data.tags["qexp.stage"], run.info.status) for run in found)
    finished = [(stage, "FINISHED") for stage in ("main", "quantize", "report", "train")]
    assert stages == sorted([*finished, ("latency", "FINISHED"), ("latency", "KILLED")])
    runs = {run.data.tags["qexp.stage"]: run for run in found}
    assert runs["train"].info.run_id == train
    assert _weights(tmp_path, train) == _weights(reference.folder, reference.summary["run_id"])


@pytest.mark.slow
def test_killed_after_it_has_registered_its_version_registers_one(pictures: Path, tmp_path: Path) -> None:
    """The moment between the version in the registry and the end of the run: of training, and of quantization.

    What was computed before is neither computed again nor registered again. The model has learnt nothing: whatever the
    limits, it does not ship.
    """
    dies = """
import os, signal
from qexp.pipeline import quantize, train
from qexp.tracking import registry
register = registry.register
def register_and_die(kind, *given, **named):
    version = register(kind, *given, **named)
    if kind == {!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return version
registry.register = register_and_die
"""
    no_training, no_quantization = "train.train_model = None", "quantize.quantize_model = None"
    guessing = "--epochs 1 --learning-rate 1e-9 --min-speedup 0 --max-top1-drop 100".split()
    new = [*of_pictures(pictures), *guessing, *SWEEP]
    assert run_qexp(tmp_path, "run", *new, before=dies.format("fp32")).code == -signal.SIGKILL
    client, run_id = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), _run_id(tmp_path)
    resume = ["run", "--resume", run_id]
    died = run_qexp(tmp_path, *resume, before=f"{dies.format('int8')}\n{no_training}")
    assert died.code == -signal.SIGKILL, died.stderr
    before = {(one.name, one.version, one.run_id) for one in client.search_model_versions()}
    assert {name for name, *_ in before} == {"smallnet-three-digits-fp32", "smallnet-three-digits-int8"} and len(
        before
    ) == 2
    for alias in ("challenger", "champion"):  # as if somebody had promoted it meanwhile
        client.set_registered_model_alias("smallnet-three-digits-int8", alias, "1")
    done = run_qexp(tmp_path, *resume, before=f"{NO_FIGURES}\n{dies.format('none')}\n{no_training}\n{no_quantization}")
    assert done.code == 0, done.stderr
    assert done.summary["verdict"] == "not trained" and done.summary["gate"] == "failed"
    assert "is not shown to be better than guessing" in done.summary["verdict_reason"]
    assert {(one.name, one.version, one.run_id) for one in client.search_model_versions()} == before
    assert done.summary["fp32"] == "models:/smallnet-three-digits-fp32/1"
    assert client.get_model_version_by_alias("smallnet-three-digits-fp32", "challenger").version == 1
    assert client.get_model_version_by_alias("smallnet-three-digits-int8", "champion").version == 1
    assert {run.info.status for run in client.search_runs(["1"])} == {"FINISHED"}
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_folder_or_store_that_cannot_be_written_is_one_line(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    done = run_qexp(tmp_path, "train", *options)
    assert done.code == 1 and "checkpoints cannot be written there" in done.stderr and "Traceback" not in done.stderr
    (run,) = mlflow.MlflowClient(done.uri).search_runs(["1"])
    assert run.info.status == "FAILED"
    full = (tmp_path / "mlflow.db").stat().st_size  # no file may grow above that: as on a full disk
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({full}, {full}))"
    died = run_qexp(tmp_path, "train", *options, before=limit)
    assert died.code in (1, 2) and "Traceback" not in died.stderr, died.stderr
    assert [line for line in died.stderr.splitlines() if line.startswith("error: ")], died.stderr


def test_what_cannot_go_on_is_said(reference: Finished, tmp_path: Path) -> None:
    done = reference
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
        refused = run_qexp(done.folder, "train", "--resume", run_id, "--batch-size", "128")  # the default, but given
        assert refused.code == 2 and f"--batch-size 128: run {run_id} was started with 16" in refused.stderr
    finally:
        client.set_terminated(run_id, "FINISHED")


def test_other_images_are_refused(reference: Finished, pictures: Path) -> None:
    mlflow.set_tracking_uri(reference.uri)
    own = load_dataset(DataConfig(dataset="imagefolder", data_dir=str(pictures), image_size=8), seed=0)
    check_data_of_run(reference.summary["run_id"], own)
    other = replace(own, train=own.train.subset(torch.arange(20)))
    with pytest.raises(InputError, match="other images than run"):
        check_data_of_run(reference.summary["run_id"], other)
    elsewhere = replace(other, name="another-folder")
    with pytest.raises(InputError, match="other images than run"):
        check_data_of_run(reference.summary["run_id"], elsewhere)
