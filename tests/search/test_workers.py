"""Several workers on one study in a real PostgreSQL: one is killed, the other does its trial again, and what comes out
is what one worker alone finds."""

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psycopg
import pytest
from conftest import of_pictures, run_qexp, start_qexp
from forked import Forked
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from postgres import start_postgres
from stores import new_store

OPTIONS = (
    "--study shared --epochs 1 --batch-size 16 --heartbeat-seconds 1 --sample-counts 4,8 --seeds-per-point 1 "
    "--observers minmax,histogram"
).split()


def _start(folder: Path, uri: str, url: str, options: list[str]) -> Forked:
    return start_qexp(folder, "search", "--storage", url, *options, uri=uri)


TRIAL_OF = """
select trials.number from trials
join trial_user_attributes as worker on worker.trial_id = trials.trial_id and worker.key = 'worker'
join trial_user_attributes as run on run.trial_id = trials.trial_id and run.key = 'run_id'
where trials.state = 'RUNNING' and worker.value_json like %s
"""


def _trial_of(study: psycopg.Connection, worker: Forked) -> int | None:
    """The number of the trial that this worker is at, which has a run."""
    try:
        found = study.execute(TRIAL_OF, [f'%:{worker.pid}"']).fetchone()
    except psycopg.errors.UndefinedTable:  # no worker has made the study yet
        return None
    return int(found[0]) if found else None


def _kill_in_a_trial(url: str, workers: list[Forked]) -> tuple[Forked, int]:
    """Kill the first worker that is seen at a trial: the one that is left, and the number of the trial.

    It is stopped while one looks again: a trial takes a second, and may have ended in between.
    """
    end = time.monotonic() + 200
    with psycopg.connect(url, autocommit=True) as study:  # one connection: the server has a hundred
        while time.monotonic() < end:
            for worker in workers:
                if _trial_of(study, worker) is None:
                    continue
                worker.send_signal(signal.SIGSTOP)
                cut_off = _trial_of(study, worker)
                if cut_off is not None:
                    worker.kill()
                    return next(other for other in workers if other is not worker), cut_off
                worker.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    raise AssertionError(f"no trial: {[worker.stderr for worker in workers]}")


def _journal(folder: Path, file: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder / file)))


def _found(trials: list[FrozenTrial]) -> dict[tuple[Any, ...], Any]:
    """Which validation images each point gets right, with each seed, by its parameters."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return {tuple(trial.params.values()): json.loads(trial.user_attrs["point"])["correct_by_seed"] for trial in done}


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_done_by_another(pictures: Path, tmp_path: Path) -> None:
    """In an empty store: one of the two trains, the other waits for it."""
    uri, options = new_store(tmp_path), [*OPTIONS, *of_pictures(pictures)]
    client = mlflow.MlflowClient(tracking_uri=uri)
    with start_postgres(tmp_path) as url:
        study_url = url.replace("postgresql:", "postgresql+psycopg:")
        workers = [_start(tmp_path, uri, url, options) for _ in range(2)]
        other, cut_off = _kill_in_a_trial(url, workers)
        assert other.wait() == 0, other.stderr
        again = run_qexp(tmp_path, "search", "--storage", url, *options)
        alone = run_qexp(tmp_path, "search", *options)  # in a journal file
        study = optuna.load_study(study_name="shared", storage=study_url)
        trials, remembered = study.trials, study.user_attrs
    assert f"trial {cut_off}: its worker" in other.stderr
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len({tuple(trial.params.values()) for trial in complete}) == len(complete) == 4
    assert [trial.user_attrs["retry_of"] for trial in complete if "retry_of" in trial.user_attrs] == [cut_off]

    parent = client.get_run(remembered["run_id"])
    experiment = [parent.info.experiment_id]
    runs = client.search_runs(experiment, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert parent.info.status == "FINISHED"
    trained = [run for run in runs if run.info.run_name.startswith("train")]
    runs = [run for run in runs if run not in trained]
    assert len(trained) == 1 and Counter(run.info.status for run in runs) == {"FINISHED": 4, "KILLED": 1}
    (killed,) = [run for run in runs if run.info.status == "KILLED"]
    assert killed.info.run_name == f"trial-{cut_off:03d}" and "is gone" in killed.data.tags["qexp.error"]
    assert len({trial.user_attrs["worker"] for trial in trials if "worker" in trial.user_attrs}) == 2

    assert alone.code == 0, alone.stderr
    in_journal = optuna.load_study(study_name="shared", storage=_journal(tmp_path, alone.summary["study_storage"]))
    assert _found(trials) == _found(in_journal.trials) and alone.summary["winner"] == again.summary["winner"]
    assert again.summary["study_storage"] == url.replace(f":{url.split(':')[2].split('@')[0]}@", "@")

    assert again.code == 0 and again.summary["run_id"] == parent.info.run_id and "trial " not in again.stderr
    password = url.split(":")[2].split("@")[0]
    config = client.download_artifacts(parent.info.run_id, "config.yaml", tmp_path)
    logged = [str(run.to_dictionary()) for run in [parent, *runs]]
    assert [
        text
        for text in [*logged, Path(config).read_text(), other.stdout, other.stderr, again.stderr]
        if password in text
    ] == []
    assert parent.data.params["search.storage"] == url.replace(password, "***")
