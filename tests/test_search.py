"""The search, on the store of a finished run: trials, resuming, the conclusion, the registered winner."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import optuna
import pytest
from conftest import PLAIN, REPOSITORY, Finished, run_qexp
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from qexp.evidence import SearchPoint
from qexp.search import conclude

COUNTS = ["--sample-counts", "8,32,128", "--seeds-per-point", "2", "--observers", "minmax,histogram"]


def _point(count: int, *top1: float) -> SearchPoint:
    spread = max(top1) - min(top1)
    return SearchPoint(count, "histogram", sum(top1) / len(top1), spread, top1)


def test_winner_is_the_smallest_count_within_noise_of_the_best() -> None:
    points = [_point(8, 80.0, 80.0), _point(32, 89.8, 90.0), _point(512, 90.0, 90.2)]
    result = conclude("study", points, 90.0, validation_images=5000)
    assert (result.best.calibration_samples, result.winner.calibration_samples) == (512, 32)


def test_without_spread_a_difference_of_one_validation_image_is_noise() -> None:
    points = [_point(8, 90.0, 90.0), _point(32, 91.0, 91.0), _point(64, 92.0, 92.0)]
    assert conclude("study", points, 90.0, validation_images=100).winner.calibration_samples == 32
    assert conclude("study", points, 90.0, validation_images=1000).winner.calibration_samples == 64


def _trials(in_use: Finished, parent: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    experiment = client.get_experiment_by_name("qexp-digits")
    children = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`qexp.stage` = 'trial'"
    return list(client.search_runs([experiment.experiment_id], children))


def _study(in_use: Finished, name: str) -> optuna.Study:
    file = in_use.folder / "studies" / f"{name}.journal"
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(file))))


def test_grid_search_runs_every_point_once_and_goes_on_where_it_stopped(in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", *COUNTS)
    assert done.code == 0, done.stderr
    trials = _trials(in_use, done.summary["run_id"])
    assert sorted(run.info.run_name for run in trials) == [f"trial-{number:03d}" for number in range(6)]
    for run in trials:
        assert run.info.status == "FINISHED" and 0 < run.data.metrics["val/top1_mean"] <= 100
    points = {
        (t.params["calibration_samples"], t.params["observer"]) for t in _study(in_use, done.summary["study"]).trials
    }
    assert points == {(count, observer) for count in (8, 32, 128) for observer in ("minmax", "histogram")}
    artifacts = mlflow.MlflowClient(tracking_uri=in_use.uri).list_artifacts(done.summary["run_id"], "figures")
    assert [file.path for file in artifacts] == ["figures/search.png"]

    again = run_qexp(in_use.folder, "search", *COUNTS, "--register-best", "true", "--batch-sizes", "1", *PLAIN)
    assert again.code == 0, again.stderr
    assert _trials(in_use, again.summary["run_id"]) == []
    assert len(_study(in_use, done.summary["study"]).trials) == 6
    assert again.summary["winner"] == done.summary["winner"]
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    version = client.get_model_version(*again.summary["int8"].removeprefix("models:/").split("/"))
    assert version.tags["calibration_samples"] == str(again.summary["winner"]["calibration_samples"])
    assert version.tags["observer"] == again.summary["winner"]["observer"]


def test_the_test_images_are_not_looked_at(in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", "--sample-counts", "8", "--seeds-per-point", "1")
    assert done.code == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    for run in [client.get_run(done.summary["run_id"]), *_trials(in_use, done.summary["run_id"])]:
        assert not [name for name in run.data.metrics if name.startswith("test/")]
    assert "test images" not in done.stderr


def test_a_killed_search_goes_on(in_use: Finished) -> None:
    options = ["--sample-counts", "4,8,16,32,64,128", "--seeds-per-point", "2", "--study", "killed"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": in_use.uri, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "entrypoints.cli", "search", *options]
    process = subprocess.Popen(command, cwd=in_use.folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial 2:"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [trial for trial in _study(in_use, "killed").trials if trial.state.is_finished()]
    assert 2 <= len(before) < 6
    done = run_qexp(in_use.folder, "search", *options)
    assert done.code == 0, done.stderr
    after = [trial for trial in _study(in_use, "killed").trials if trial.state.is_finished()]
    assert sorted(trial.params["calibration_samples"] for trial in after) == [4, 8, 16, 32, 64, 128]
    assert len(_trials(in_use, done.summary["run_id"])) == 6 - len(before)


def test_a_lock_left_by_a_killed_search_is_taken_over(in_use: Finished) -> None:
    (in_use.folder / "studies").mkdir(exist_ok=True)
    (in_use.folder / "studies" / "locked.journal.lock").touch()
    options = ["--study", "locked", "--sample-counts", "4", "--seeds-per-point", "1"]
    done = run_qexp(in_use.folder, "search", *options, timeout_s=120)
    assert done.code == 0, done.stderr


def test_a_study_is_not_mixed_with_other_options(in_use: Finished) -> None:
    first = ["--study", "mine", "--sample-counts", "4", "--seeds-per-point", "1"]
    assert run_qexp(in_use.folder, "search", *first).code == 0
    done = run_qexp(in_use.folder, "search", "--study", "mine", "--sample-counts", "4,16", "--seeds-per-point", "1")
    assert done.code == 2 and "--study mine" in done.stderr


def test_tpe_makes_the_trials_it_is_asked_for(in_use: Finished) -> None:
    options = ["--sampler", "tpe", "--trials", "3", "--seeds-per-point", "1", "--sample-counts", "8,16"]
    done = run_qexp(in_use.folder, "search", *options)
    assert done.code == 0, done.stderr
    assert len(_study(in_use, done.summary["study"]).trials) == 3


def test_without_a_registered_model_one_is_trained_first(tmp_path: Path) -> None:
    done = run_qexp(tmp_path, "search", "--epochs", "1", "--sample-counts", "8", "--seeds-per-point", "1")
    assert done.code == 0, done.stderr
    assert done.summary["fp32"] == "models:/smallnet-digits-fp32/1"


@pytest.mark.parametrize("option", ["--sampler=random", "--observers=best", "--seeds-per-point=0"])
def test_bad_search_options(option: str, in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", option)
    assert done.code == 2 and option.split("=")[0] in done.stderr
