"""Several workers on one study in a real PostgreSQL: one is killed, and the others do what it has left."""

import time
from collections import Counter
from pathlib import Path

import mlflow
import optuna
import pytest
from conftest import run_qexp, start_qexp
from forked import Forked
from optuna.trial import TrialState
from postgres import start_postgres

OPTIONS = (
    "--study shared --epochs 1 --heartbeat-seconds 1 --sample-counts 4,8,12 --seeds-per-point 2 "
    "--observers minmax,histogram"
).split()


def _start(folder: Path, uri: str, url: str) -> Forked:
    return start_qexp(folder, "search", "--storage", url, *OPTIONS, uri=uri)


def _wait_for_its_trial(study_url: str, worker: Forked) -> int:
    """The number of a trial that this worker is at."""
    for _ in range(400):
        time.sleep(0.3)
        try:
            trials = optuna.load_study(study_name="shared", storage=study_url).trials
        except Exception:  # the first worker has not made it yet
            continue
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker", "").endswith(f":{worker.pid}"):
                if "run_id" in trial.user_attrs:
                    return trial.number
    raise AssertionError("no trial")


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_done_by_another(tmp_path: Path) -> None:
    """In an empty store: one of the two trains, the other waits for it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.search_experiments()  # makes the database
    with start_postgres(tmp_path) as url:
        study_url = url.replace("postgresql:", "postgresql+psycopg:")
        first, second = _start(tmp_path, uri, url), _start(tmp_path, uri, url)
        cut_off = _wait_for_its_trial(study_url, second)
        second.kill()
        assert first.wait() == 0, first.stderr
        again = run_qexp(tmp_path, "search", "--storage", url, *OPTIONS)
        study = optuna.load_study(study_name="shared", storage=study_url)
        trials, remembered = study.trials, study.user_attrs
    assert f"trial {cut_off}: its worker" in first.stderr
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len({tuple(trial.params.values()) for trial in complete}) == len(complete) == 6
    assert [trial.user_attrs["retry_of"] for trial in complete if "retry_of" in trial.user_attrs] == [cut_off]

    parent = client.get_run(remembered["run_id"])
    experiment = [parent.info.experiment_id]
    runs = client.search_runs(experiment, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert parent.info.status == "FINISHED"
    trained = [run for run in runs if run.info.run_name.startswith("train")]
    runs = [run for run in runs if run not in trained]
    assert len(trained) == 1 and Counter(run.info.status for run in runs) == {"FINISHED": 6, "KILLED": 1}
    (killed,) = [run for run in runs if run.info.status == "KILLED"]
    assert killed.info.run_name == f"trial-{cut_off:03d}" and "is gone" in killed.data.tags["qexp.error"]
    assert len({run.data.params["worker"] for run in runs if "worker" in run.data.params}) == 2

    assert again.code == 0 and again.summary["run_id"] == parent.info.run_id and "trial " not in again.stderr
    password = url.split(":")[2].split("@")[0]
    config = client.download_artifacts(parent.info.run_id, "config.yaml", tmp_path)
    logged = [str(run.to_dictionary()) for run in [parent, *runs]]
    assert [
        text
        for text in [*logged, Path(config).read_text(), first.stdout, first.stderr, again.stderr]
        if password in text
    ] == []
    assert parent.data.params["search.storage"] == url.replace(password, "***")
