"""What a kill leaves: docs/reference/kills.md is read, a process is killed at each of its moments, and resumed.

Processes are forks that call the stages on tiny models, with a real SQLite store; resuming is done in the test.
"""

import inspect
import os
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
import torch
from conftest import EXECUTION, REPOSITORY, build_tiny, equal_weights
from sqlalchemy import Engine, event
from stores import new_store
from torch import nn

from qexp import files
from qexp.config import Config, SearchConfig, TrainConfig
from qexp.data.cifar10 import cached
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.measurement.accuracy import to_float
from qexp.measurement.host import read_host
from qexp.models.classifier import ModelSpec
from qexp.models.preprocessing import squashed
from qexp.pipeline import job as jobs
from qexp.pipeline import report as reports
from qexp.pipeline.job import Job, open_job
from qexp.pipeline.resume import config_of_run
from qexp.pipeline.sync import sync_run
from qexp.quantization.sensitivity import LayerSensitivity, SensitivityResult
from qexp.search import storage
from qexp.search.queue import finish, suggest, take_trial
from qexp.search.results import SearchPoint
from qexp.search.storage import open_place
from qexp.search.study import Study, find_study, make_study, points_of
from qexp.tracking import aliases, registry, uploads
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import succeed
from qexp.tracking.job_folder import job_folder
from qexp.tracking.results import WrittenReport
from qexp.tracking.store import logged_model_of
from qexp.tracking.training_log import TrainingLog
from qexp.training.train import EpochResult, train_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The value of `grace_period`")]
PAGE = REPOSITORY / "docs" / "reference" / "kills.md"
MOMENTS = [
    cell.strip()
    for cell in re.findall(r"^\| ([^|]+) \|.*\|$", PAGE.read_text(), re.MULTILINE)
    if cell.strip() not in ("killed", ":--")
]
NAME = "sensitivity-smallnet"
PUT_BACK = ((jobs, "upload"), (reports, "write_report"), (reports, "shutil"), (registry, "reloads_equal"))
FOUND = SensitivityResult(
    (LayerSensitivity("network.0", 31.5, 93.75, 94.0, 0.025, 0.0078),),
    fp32_top1_percent=95.0, int8_top1_percent=93.0, images=64, observer="histogram", per_channel=True,
    int8_kl_nats=0.03125, engines=("fx",),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def folder(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an experiment of its own."""
    monkeypatch.chdir(tmp_path)
    for owner, name in PUT_BACK:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(tmp_path.name)
    return tmp_path


# --- In the process that is killed ---


def die_at(target: str, when: str, count: int) -> None:
    """Die `when` (before or after) the `count`-th call of `target` is made."""
    place, _, name = target.rpartition(".")
    module, _, inner = place.partition(":")
    owner: Any = import_module(module)
    for part in filter(None, inner.split(".")):
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), list[int]()

    def dies(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*given, **named)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, dies)


def killed(work: Callable[..., Any], target: str, when: str, *arguments: Any, count: int = 1) -> None:
    """Call `work` in a fork of this process, which dies so."""
    if (child := os.fork()) == 0:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # OpenMP's others do not survive a fork
            die_at(target, when, count)
            work(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


# --- A job and its stages ---


def whole_job(resume: str | None = None) -> None:
    with open_job(read_host(1), Config(), "main", "note", resume) as job:
        stage(job)


def stage(job: Job) -> SensitivityResult:
    def read(run_id: str) -> SensitivityResult:
        return tracking.read_result(SensitivityResult, run_id, "sensitivity")

    return job.stage(NAME, "note", Config(), worked, read)


def worked(folder: Path) -> SensitivityResult:
    with Path("worked").open("a") as file:
        file.write("x")
    return FOUND


def _experiment() -> list[str]:
    return [os.environ["MLFLOW_EXPERIMENT_ID"]]


def _int8() -> str:
    return f"int8-{_experiment()[0]}"


def _fp32() -> str:
    return f"fp32-{_experiment()[0]}"


def _runs() -> dict[str, list[str]]:
    """The status of each run by its name, the newest first."""
    found = dict[str, list[str]]()
    for run in mlflow.MlflowClient().search_runs(_experiment(), order_by=["attributes.start_time DESC"]):
        found.setdefault(run.info.run_name, []).append(run.info.status)
    return found


def _job() -> str:
    (run,) = mlflow.MlflowClient().search_runs(_experiment(), "tags.`qexp.stage` = 'main'")
    return str(run.info.run_id)


def _left() -> set[str]:
    """The files of the stage that are left."""
    return {file.name for file in Path().glob(f"checkpoints/*/{NAME}/*")}


def _resumed(*statuses: str, works: int) -> None:
    whole_job(_job())
    assert _runs() == {"main": ["FINISHED"], NAME: list(statuses)}
    assert len(Path("worked").read_text()) == works and not Path("checkpoints").exists()
    (found,) = (run for run in tracking.children_of(_job()) if run.info.status == "FINISHED")
    assert tracking.read_result(SensitivityResult, found.info.run_id, "sensitivity") == FOUND
    assert mlflow.load_table("tables/sensitivity.json", [found.info.run_id])["layer"].tolist() == ["network.0"]


def before_the_configuration(folder: Path) -> None:
    killed(whole_job, "qexp.tracking.runs.log_setup", "before")
    assert _runs() == {"main": ["RUNNING"]}
    with pytest.raises(InputError, match="start a new run"):
        config_of_run({}, _job(), "run")


def before_the_result_is_renamed(folder: Path) -> None:
    killed(whole_job, "pathlib:Path.replace", "before")
    assert _runs() == {"main": ["RUNNING"], NAME: ["RUNNING"]} and _left() == {"result.json.tmp"}
    _resumed("FINISHED", "KILLED", works=2)


def before_the_upload(folder: Path) -> None:
    killed(whole_job, "qexp.pipeline.job.keep", "after")
    assert _runs() == {"main": ["RUNNING"], NAME: ["RUNNING"]} and _left() == {"result.json"}
    _resumed("FINISHED", works=1)


def in_the_upload(folder: Path) -> None:
    killed(whole_job, "qexp.tracking.runs.log_result", "before")
    assert _runs() == {"main": ["RUNNING"], NAME: ["RUNNING"]} and _left() == {"result.json"}
    _resumed("FINISHED", works=1)


def before_the_folder_of_the_stage_goes(folder: Path) -> None:
    killed(whole_job, "qexp.pipeline.job.remove_folder", "before")
    assert _runs() == {"main": ["RUNNING"], NAME: ["FINISHED"]} and _left() == {"result.json"}
    _resumed("FINISHED", works=1)


def between_two_stages(folder: Path) -> None:
    killed(whole_job, "qexp.pipeline.job.remove_folder", "after")
    assert _runs() == {"main": ["RUNNING"], NAME: ["FINISHED"]} and _left() == set()
    _resumed("FINISHED", works=1)


def before_the_folder_of_the_job_goes(folder: Path) -> None:
    killed(whole_job, "qexp.pipeline.job.remove_folder", "before", count=2)
    assert _runs() == {"main": ["FINISHED"], NAME: ["FINISHED"]} and job_folder(_job()).is_dir()
    with pytest.raises(InputError, match="nothing left to do"):
        config_of_run({}, _job(), "run")
    assert sync_run(job_folder(_job()))["status"] == "FINISHED" and not Path("checkpoints").exists()


# --- A training ---


def training(place: str) -> None:
    dataset = torch.load(f"{place}/../tiny.pt", weights_only=False)
    train_in(Path(place), dataset)


def train_in(place: Path, dataset: Dataset, on_epoch: Callable[[EpochResult], None] = lambda epoch: None) -> nn.Module:
    model = build_tiny(dataset)
    options = TrainConfig(epochs=2, batch_size=64, **EXECUTION)
    result = train_model(model, dataset, options, 0, on_epoch, place)
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    return model


@pytest.fixture(scope="module")
def not_killed(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """What a training gives that nothing interrupts."""
    return train_in(tmp_path_factory.mktemp("not killed"), tiny)


def _trained(
    place: Path, tiny: Dataset, not_killed: nn.Module, left: set[str], target: str, when: str, count: int
) -> None:
    """A killed training and one that was not end with the same weights."""
    place.mkdir()
    torch.save(tiny, place.parent / "tiny.pt")
    killed(training, target, when, str(place), count=count)
    assert {file.name for file in place.iterdir()} == left
    assert equal_weights(train_in(place, tiny), not_killed)
    assert len({file.name for file in place.iterdir()}) == 2  # the checkpoint and the best weights


def before_the_first_checkpoint(folder: Path, tiny: Dataset, not_killed: nn.Module) -> None:
    _trained(folder / "a", tiny, not_killed, set(), "qexp.training.loop.validate", "before", 1)


def while_a_checkpoint_is_written(folder: Path, tiny: Dataset, not_killed: nn.Module) -> None:
    left = {"checkpoint.pt", "checkpoint.pt.tmp", "best-001.safetensors", "best-002.safetensors"}
    _trained(folder / "a", tiny, not_killed, left, "pathlib:Path.replace", "before", 4)


def between_best_weights_and_checkpoint(folder: Path, tiny: Dataset, not_killed: nn.Module) -> None:
    left = {"checkpoint.pt", "best-001.safetensors", "best-002.safetensors"}
    _trained(folder / "a", tiny, not_killed, left, "qexp.training.train:_Keeper.save_best", "after", 2)


def logged_training(place: str, run_id: str | None = None) -> None:
    dataset = torch.load("tiny.pt", weights_only=False)
    with tracking.start_run("train-smallnet", "note", run_id):
        log = TrainingLog(Config(), read_host(1))
        train_in(Path(place), dataset, log.epoch)


def before_the_epoch_is_logged(folder: Path, tiny: Dataset) -> None:
    torch.save(tiny, "tiny.pt")
    Path("a").mkdir()
    killed(logged_training, "qexp.tracking.training_log.log_curves", "before", "a", count=2)
    (run,) = mlflow.MlflowClient().search_runs(_experiment())
    assert tracking.logged_steps(run.info.run_id, "train/loss") == {1}
    logged_training("a", run.info.run_id)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2]


# --- Registering ---


def registering(resume: str | None = None) -> None:
    """A stage whose upload registers a tiny int8 version."""
    jobs.upload = register  # type: ignore[assignment]
    registry.reloads_equal = lambda *given: True  # a clean subprocess writes nothing
    whole_job(resume)


def register(result: SensitivityResult, folder: Path, at_ms: int) -> SensitivityResult:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    sample = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    stored, spec = torch.jit.trace(model, to_float(sample)), ModelSpec("smallnet", ("cat", "dog"), squashed(8))
    version = registry.register("int8", model, _int8(), spec, sample, {"engine": "fx"}, stored, once=True)
    registry.make_challenger(version)
    return uploads.upload(result, folder, at_ms)


def _registered(models: int, versions: int, target: str, when: str, count: int = 1) -> None:
    """So many logged models and versions are left; in the end there is one of each, complete, with its alias."""
    killed(registering, target, when, count=count)
    client = mlflow.MlflowClient()
    assert len(mlflow.search_logged_models(_experiment(), output_format="list")) == models
    left = client.search_model_versions(f"name = '{_int8()}'")
    assert len(left) == versions
    registering(_job())
    (version,) = client.search_model_versions(f"name = '{_int8()}'")
    (model,) = mlflow.search_logged_models(_experiment(), output_format="list")
    assert version.tags["kind"] == "int8" and version.tags["artifact_sha256"]
    assert logged_model_of(version) == model.model_id
    assert client.get_model_version_by_alias(_int8(), "challenger").version == version.version
    assert not left or left[0].source == version.source
    assert _runs() == {"main": ["FINISHED"], NAME: ["FINISHED"]} and len(Path("worked").read_text()) == 1


BEGIN_MODEL = "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore.create_logged_model"


def before_there_is_a_version(folder: Path) -> None:
    _registered(1, 0, BEGIN_MODEL, "after")


def in_the_middle_of_its_tags(folder: Path) -> None:
    _registered(1, 1, "mlflow:MlflowClient.set_model_version_tag", "before", count=4)


def before_its_alias(folder: Path) -> None:
    _registered(1, 1, "qexp.tracking.registry.make_challenger", "before")


# --- Decision, report, alias ---


def deciding() -> None:
    registry.tag_version(f"models:/{_int8()}/1", {"gate": "passed", "gate_reason": "kept", "verdict": "ship int8"})


def _two_versions() -> None:
    client = mlflow.MlflowClient()
    for name in (_fp32(), _int8()):
        client.create_registered_model(name)
        for number in (1, 2):
            client.create_model_version(name, "nowhere", tags={"fp32_uri": f"models:/{_fp32()}/{number}"})


def in_the_middle_of_the_decision(folder: Path) -> None:
    _two_versions()
    killed(deciding, "mlflow:MlflowClient.set_model_version_tag", "before", count=3)
    client = mlflow.MlflowClient()
    assert {"gate", "gate_reason", "verdict"} - set(client.get_model_version(_int8(), "1").tags) == {"verdict"}
    deciding()
    assert client.get_model_version(_int8(), "1").tags["verdict"] == "ship int8"


def reporting(resume: str | None = None) -> None:
    def write(evidence: Any, place: Path, origin: Any) -> None:
        place.mkdir(parents=True)
        for name in ("report.md", "report.html"):
            (place / name).write_text(name)

    def work(place: Path) -> WrittenReport:
        evidence: Any = SimpleNamespace(int8=SimpleNamespace(version_uri=f"models:/{_int8()}/1"))
        return reports.report(evidence, place, "out", None)

    reports.write_report = write  # type: ignore[assignment]
    reports.shutil = SimpleNamespace(rmtree=shutil.rmtree, copytree=partial(shutil.copytree, copy_function=copy_one))
    jobs.upload = lambda result, place, at_ms: result  # type: ignore[assignment]
    with open_job(read_host(1), Config(), "main", "note", resume) as job:
        job.stage("report", "note", Config(), work, read=str, holds=None)


def while_the_report_is_copied(folder: Path) -> None:
    killed(reporting, f"{__name__}.copy_one", "after")
    assert len(os.listdir("out")) == 1
    reporting(_job())
    assert sorted(os.listdir("out")) == ["report.html", "report.md"] and not Path("checkpoints").exists()


def copy_one(source: str, target: str) -> None:
    shutil.copy(source, target)


def moving() -> None:
    assert succeed(f"models:/{_int8()}/2", f"models:/{_int8()}/1")


def between_the_two_aliases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "ABANDONED_S", 0.2)
    _two_versions()
    client = mlflow.MlflowClient()
    for name in (_fp32(), _int8()):
        client.set_registered_model_alias(name, "champion", "1")
    killed(moving, "qexp.tracking.aliases.set_alias", "after")
    champions = [str(client.get_model_version_by_alias(name, "champion").version) for name in (_int8(), _fp32())]
    assert champions == ["2", "1"]
    moving()
    assert str(client.get_model_version_by_alias(_fp32(), "champion").version) == "2"


# --- A search ---


def _study() -> Study:
    config = Config(search=SearchConfig(study_dir="studies", study="mine", sample_counts=[4, 8], seeds_per_point=1))
    place = open_place(config.search).__enter__()  # until the process or the test ends
    asked = place, "mine", config, {"seed": 0}
    return find_study(*asked) or make_study(*asked)


def searching() -> Study:
    study = _study()
    while trial := take_trial(study, lambda trial, again: None):
        measure(study, trial)
    return study


def measure(study: Study, trial: optuna.Trial) -> None:
    params = suggest(study, trial)
    assert finish(study, trial, SearchPoint(**params, top1_percent=9.0, spread_points=0.0, top1_by_seed_percent=(9.0,)))


def _searched() -> None:
    study = searching()
    assert sorted(point.calibration_samples for point in points_of(study)) == [4, 8]


def before_the_study_says_what_for(folder: Path) -> None:
    killed(searching, "qexp.search.study:Study.remember", "before")
    _searched()


def while_a_trial_is_measured(folder: Path) -> None:
    killed(searching, f"{__name__}.measure", "before", count=2)
    told = list[bool]()
    study = _study()
    trial = take_trial(study, lambda trial, again: told.append(again))
    assert told == [True] and trial is not None and trial.user_attrs["retry_of"] == 1
    measure(study, trial)
    assert sorted(point.calibration_samples for point in points_of(study)) == [4, 8]


JOURNAL = "optuna.storages.journal:JournalFileBackend.append_logs"


def in_the_middle_of_a_line(folder: Path) -> None:
    killed(searching, JOURNAL, "after", count=8)
    (file,) = Path("studies").glob("*.journal")
    file.write_bytes(file.read_bytes()[:-9])
    _searched()
    assert (file.parent / "mine.journal.damaged").is_file()


def while_it_holds_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STALE_LOCK_S", 1)
    killed(searching, "os.fsync", "before", count=3)
    assert Path("studies/mine.journal.lock").exists()
    _searched()


# --- Other files ---


def caching() -> None:
    cached(Path(), [], squashed(8), lambda: {"images": torch.zeros(2)}, lambda found: True)


def while_images_are_cached(folder: Path) -> None:
    killed(caching, "pathlib:Path.replace", "before")
    (left,) = Path().glob(".qexp-cache-*.tmp")
    os.utime(left, (0, 0))
    caching()
    assert [file.suffix for file in Path().glob(".qexp-cache-*")] == [".safetensors"]


def temporary() -> None:
    tempfile.tempdir = str(Path.cwd())
    with files.own_temporary_folder():
        do_nothing()


def do_nothing() -> None:
    pass


def at_any_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(temporary, f"{__name__}.do_nothing", "before")
    assert len([*Path().glob("qexp-work-*")]) == 1
    monkeypatch.setattr(files, "YOUNG_S", -1)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with files.own_temporary_folder():
        pass
    assert not [*Path().glob("qexp-work-*")]


def in_a_training() -> None:
    """A real search is killed while it trains, in another file: that the test is there is all that is seen here."""
    name = "test_without_a_registered_model_one_is_trained_first"
    assert f"def {name}(" in (REPOSITORY / "tests/search/test_search.py").read_text()


CASES: dict[str, Callable[..., None]] = {
    "after the job's run was made, before its configuration is recorded": before_the_configuration,
    "while a stage works, until the result is renamed": before_the_result_is_renamed,
    "after the result of a stage is written, before anything is uploaded": before_the_upload,
    "in the middle of the upload, or after it, before the stage's run ends": in_the_upload,
    "after the stage's run has ended, before its folder is removed": before_the_folder_of_the_stage_goes,
    "between two stages, or after the last one": between_two_stages,
    "after the job's run has ended, before its folder is removed": before_the_folder_of_the_job_goes,
    "before the first checkpoint": before_the_first_checkpoint,
    "while a checkpoint is written": while_a_checkpoint_is_written,
    "after the best weights are written, before their checkpoint": between_best_weights_and_checkpoint,
    "after a checkpoint, before its epoch is in MLflow": before_the_epoch_is_logged,
    "while the model's files are stored, before there is a version": before_there_is_a_version,
    "after the version is made, before it has all tags": in_the_middle_of_its_tags,
    "after its tags, before its alias": before_its_alias,
    "in the middle of the tags of the decision": in_the_middle_of_the_decision,
    "while the report is copied to `--output-dir`": while_the_report_is_copied,
    "after `champion` has moved for int8, before it moves for fp32": between_the_two_aliases,
    "while the model is trained": in_a_training,
    "after the study is made, before it says what for": before_the_study_says_what_for,
    "while a trial is measured": while_a_trial_is_measured,
    "in the middle of a line of the journal": in_the_middle_of_a_line,
    "while it holds the journal's lock": while_it_holds_the_lock,
    "while images are cached": while_images_are_cached,
    "at any moment": at_any_moment,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_left_and_how_it_is_resumed(moment: str, folder: Path, request: pytest.FixtureRequest) -> None:
    case = CASES[moment]
    case(**{name: request.getfixturevalue(name) for name in inspect.signature(case).parameters})


def test_the_page_has_each_moment() -> None:
    assert MOMENTS == list(CASES)


def committing(number: int) -> None:
    """A job whose stage registers a version, up to the `number`-th commit to the store's database."""
    commits = list[int]()

    def before(connection: Any) -> None:
        commits.append(1)
        if len(commits) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "commit", before)
    registering()
    at_its_end()


def at_its_end() -> None:
    Path("ended").touch()


@pytest.mark.long
def test_killed_at_every_commit_a_job_is_resumed_to_the_same_end(folder: Path) -> None:
    for number in range(1, 1000):
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)
        mlflow.set_experiment(f"{folder.name}-{number}")
        killed(committing, f"{__name__}.at_its_end", "after", number)
        if Path("ended").exists():
            break
        if not (found := _runs().get("main")):
            continue  # nothing is there, not even a run
        assert found == ["RUNNING"] or found == ["FINISHED"]
        try:
            tracking.read_config(_job())
        except InputError:
            continue  # what cannot be resumed is refused
        if found == ["RUNNING"]:
            registering(_job())
        else:
            sync_run(job_folder(_job()))
        statuses = {status for found in _runs().values() for status in found}
        assert statuses <= {"FINISHED", "KILLED"} and not Path("checkpoints").exists()
        (version,) = mlflow.MlflowClient().search_model_versions(f"name = '{_int8()}'")
        (model,) = mlflow.search_logged_models(_experiment(), output_format="list")
        assert version.tags["kind"] == "int8" and logged_model_of(version) == model.model_id
        assert mlflow.MlflowClient().get_model_version_by_alias(_int8(), "challenger").version == version.version
    assert number > 30
