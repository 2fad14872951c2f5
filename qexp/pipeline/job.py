"""The one place that knows runs: a stage is called in a run of its own, and its result kept until MLflow has it.

A stage is a plain function that gets a folder for its files and returns a result. The result is written to the folder
in one step and then uploaded. So there are two states after any kill and any lost server: the result is there, or it is
not. Resuming calls the same stages in the same order; one whose result is there, in MLflow or in the folder, is read
instead of computed. `sync_run` uploads what is in the folder of a job. Only training has a finer grain, its checkpoint.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qexp.config import Config
from qexp.data.datasets import Dataset, Split
from qexp.errors import InputError
from qexp.measurement.host import Host
from qexp.progress import say
from qexp.tracking import metrics
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import (
    LOCK,
    RESULT,
    check_unlocked,
    job_folder,
    lock_of,
    locked,
    noted_end,
    remove_folder,
    remove_if_empty,
    stage_folder,
)
from qexp.tracking.outage import AdvisedError, store_errors
from qexp.tracking.results import Fp32, Kept, Result, keep, kept_in
from qexp.tracking.runs import Run
from qexp.tracking.store import store_name, use_store
from qexp.tracking.uploads import log_curves, upload
from qexp.training.checkpoint import checkpoint_exists, load_checkpoint
from qexp.training.train import EpochResult

T = TypeVar("T")
RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Inputs:
    """Images that a stage works with: splits of the data set by name, and a calibration subset with its digest."""

    dataset: Dataset
    splits: tuple[str, ...] = ("train", "validation", "test")
    calibration: tuple[Split, str] | None = None


@dataclass
class Job:
    """The run of a command, which the runs of its stages are below; without one, each stage is a run at the top.

    `left` are the runs that a stopped process has left below a job that is resumed, by name, the newest first.
    """

    host: Host
    run_id: str | None = None
    left: dict[str, list[Run]] | None = None

    def stage(
        self,
        name: str,
        note: str,
        config: Config,
        work: Callable[[Path], Result],
        read: Callable[[str], T],
        inputs: Inputs | None = None,
        resume: str | None = None,
        holds: Callable[[T], bool] | None = lambda found: True,
        then: Callable[[T], None] = lambda found: None,
    ) -> T:
        """What a stage has found: in a run that has finished, in the job's folder, or else by calling `work`.

        Args:
            name: of its run, and of its folder.
            note: Markdown for the page of its run.
            config: what it is told to do.
            work: computes the result; it gets the folder for files that belong to it.
            read: the result that a finished run has logged.
            resume: the run in which `work` was stopped, and resumes, if it has begun.
            holds: whether an earlier result may be used again. None: never; the work is always done.
            then: what follows in the same run, once the result is uploaded.
        """
        if holds:
            found = self._found_before(name, note, read, resume, then)
            if found is not None and holds(found):
                return found
        say(f"{name}: {note.replace('`', '')}")
        with self._run(name, note, resume) as run_id:
            folder = self._folder(name, run_id)
            tracking.log_setup(config, self.host)
            _log_inputs(inputs)
            with _new_folder(folder):
                kept = keep(folder, run_id, work(folder))
            found = self._send(kept, folder, then)
        self._remove(folder)
        return found

    def _found_before(
        self, name: str, note: str, read: Callable[[str], T], resume: str | None, then: Callable[[T], None]
    ) -> T | None:
        """The result of a finished run, or the one that was kept in the folder, which is uploaded now."""
        if self.left is None and resume is None:  # what else is in the folder is of another job
            return None
        if finished := [run for run in (self.left or {}).get(name, []) if run.info.status == "FINISHED"]:
            return read(finished[0].info.run_id)
        job = self.run_id or str(resume)
        if not (kept := kept_in(self._folder(name, job))):
            return None
        with self._run(name, note, kept.run_id):
            found: T = self._send(kept, self._folder(name, job), then)
        self._remove(self._folder(name, job))
        return found

    def _send(self, kept: Kept, folder: Path, then: Callable[[T], None]) -> T:
        found: T = upload(kept.result, folder, kept.at_ms)
        then(found)
        return found

    def _folder(self, name: str, run_id: str) -> Path:
        return stage_folder(job_folder(self.run_id or run_id), name)

    def _remove(self, folder: Path) -> None:
        remove_folder(folder if self.run_id else folder.parent)

    def unfinished(self, name: str) -> str | None:
        """The run of a stage that was stopped in the middle."""
        runs = [run for run in (self.left or {}).get(name, []) if run.info.status != "FINISHED"]
        return runs[0].info.run_id if runs else None

    @contextmanager
    def _run(self, name: str, note: str, resume: str | None) -> Iterator[str]:
        if self.run_id:
            with tracking.start_run(name, note, resume) as run_id:
                yield run_id
        else:
            with run_at_the_top(name, note, resume) as run_id:
                yield run_id


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """The folder of a stage that works inside the block. If the stage fails, what it has left there goes, unless it can
    be resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not (folder / RESULT).is_file() and not checkpoint_exists(folder):
            remove_folder(folder)
        raise


