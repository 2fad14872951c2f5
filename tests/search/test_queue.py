"""A study and its queue, in a journal and on a real PostgreSQL, without anything being quantized."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import psycopg
import pytest
from optuna.trial import FrozenTrial, TrialState
from postgres import start_postgres

from qexp.config import Config, SearchConfig
from qexp.errors import InputError
from qexp.foundation.text import hide_secrets
from qexp.search.queue import (
    MOST_DEATHS,
    alive,
    fail,
    failures,
    finish,
    give_back,
    open_trials,
    suggest,
    take_trial,
)
from qexp.search.results import SearchPoint
from qexp.search.storage import open_place
from qexp.search.study import Study, find_study, make_study, points_of


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["journal", "postgres"])
def search(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Options of a study of its own in either place."""
    if request.param == "journal":
        return {"study_dir": str(tmp_path), "study": "mine"}
    return {"storage": request.getfixturevalue("postgres"), "study": tmp_path.name, "heartbeat_seconds": 1}


@contextmanager
def worker(**options: Any) -> Iterator[Study]:
    """What a worker of a study has; the first one makes it."""
    config = Config(search=SearchConfig(**options))
    with open_place(config.search) as place:
        asked = place, options["study"], config, {"seed": 0}
        with place.exclusive("join"):
            study = find_study(*asked) or make_study(*asked)
        yield study


def _take(study: Study) -> optuna.Trial | None:
    return take_trial(study, lambda trial, again: None)


def _point(params: dict[str, Any], top1: float = 90.0, size: int | None = None) -> SearchPoint:
    return SearchPoint(**params, top1_percent=top1, spread_points=0.0, top1_by_seed_percent=(top1,), size_bytes=size)


def _do(study: Study, trial: optuna.Trial) -> dict[str, Any]:
    params = suggest(study, trial)
    size = params["calibration_samples"] if len(study.optuna.directions) > 1 else None
    assert finish(study, trial, _point(params, size=size))
    return params


def test_every_point_of_the_grid_comes_once_also_after_a_pause(search: dict[str, Any]) -> None:
    search |= {"sample_counts": [4, 8], "observers": ["minmax", "histogram"], "fp32_layer_counts": [0, 2]}
    with worker(**search) as study:
        done = [_do(study, trial) for _ in range(3) if (trial := _take(study))]
    with worker(**search) as study:
        while trial := _take(study):
            done.append(_do(study, trial))
        assert open_trials(study) == 0 and len(points_of(study)) == 8
    assert len({tuple(params.values()) for params in done}) == len(done) == 8


def test_what_was_stopped_is_done_again_and_what_failed_is_not(search: dict[str, Any]) -> None:
    with worker(**search, sample_counts=[4, 8]) as study:
        stopped, failed = _take(study), _take_next(study)
        assert stopped and failed
        give_back(study, stopped)
        fail(study, failed, "StageError: cannot be quantized")
        again = _take(study)
        assert again and suggest(study, again) == suggest(study, stopped)
        _do(study, again)
        assert _take(study) is None and failures(study) == ["StageError: cannot be quantized"]
        states = Counter(trial.state for trial in study.optuna.trials)
        assert states == {TrialState.COMPLETE: 1, TrialState.FAIL: 2}
        assert failed.number in [t.number for t in study.optuna.trials if t.user_attrs.get("error")]


def _take_next(study: Study) -> optuna.Trial | None:
    """Another trial at the same time: a journal has one worker, which has one at a time."""
    if study.place.shared:
        return _take(study)
    return study.optuna.ask()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_have_a_fixed_number_of_trials_for_all_workers(sampler: str, postgres: str) -> None:
    options = {
        "storage": postgres, "study": sampler, "sampler": sampler, "trials": 10, "objective": "top1+size",
        "sample_counts": list(range(1, 400)),
    }  # fmt: skip
    with worker(**options) as one, worker(**options) as other:
        found = []
        while (first := _take(one)) and (second := _take(other)):
            found += [_do(one, first), _do(other, second)]
        assert len(found) == len(one.optuna.trials) == 10
    assert len({params["calibration_samples"] for params in found}) > 7  # workers do not draw the same numbers


