"""`mlflow run` as a user calls it: against the server of a team, and in an environment that uv builds from conda.yaml.

All processes of these two are real ones, with those in which qexp times models and verifies versions. What `mlflow run`
starts is elsewhere started as a fork: MLproject's command, with a run that is there already.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import NOT_TIMED, PLAIN, QUICK, REPOSITORY, environment_for, start_qexp
from forked import start_python
from mlflow.projects.utils import load_project
from postgres import installed, start_postgres
from servers import make_server
from stores import new_store

BIN = Path(sys.executable).parent
WORDS = [*QUICK, *PLAIN, *NOT_TIMED, *"--epochs 2 --image-size 8 --batch-sizes 1".split()]  # the last value counts
OPTIONS = [
    word
    for name, value in dict(zip(WORDS[::2], WORDS[1::2], strict=True)).items()
    for word in ("-P", f"{name[2:].replace('-', '_')}={value}")
]


def _project(folder: Path) -> Path:
    """The committed kinds of files, in a path with a space, without environment, data or runs."""
    target = folder / "qexp project"
    target.mkdir()
    for name in ("MLproject", "conda.yaml", "config.yaml"):
        shutil.copy(REPOSITORY / name, target)
    for name in ("qexp", "entrypoints"):
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def _mlflow_run(
    project: Path, uri: str, *arguments: str, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_") and name != "PYTHONPATH"
    }
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | (extra or {})
    command = [sys.executable, "-m", "mlflow", "run", ".", "--experiment-name", "qexp-digits", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=900)


def _summary(stdout: str) -> dict[str, str]:
    """Our last line; `mlflow run` itself may print the run's address after it."""
    return json.loads([line for line in stdout.splitlines() if line.startswith("{")][-1])


def _runs(uri: str) -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("qexp-digits")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.mark.slow
def test_main_through_mlflow_run_against_the_server_of_a_team(tmp_path: Path) -> None:
    """`make server` on PostgreSQL, or on SQLite where that is not installed: it keeps what it has, and shows no
    password of the database."""
    folder = tmp_path / "server"
    folder.mkdir()
    with ExitStack() as stack:
        database = stack.enter_context(start_postgres(tmp_path)) if installed() else ""
        with make_server(folder, **({"BACKEND_STORE_URI": database} if database else {})) as url:
            done = _mlflow_run(_project(tmp_path), url, "--env-manager", "local", "-e", "main", *OPTIONS)
            assert done.returncode == 0, done.stderr
            summary = _summary(done.stdout)
            mlflow.set_tracking_uri(url)
            page = mlflow.artifacts.load_text(summary["report"])
            assert page.count("data:image/png;base64,") == 6  # the layers' sensitivity was not measured
            model = mlflow.pytorch.load_model("models:/smallnet-digits-int8@challenger")
            assert "quantized::conv2d_relu" in str(model.inlined_graph)
        assert not database or database not in (folder / "server.log").read_text()
        # What the server has kept, once it has ended:
        assert (folder / "mlflow.db").exists() is not bool(database)
        runs = _runs(database or f"sqlite:///{folder}/mlflow.db")
        assert set(runs) == {"smallnet-digits", "train-smallnet", "quantize-fx-64", "latency-smallnet", "report"}
        assert all(run.info.status == "FINISHED" for run in runs.values())
        assert runs["smallnet-digits"].info.run_id == summary["run_id"]
        assert runs["smallnet-digits"].data.params["train.epochs"] == "2"
        assert [*folder.glob(f"mlartifacts/*/{summary['run_id']}/**/report.html")]
    if not database:
        pytest.skip("all was well, but on SQLite: PostgreSQL is not installed (apt-get install postgresql)")


@pytest.mark.slow
def test_stopped_training_is_resumed_by_the_entry_point_of_the_project(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    process = start_qexp(tmp_path, "train", "--epochs", "8", "--image-size", "8", *NOT_TIMED, uri=uri)
    process.wait_for_line("epoch 2/8")
    process.kill()
    (run_id,) = (path.name for path in (tmp_path / "checkpoints").glob("*"))
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("qexp-digits").experiment_id
    pointer = client.create_run(experiment, run_name="resumed").info.run_id
    client.log_param(pointer, "resume", run_id)
    command = load_project(str(REPOSITORY)).get_entry_point("train").compute_command({"resume": run_id}, None)
    python, *words = shlex.split(command)
    given = {"MLFLOW_RUN_ID": pointer, "MLFLOW_EXPERIMENT_ID": experiment}
    process = start_python(tmp_path, tuple(words), environment_for(uri) | given)
    assert process.wait() == 0 and python == "python", process.stderr
    assert _summary(process.stdout)["run_id"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(1, 9))
    assert run_id in client.get_run(pointer).data.tags["mlflow.note.content"]


def test_conda_environment_is_the_one_that_these_tests_run_in(tmp_path: Path) -> None:
    """uv finds nothing to install, replace or take away: what conda.yaml asks for is what is tested here."""
    environment = yaml.safe_load((REPOSITORY / "conda.yaml").read_text())
    (packages,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    (tmp_path / "requirements.txt").write_text("\n".join(packages))
    command = [BIN / "uv", "pip", "install", "--dry-run", "--offline", "--python", sys.executable]
    command += ["-r", str(tmp_path / "requirements.txt")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "Would make no changes" in done.stderr, done.stderr


@pytest.mark.long
def test_main_in_the_environment_that_uv_builds(tmp_path: Path) -> None:
    """uv does not read pip's configuration: the folder of wheels that pip knows, if any, is handed on."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    links = os.environ.get("UV_FIND_LINKS") or ",".join(found.stdout.split())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    extra = {"MLFLOW_ENV_ROOT": str(tmp_path / "environments")} | ({"UV_FIND_LINKS": links} if links else {})
    done = _mlflow_run(_project(tmp_path), uri, "--env-manager", "uv", "-e", "main", *OPTIONS, extra=extra)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _summary(done.stdout)["int8"] == "models:/smallnet-digits-int8/1"
    assert _runs(uri)["smallnet-digits"].info.status == "FINISHED"
    assert str(tmp_path / "environments") in done.stderr  # it ran there and not here