@contextmanager
def run_at_the_top(
    name: str, note: str, resume: str | None = None, lock: str = LOCK, stage: str | None = None
) -> Iterator[str]:
    """A run that belongs to no other, and its folder, which no other process may use meanwhile.

    Of one that is resumed, nothing is touched before it is known that nobody else is at work on it. If the run fails
    before anything was kept in its folder, there is no folder afterwards.
    """
    begun = resume
    try:
        with lock_of(resume, lock), tracking.start_run(name, note, resume, stage) as run_id:
            begun = run_id
            with lock_of(None if resume else run_id, lock):
                yield run_id
    except BaseException as error:
        if begun and not isinstance(error, AdvisedError):  # whose message names the folder
            remove_if_empty(begun)
        raise


@contextmanager
def open_job(host: Host, config: Config, name: str, note: str, resume: str | None = None) -> Iterator[Job]:
    """The run of a command that has several stages, begun or resumed; its folder goes when the command has ended."""
    with run_at_the_top(name, note, resume, stage="main") as run_id:
        tracking.log_setup(config, host)
        job = Job(host, run_id)
        if resume:
            tracking.end_open_runs(tracking.children_of(run_id), "KILLED")
            job.left = runs_below(run_id)
        yield job
    remove_folder(job_folder(run_id))


def runs_below(run_id: str) -> dict[str, list[Run]]:
    """The runs of a job's stages by name, the newest first."""
    found: dict[str, list[Run]] = {}
    for run in tracking.children_of(run_id):
        found.setdefault(run.info.run_name, []).append(run)
    return found


def has_stage(job_run_id: str, name: str) -> bool:
    """Whether the result of a stage of a stopped job is there."""
    if (stage_folder(job_folder(job_run_id), name) / RESULT).is_file():
        return True
    return any(run.info.status == "FINISHED" for run in runs_below(job_run_id).get(name, []))


def check_checkpoint(training: Run, folder: Path) -> None:
    """Raise InputError if the training has finished epochs whose checkpoint is not here, or is damaged."""
    run_id = training.info.run_id
    if (folder / RESULT).is_file():
        return
    if checkpoint_exists(folder):
        load_checkpoint(folder)
    elif tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH):
        raise InputError(
            f"--resume {run_id}: no checkpoint in {folder.parent}; "
            "give the command in the folder where the run was started"
        )


def _log_inputs(inputs: Inputs | None) -> None:
    if inputs:
        tracking.log_datasets(inputs.dataset, inputs.splits)
        if inputs.calibration:
            subset, digest = inputs.calibration
            tracking.log_dataset(subset, inputs.dataset, "calibration", digest)


def sync_run(folder: Path) -> dict[str, Any]:
    """Upload what is in the folder of a job, checkpoints/RUN_ID, to the store that it was started with.

    Results of stages get their runs: metrics, artifacts, registered versions. A training that is not over gets its
    curves. What is left then is done by `--resume`. Whatever fails here can be repeated.

    Raises:
        InputError: not the folder of a run of this store, or a process is still at work on it.
        StageError: the store fails, or the disk of its artifacts; the folder stays as it is.
    """
    run_id = folder.resolve().name
    if not RUN_ID.fullmatch(run_id):
        raise InputError(f"RUN_DIR {folder}: must be the folder of a run, such as checkpoints/{'0123456789abcdef' * 2}")
    use_store()
    with store_errors():
        run = tracking.find_run(run_id, "RUN_DIR")
        if not folder.is_dir() and run.info.status != "FINISHED":
            raise InputError(f"RUN_DIR {folder}: no such folder; give the command where the run was started")
        check_unlocked(run_id)
        runs = [run, *tracking.children_of(run_id)]
        with locked(folder, run_id) if folder.is_dir() else nullcontext():
            trained = [fp32.version.uri for fp32 in _upload_results(folder, runs) if isinstance(fp32, Fp32)]
            otherwise = (noted_end(folder, run_id) or ("KILLED",))[0]
            for one in runs:
                ended = noted_end(folder, one.info.run_id) or (otherwise,)
                tracking.end_open_runs([tracking.find_run(one.info.run_id)], *ended)
        status = tracking.find_run(run_id).info.status
    more: dict[str, Any] = {"fp32": trained[0]} if trained else {}
    if status == "FINISHED":
        remove_folder(folder)
        say(f"run {run_id} is complete in {store_name()}")
    else:
        more["next"] = _next(run, trained)
        say(f"what is left: {more['next']}")
    return {"command": "sync", "run_id": run_id, "status": status, **more}


def _upload_results(folder: Path, runs: list[Run]) -> Iterator[Any]:
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        kept = kept_in(place)
        if kept is None:
            if checkpoint_exists(place):
                training = next((run for run in runs if tracking.stage_of(run) == "train"), None)
                if training:  # nobody has deleted it
                    _upload_curves(place, training)
            continue
        run = tracking.find_run(kept.run_id)
        if run.info.status != "FINISHED":
            with tracking.start_run(place.name, run.data.tags.get("mlflow.note.content", ""), kept.run_id):
                yield upload(kept.result, place, kept.at_ms)
        remove_folder(place)


def _upload_curves(folder: Path, training: Run) -> None:
    run_id = training.info.run_id
    epochs = load_checkpoint(folder)["position"]["epochs"]
    logged = tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH)
    log_curves([EpochResult(**values) for values in epochs], logged, run_id)


def _next(job: Run, trained: list[str]) -> str:
    """The command that does what is left; `trained` are the versions that have been uploaded."""
    stage = tracking.stage_of(job)
    if stage in ("main", "train"):
        return f"qexp {'run' if stage == 'main' else 'train'} --resume {job.info.run_id}"
    return f"qexp {stage} --model-uri {trained[0]}" if trained else f"the same `qexp {stage}` command again"
