"""Several processes on one store that is new to all of them: nothing is lost, nothing is broken."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import mlflow
import pytest
from conftest import NOT_TIMED, start_qexp
from mlflow.exceptions import MlflowException
from postgres import installed
from servers import start_server
from sqlalchemy import Engine, Pool, event
from stores import new_store

from qexp.errors import InputError, StoreError
from qexp.tracking.refused import end_refused
from qexp.tracking.runs import start_run, use_experiment
from qexp.tracking.store import again, use_store

TRAININGS, PROCESSES, ROUNDS = 2, 4, 3
TRAINING = ["train", "--epochs", "1", "--image-size", "8", *NOT_TIMED]
WORKER = """
import sys, time
import mlflow, torch
from qexp.tracking import store
from qexp.tracking import runs as tracking
from qexp.tracking import aliases
from qexp.data.datasets import Dataset, Split
number, start, rounds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])  # those of no command of qexp
split = Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
dataset = Dataset("race", "none", ("a",), split, split, split, "0" * 16)
open(f"{start}.{number}", "w").close()
while not __import__("os").path.exists(start):
    time.sleep(0.005)
store.use_store()
tracking.use_experiment("race")
client = mlflow.MlflowClient()
for at in range(rounds):
    with tracking.start_run(f"main-{number}-{at}", "note") as run_id:
        tracking.log_dataset(split, dataset, "test", f"{at:016d}")
        uris = {}
        for kind in ("fp32", "int8"):
            try:
                client.create_registered_model(f"race-{kind}")
            except mlflow.exceptions.MlflowException as error:
                assert error.error_code == "RESOURCE_ALREADY_EXISTS", error
            tags = {"kind": kind, "fp32_uri": uris.get("fp32", "none")}
            made = client.create_model_version(f"race-{kind}", mlflow.get_artifact_uri(kind), run_id, tags=tags)
            uris[kind] = f"models:/race-{kind}/{made.version}"
            aliases.set_alias("challenger", uris[kind])
        aliases.move_champion(uris["int8"])