def test_workers_that_race_for_trials_get_each_once(postgres: str) -> None:
    options = {"storage": postgres, "study": "race", "sample_counts": list(range(1, 17))}
    all_are_there = Barrier(3)

    def work(_: int) -> list[int]:
        with worker(**options) as study:
            all_are_there.wait(60)
            found = []
            while trial := _take(study):
                found.append(_do(study, trial)["calibration_samples"])
                time.sleep(0.2)  # as a trial takes; without, the first one is always there again before others look
        return found

    with ThreadPoolExecutor(3) as pool:
        by_worker = list(pool.map(work, range(3)))
    assert sorted(count for found in by_worker for count in found) == list(range(1, 17))
    assert sum(bool(found) for found in by_worker) > 1


def test_a_trial_without_signs_of_life_goes_to_another_worker(postgres: str) -> None:
    """The last heartbeats are dated back, instead of waiting: only the trial that goes on sending some is kept."""
    options = {"storage": postgres, "study": "silent", "sample_counts": [4, 8], "heartbeat_seconds": 1}
    gone: list[int] = []
    with worker(**options) as one, worker(**options) as other:
        silent, living = _take(one), _take(one)
        assert silent and living
        with alive(one, living):
            with psycopg.connect(postgres) as database:
                database.execute("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '7 seconds'")
            time.sleep(1.5)
            again = take_trial(other, lambda trial, again: gone.append(trial.number))
        assert again and suggest(other, again) == suggest(one, silent)
        assert gone == [silent.number]
        assert again.user_attrs["retry_of"] == silent.number
        assert not finish(one, silent, _point(suggest(one, silent)))
        _do(other, again)
        _do(one, living)
        assert len(points_of(one)) == 2 and open_trials(one) == 0


def test_a_worker_killed_before_its_first_heartbeat_loses_no_trial(postgres: str) -> None:
    """Optuna alone never calls such a trial stale."""
    with worker(storage=postgres, study="early", sample_counts=[4, 8]) as study:
        first = _take(study)
        early = study.optuna.ask()
        again = _take(study)
        assert first and again and again.user_attrs["retry_of"] == early.number
        assert suggest(study, again)["calibration_samples"] == 8 and _take(study) is None


def test_a_queue_that_was_not_filled_to_the_end_is_filled_once(
    search: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = optuna.Study.add_trial

    def add_two(study: optuna.Study, trial: FrozenTrial) -> None:
        if len(study.trials) == 2:
            raise KeyboardInterrupt
        add(study, trial)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), worker(**search) as study:
        patched.setattr(optuna.Study, "add_trial", add_two)
        _take(study)
    with worker(**search) as study:
        done = []
        while trial := _take(study):
            done.append(_do(study, trial)["calibration_samples"])
    assert done == SearchConfig().sample_counts


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_to_workers_each_point_is_measured_once(seed: int, tmp_path: Path) -> None:
    """Trials are completed, fail, are stopped, or their workers die, by chance."""
    chance, died = random.Random(seed), Counter[int]()
    ended: dict[int, str] = {}
    while True:
        with worker(study_dir=str(tmp_path), study="chaos", sample_counts=list(range(1, 13))) as study:
            while trial := _take(study):
                number = suggest(study, trial)["calibration_samples"]
                assert number not in ended
                event = chance.choice(["complete", "fail", "stop", "die"])
                if event == "die":  # the worker is gone without a word
                    died[number] += 1
                    if died[number] == MOST_DEATHS:
                        ended[number] = "died"
                    break
                if event == "stop":
                    give_back(study, trial)
                    break
                ended[number] = event
                _do(study, trial) if event == "complete" else fail(study, trial, "no reason")
            else:
                break
    with worker(study_dir=str(tmp_path), study="chaos", sample_counts=list(range(1, 13))) as study:
        how = Counter(ended.values())
        assert how.total() == 12 and how["complete"] == len({p.calibration_samples for p in points_of(study)})
        assert how["complete"] == len(points_of(study)) and open_trials(study) == 0
        reasons = Counter(failures(study))
        assert reasons == Counter({"no reason": how["fail"], f"its worker died {MOST_DEATHS} times": how["died"]})


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    options = {"study_dir": str(tmp_path), "study": "deadly", "sample_counts": [4]}
    for _ in range(MOST_DEATHS):
        with worker(**options) as study:  # which ends without a word
            assert _take(study)
    told: list[tuple[int, bool]] = []
    with worker(**options) as study:
        assert take_trial(study, lambda trial, again: told.append((trial.number, again))) is None
        assert told == [(MOST_DEATHS - 1, False)] and open_trials(study) == 0
        assert failures(study) == [f"its worker died {MOST_DEATHS} times"]


