"""Stages in a real store: called once, kept where the store fails, read when the job is resumed, uploaded by sync."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from stores import new_store

from qexp.config import Config
from qexp.errors import StageError, StoreError
from qexp.measurement.host import Host, read_host
from qexp.pipeline import job as jobs
from qexp.pipeline.job import Job, open_job
from qexp.pipeline.resume import has_stage
from qexp.pipeline.sync import sync_run
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report.results import Evidence
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import job_folder, stage_folder
from qexp.tracking.leftovers import version_or_nothing

NAME = "sensitivity-smallnet"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    mlflow.set_experiment("digits")
    return read_host(1)


@pytest.fixture
def result(evidence: Evidence) -> SensitivityResult:
    assert evidence.int8.sensitivity
    return evidence.int8.sensitivity


def _stage(job: Job, work: Callable[[Path], SensitivityResult], holds: bool = True) -> SensitivityResult:
    def read(run_id: str) -> SensitivityResult:
        return tracking.read_result(SensitivityResult, run_id, "sensitivity")

    return job.stage(NAME, "note", Config(), work, read, holds=lambda found: holds)


def _never(folder: Path) -> SensitivityResult:
    raise AssertionError("called again")


def _runs() -> dict[str, list[str]]:
    found = dict[str, list[str]]()
    for run in mlflow.MlflowClient().search_runs(["1"]):
        found.setdefault(run.info.run_name, []).append(run.info.status)
    return found


def _stopped_job(host: Host, result: SensitivityResult, monkeypatch: pytest.MonkeyPatch, *, in_upload: bool) -> str:
    """The run of a job that has failed: while the result was uploaded, or after that."""
    with pytest.raises(StageError) as failed, monkeypatch.context() as patched:
        if in_upload:

            def fail(*given: object) -> None:
                raise MlflowException("no answer")

            patched.setattr(jobs, "upload", fail)
        with open_job(host, Config(), "main", "note") as job:
            assert _stage(job, lambda folder: result) == result
            raise StageError("later")
    assert ("qexp sync" in str(failed.value)) == isinstance(failed.value, StoreError) == in_upload
    return str(job.run_id)


@pytest.mark.parametrize("in_upload", [True, False])
def test_a_result_that_is_there_is_read_when_the_job_is_resumed(
    host: Host, result: SensitivityResult, monkeypatch: pytest.MonkeyPatch, in_upload: bool
) -> None:
    run_id = _stopped_job(host, result, monkeypatch, in_upload=in_upload)
    assert _runs() == {"main": ["FAILED"], NAME: ["FAILED" if in_upload else "FINISHED"]}
    assert has_stage(run_id, NAME) and not has_stage(run_id, "latency-smallnet")
    assert stage_folder(job_folder(run_id), NAME).exists() == in_upload
    with open_job(host, Config(), "main", "note", run_id) as job:
        assert _stage(job, _never) == result
    assert _runs() == {"main": ["FINISHED"], NAME: ["FINISHED"]}
    assert not Path("checkpoints").exists()


def test_sync_uploads_what_is_kept(host: Host, result: SensitivityResult, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = _stopped_job(host, result, monkeypatch, in_upload=True)
    for _ in range(2):
        done = sync_run(job_folder(run_id))
        left = {"status": "FAILED", "next": f"qexp run --resume {run_id}"}
        assert done == {"command": "sync", "run_id": run_id} | left
        assert _runs() == {"main": ["FAILED"], NAME: ["FINISHED"]} and not list(job_folder(run_id).glob("*/"))
    (run,) = tracking.children_of(run_id)
    assert tracking.read_result(SensitivityResult, run.info.run_id, "sensitivity") == result


def test_a_result_that_no_longer_holds_is_computed_anew(
    host: Host, result: SensitivityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = _stopped_job(host, result, monkeypatch, in_upload=False)
    calls = list[Path]()
    with open_job(host, Config(), "main", "note", run_id) as job:
        assert _stage(job, lambda folder: calls.append(folder) or result, holds=False) == result  # type: ignore[func-returns-value]
    assert len(calls) == 1 and _runs() == {"main": ["FINISHED"], NAME: ["FINISHED", "FINISHED"]}


def test_what_another_job_has_left_in_the_folder_is_not_read(
    host: Host, result: SensitivityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a study of `qexp search`, which several workers and several options share."""
    run_id = _stopped_job(host, result, monkeypatch, in_upload=True)
    calls = list[Path]()
    with tracking.start_run("search", "note", run_id):
        _stage(Job(host, run_id), lambda folder: calls.append(folder) or result)  # type: ignore[func-returns-value]
    assert len(calls) == 1 and _runs()[NAME] == ["FINISHED", "FAILED"]


def test_a_stage_alone_is_a_run_at_the_top_and_leaves_no_folder(host: Host, result: SensitivityResult) -> None:
    assert _stage(Job(host), lambda folder: result) == result
    (run,) = mlflow.MlflowClient().search_runs(["1"])
    assert run.info.status == "FINISHED" and "mlflow.parentRunId" not in run.data.tags
    assert tracking.read_config(run.info.run_id) == Config() and not Path("checkpoints").exists()


def test_a_model_that_cannot_be_registered_takes_no_other_with_it(host: Host) -> None:
    """A run may have logged models of its own before."""

    def log_model(run_id: str) -> str:
        model_id = mlflow.initialize_logged_model("own").model_id
        mlflow.MlflowClient().log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        return str(model_id)

    with tracking.start_run("register-own", "note") as run_id:
        own = log_model(run_id)
        with pytest.raises(StoreError), version_or_nothing():
            partly = log_model(run_id)
            raise OSError("No space left on device")
    assert [model.model_id for model in mlflow.search_logged_models(["1"], output_format="list")] == [own]
    assert partly != own


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("error", [StageError("no engine takes it"), KeyboardInterrupt()])
def test_a_stage_that_fails_leaves_a_folder_only_if_it_can_be_resumed(
    error: BaseException, whole: bool, host: Host
) -> None:
    def fail(folder: Path) -> SensitivityResult:
        (folder / "model.pth").write_bytes(b"half of it")
        if resumable:
            (folder / "checkpoint.pt").touch()
        raise error

    for resumable in (False, True):
        begun = open_job(host, Config(), "main", "note") if whole else nullcontext(Job(host))
        with pytest.raises(type(error)), begun as job:
            _stage(job, fail)
        assert [file.name for file in Path().glob(f"checkpoints/*/{NAME}/*.pt")] == ["checkpoint.pt"] * resumable
        assert Path("checkpoints").exists() == resumable