sys.exit(0)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An MLflow server on a new SQLite file."""
    with start_server(tmp_path) as started:
        yield started.url


@pytest.mark.slow
def test_trainings_that_start_at_once_register_all_their_versions(server: str, tmp_path: Path) -> None:
    """On a server; processes that share a SQLite file are those of the next test."""
    trainings = [start_qexp(tmp_path, *TRAINING, uri=server) for _ in range(TRAININGS)]
    codes = [training.wait() for training in trainings]
    assert codes == [0] * TRAININGS, "\n".join(training.stderr for training in trainings)
    summaries = [json.loads(training.stdout) for training in trainings]
    client = mlflow.MlflowClient(tracking_uri=server)
    name, numbers = "smallnet-digits-fp32", {str(number) for number in range(1, TRAININGS + 1)}
    versions = client.search_model_versions(f"name = '{name}'")
    assert {str(version.version) for version in versions} == numbers
    assert {version.tags["verified"] for version in versions} == {"true"}
    made = {f"models:/{name}/{version.version}": version.run_id for version in versions}
    assert made == {summary["fp32"]: summary["run_id"] for summary in summaries}
    experiment = client.get_experiment_by_name("qexp-digits")
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("train-smallnet", "FINISHED")] * TRAININGS


@pytest.mark.slow
def test_processes_that_start_at_once_lose_nothing(tmp_path: Path) -> None:
    """With many more writes at the same moment than pipelines make."""
    uri, start = f"sqlite:///{tmp_path}/new folder/mlflow.db", tmp_path / "start"
    workers = [
        start_qexp(tmp_path, str(number), str(start), str(ROUNDS), uri=uri, before=WORKER)
        for number in range(PROCESSES)
    ]
    while len(list(tmp_path.glob("start.*"))) < PROCESSES and all(one.poll() is None for one in workers):
        time.sleep(0.05)
    start.touch()
    codes = [worker.wait() for worker in workers]
    assert codes == [0] * PROCESSES, "\n".join(worker.stderr for worker in workers)

    client = mlflow.MlflowClient(tracking_uri=uri)
    assert {experiment.name for experiment in client.search_experiments()} == {"Default", "qexp-race"}
    experiment = client.get_experiment_by_name("qexp-race")
    runs = client.search_runs([experiment.experiment_id])
    expected = {f"main-{number}-{at}" for number in range(PROCESSES) for at in range(ROUNDS)}
    assert {run.info.run_name for run in runs} == expected and len(runs) == len(expected)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(len(run.inputs.dataset_inputs) == 1 for run in runs)
    for name in ("race-fp32", "race-int8"):
        versions = client.search_model_versions(f"name = '{name}'")
        assert sorted(int(version.version) for version in versions) == list(range(1, len(expected) + 1))
        assert {version.run_id for version in versions} == {run.info.run_id for run in runs}
    int8, fp32 = (client.get_model_version_by_alias(f"race-{kind}", "champion") for kind in ("int8", "fp32"))
    assert int8.tags["fp32_uri"] == f"models:/race-fp32/{fp32.version}"  # whoever was last, the two belong together


def test_again_repeats_what_lost_a_race_and_nothing_else() -> None:
    tried = []

    def lose(code: int, times: int) -> str:
        tried.append(code)
        if len(tried) <= times:
            raise MlflowException("UNIQUE constraint failed", error_code=code)
        return "written"

    from mlflow.protos.databricks_pb2 import BAD_REQUEST, RESOURCE_DOES_NOT_EXIST

    assert again(lambda: lose(BAD_REQUEST, 2)) == "written" and len(tried) == 3
    tried.clear()
    with pytest.raises(MlflowException):
        again(lambda: lose(RESOURCE_DOES_NOT_EXIST, 99))
    assert len(tried) == 1
    with pytest.raises(MlflowException):
        again(lambda: lose(BAD_REQUEST, 99))
    assert 3 < len(tried) < 20


def test_first_use_leaves_the_database_alone_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/deep/in/mlflow.db")
    use_store()
    assert [path.name for path in (tmp_path / "deep" / "in").iterdir()] == ["mlflow.db"]
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]
    (tmp_path / "file").touch()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(InputError, match="does not answer"):
        use_store()


SET = r"; set MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
ADDRESSES = {
    "'sqlite:///mlflow.db'": "begins or ends with a blank or a quote; set MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
    " sqlite:///mlflow.db": "begins or ends with a blank or a quote; set MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
    '"http://127.0.0.1:5000"': "begins or ends with a blank or a quote; set MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
    "file:./mlruns": f"MLflow no longer takes its earlier store of files){SET}",
    "./mlruns": f"MLflow no longer takes its earlier store of files){SET}",
    "sqlite://": f"it names no file, so what is logged would be lost){SET}",
    "sqlite:///:memory:": f"it names no file, so what is logged would be lost){SET}",
    "sqlite:mlflow.db": f"or a database such as postgresql://USER@HOST/NAME){SET}",
    "htp://somewhere": f"must be sqlite:///FILE, http(s)://HOST:PORT or a database such as postgresql://USER@HOST/NAME){SET}",
    "sqlite:///folder": f"it is no regular file){SET}",
    "sqlite:///pipe": f"it is no regular file){SET}",
    "sqlite:///text": f"file is not a database){SET}",
    "sqlite:///text/mlflow.db": f"Not a directory){SET}",
    "sqlite:////proc/mlflow.db": f"unable to open database file){SET}",
    "http://127.0.0.1:9": "(no answer (Connection refused)); start it, or set MLFLOW_TRACKING_URI to another",
}


@pytest.mark.parametrize("uri", ADDRESSES)
def test_an_address_that_cannot_be_used_is_refused_at_once_with_what_to_set(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("text").write_text("this is a text and not a database")
    started = time.monotonic()
    mlflow.set_tracking_uri(uri)
    with pytest.raises(InputError) as refused:
        use_store()
    assert str(refused.value).startswith(f"MLFLOW_TRACKING_URI {repr(uri) if 'blank' in ADDRESSES[uri] else uri}: ")
    assert ADDRESSES[uri] in str(refused.value)
    assert capfd.readouterr() == ("", "") and time.monotonic() - started < 20
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe", "text"}


@pytest.mark.skipif(not installed(), reason="needs psycopg and PostgreSQL, as engines of a database do")
def test_a_database_that_is_away_is_asked_once(capfd: pytest.CaptureFixture[str]) -> None:
    mlflow.set_tracking_uri("postgresql://me:secret@127.0.0.1:9/x")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"postgresql://me:\*\*\*@127.0.0.1:9/x: .*Connection refused"):
        use_store()
    assert time.monotonic() - started < 20 and capfd.readouterr().err == ""


def test_old_runs_here_are_told_apart_from_a_variable_that_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    with pytest.raises(
        InputError, match=rf"where MLFLOW_TRACKING_URI is not set and a folder mlruns holds one\){SET}$"
    ):
        use_store()
    mlflow.set_tracking_uri(new_store(tmp_path))
    use_store()


@pytest.mark.parametrize("name", ["Jane Doe", "ü#+,(x)", "50% off", "100%"])
def test_a_folder_of_any_name_holds_the_default_store_and_nothing_is_made_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    new_store(folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    use_store()
    assert mlflow.MlflowClient().get_experiment("0").artifact_location == str(folder / "mlruns" / "0")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


def test_what_sqlite_cannot_write_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The reason is in the error, and SQLAlchemy's own lines are not before it."""
    new_store(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///file:{tmp_path}/mlflow.db?mode=ro&uri=true")
    use_store()  # whoever only reads may go on
    with pytest.raises(StoreError, match="attempt to write a readonly database"):
        use_experiment("digits")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["50%25 off", "a%41b", "Jane%20Doe", "what?"])
