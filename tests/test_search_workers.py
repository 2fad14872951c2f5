"""Several workers on one study in a real PostgreSQL: one is killed, and the others do what it has left."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import optuna
import pytest
from conftest import Finished, environment_for, run_qexp
from optuna.trial import TrialState
from postgres import start_postgres

OPTIONS = "--study shared --heartbeat-seconds 1 --sample-counts 4,8,12,16 --observers minmax,histogram".split()


def _start(in_use: Finished, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "entrypoints.cli", "search", "--storage", url, *OPTIONS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=in_use.folder, env=environment_for(in_use.uri), text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def _wait_for_its_trial(study_url: str, worker: subprocess.Popen[str]) -> int:
    """The number of a trial that this worker is at."""
    for _ in range(600):
        time.sleep(0.1)
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
def test_the_trial_of_a_killed_worker_is_done_by_another(in_use: Finished, tmp_path: Path) -> None:
    with start_postgres(tmp_path) as url:
        study_url = url.replace("postgresql:", "postgresql+psycopg:")
        first, second = _start(in_use, url), _start(in_use, url)
        cut_off = _wait_for_its_trial(study_url, second)
        second.kill()
        second.communicate()
        out, err = first.communicate(timeout=240)
        assert first.returncode == 0, err
        study = optuna.load_study(study_name="shared", storage=study_url)
        again = run_qexp(in_use.folder, "search", "--storage", url, *OPTIONS)
        other = run_qexp(in_use.folder, "search", "--storage", url, *OPTIONS[:-2])
    assert f"trial {cut_off}: its worker" in err
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len({tuple(trial.params.values()) for trial in complete}) == len(complete) == 8
    assert [trial.user_attrs["retry_of"] for trial in complete if "retry_of" in trial.user_attrs] == [cut_off]

    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    parent = client.get_run(study.user_attrs["run_id"])
    experiment = [parent.info.experiment_id]
    runs = client.search_runs(experiment, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert parent.info.status == "FINISHED"
    assert Counter(run.info.status for run in runs) == {"FINISHED": 8, "KILLED": 1}
    (killed,) = [run for run in runs if run.info.status == "KILLED"]
    assert killed.info.run_name == f"trial-{cut_off:03d}" and "is gone" in killed.data.tags["qexp.error"]
    assert len({run.data.params["worker"] for run in runs}) == 2

    assert again.code == 0 and again.summary["run_id"] == parent.info.run_id and "trial " not in again.stderr
    assert other.code == 2 and "--study shared: was made for observer" in other.stderr
    password = url.split(":")[2].split("@")[0]
    config = client.download_artifacts(parent.info.run_id, "config.yaml", tmp_path)
    logged = [str(run.to_dictionary()) for run in [parent, *runs]]
    assert [text for text in [*logged, Path(config).read_text(), out, err, again.stderr] if password in text] == []
    assert parent.data.params["search.storage"] == url.replace(password, "***")