def test_the_last_worker_to_leave_is_told(postgres: str) -> None:
    options = {"storage": postgres, "study": "leaving", "sample_counts": [4]}
    called: list[str] = []
    with worker(**options) as one:
        with worker(**options) as two:
            assert not two.place.leave(lambda: called.append("two"))
        assert one.place.leave(lambda: called.append("one"))
    assert called == ["two"]


def test_one_search_at_a_time_in_a_journal(tmp_path: Path) -> None:
    options = {"study_dir": str(tmp_path), "study": "mine"}
    with worker(**options), pytest.raises(InputError, match="another search is at work"), worker(**options):
        pass


def test_a_study_of_something_else_is_refused(search: dict[str, Any]) -> None:
    with worker(**search) as study:
        config = Config(search=SearchConfig(**search))
        with pytest.raises(InputError, match=rf"--study {study.name}: was made for seed 0, not 1"):
            find_study(study.place, study.name, config, {"seed": 1})


def test_the_database_of_mlflow_is_refused(postgres: str) -> None:
    import sqlalchemy

    url = sqlalchemy.make_url(postgres).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE tracking"))
    other = url.set(database="tracking")
    with sqlalchemy.create_engine(other, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE experiments (id int)"))
    with pytest.raises(InputError, match="is MLflow's") as refused:
        with open_place(SearchConfig(storage=other.render_as_string(hide_password=False), study="a")):
            pass
    assert url.password and url.password not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", ["does not answer", "refused"]),
        ("mysql://me:secret@localhost/x", ["must be postgresql://"]),
        ("sqlite:///secret.db", ["must be postgresql://", "--study-dir"]),
        ("postgresql+asyncpg://me:secret@localhost/x", ["must be postgresql://"]),
        ("postgresql://me:sec@ret@localhost:port/x", ["must be postgresql://"]),
        ("nonsense", ["must be postgresql://"]),
    ],
)
def test_refused_storage(url: str, words: list[str]) -> None:
    with pytest.raises(InputError) as refused, open_place(SearchConfig(storage=url, study="a")):
        pass
    message = str(refused.value)
    assert [word for word in ["--storage", *words] if word not in message] == []
    assert "secret@" not in message and "ret@" not in message and "\n" not in message


def test_the_address_of_a_study_has_no_password(postgres: str, tmp_path: Path) -> None:
    user, _, host = postgres.removeprefix("postgresql://").partition("@")
    name, _, password = user.partition(":")
    assert name and password
    for url in (postgres, f"postgresql://{name}@{host}?password={password}"):
        with open_place(SearchConfig(storage=url, study="a")) as place:
            assert place.address("a") == f"postgresql://{name}@{host}"
    with open_place(SearchConfig(study_dir=str(tmp_path))) as place:
        assert place.address("a") == str(tmp_path / "a.journal")


def test_several_workers_need_a_name(postgres: str) -> None:
    with pytest.raises(InputError, match="--study NAME"), open_place(SearchConfig(storage=postgres)):
        pass


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:secret@host/x", "postgresql://me:***@host/x"),
        ("postgresql://me:se@cret@host/x", "postgresql://me:***@host/x"),
        ("postgresql://host/x?user=me&password=secret&a=1", "postgresql://host/x?user=me&password=***&a=1"),
        ("postgresql://me@host/x", "postgresql://me@host/x"),
        ("no answer at postgresql://me:s@host/x (x@y)", "no answer at postgresql://me:***@host/x (x@y)"),
    ],
)
def test_passwords_are_hidden(text: str, hidden: str) -> None:
    assert hide_secrets(text) == hidden