@pytest.mark.parametrize("default", [False, True])
def test_a_folder_that_mlflow_would_take_for_another_one_is_refused_before_anything_is_made(
    name: str, default: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the place of the database, and as that of artifacts."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(None if default else new_store(tmp_path))  # type: ignore[arg-type]
    before = sorted(tmp_path.rglob("*"))
    if name == "what?" and not default:  # artifacts may be there
        use_store()
    else:
        with pytest.raises(InputError, match=r"MLflow takes (\?|%\w\w) in the name of a folder .*; rename it, or "):
            use_store()
    assert sorted(tmp_path.rglob("*")) == before


class _Refusing(BaseHTTPRequestHandler):
    """A server of MLflow that lets this user read that there is nothing, and no more."""

    def do_GET(self) -> None:
        self._answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')

    def do_POST(self) -> None:
        asks = self.path.endswith("/search")
        self._answer(200 if asks else 403, b"{}" if asks else b"Permission denied")

    def _answer(self, code: int, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        pass


def test_a_server_that_denies_permission_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreError, match=r"^MLflow \(http:.*\): 403, permission denied: set .* to a user who may$"):
            use_experiment("digits")
        server.shutdown()
    assert "Traceback" not in capfd.readouterr().err and not list(tmp_path.iterdir())


def _without_waiting(connection: Any, cursor: Any, statement: str, values: Any, *more: Any) -> tuple[str, Any]:
    """MLflow lets SQLite wait 20 seconds for a lock."""
    return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), values


@pytest.fixture
def impatient() -> Iterator[None]:
    event.listen(Engine, "before_cursor_execute", _without_waiting, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", _without_waiting)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("problem", ["locked", "full"])
def test_a_database_that_is_locked_or_full_is_one_line_and_works_again_afterwards(
    problem: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Locked by another connection, as by another process; full as on a disk that has no room for one more page."""
    new_store(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db?timeout=0.1")
    use_store()
    use_experiment("digits")
    with _locked(tmp_path) if problem == "locked" else _full():
        if problem == "locked":
            with pytest.raises(InputError, match=r"\(database is locked\); another process is writing to it"):
                use_store()
        else:
            use_store()  # whoever only reads may go on
        reason = "database is locked" if problem == "locked" else "database or disk is full"
        note = 7000 * "n"  # more than there is room for in pages that are there
        with pytest.raises(StoreError, match=rf"^MLflow \(sqlite:.*\): \(.*\) {reason}$"), start_run("train-x", note):
            pass
    assert capfd.readouterr() == ("", "") and mlflow.active_run() is None
    with start_run("train-x", note) as run_id:
        pass
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FINISHED"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("begin exclusive")
        yield


@contextmanager
def _full() -> Iterator[None]:
    """No new pages for SQLite, which then says the same as where the disk has none."""

    def stop(connection: Any, record: Any, proxy: Any) -> None:
        pages = connection.execute("pragma page_count").fetchone()[0]
        connection.execute(f"pragma max_page_count = {pages}")

    def allow(connection: Any, record: Any) -> None:
        connection.execute(f"pragma max_page_count = {2**30}")

    event.listen(Pool, "checkout", stop)
    event.listen(Pool, "checkin", allow)
    yield
    event.remove(Pool, "checkout", stop)
    event.remove(Pool, "checkin", allow)


@pytest.mark.parametrize("there", [False, True])
def test_under_mlflow_run_a_relative_database_is_not_that_of_the_project(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    if there:
        new_store(tmp_path)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    command = 'MLFLOW_TRACKING_URI="sqlite:///$PWD/mlflow.db" mlflow run …'
    with pytest.raises(InputError, match=f"no such {'run' if there else 'file'}") as refused:
        use_store()
    assert str(tmp_path) in str(refused.value) and str(refused.value).endswith(command)
    end_refused("0" * 32, "why")
    assert [path.name for path in tmp_path.iterdir()] == (["mlflow.db"] if there else [])
