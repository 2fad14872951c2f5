"""The one place that knows runs: a stage is called in a run of its own, and its result kept until MLflow has it.

A stage is a plain function that gets a folder for its files and returns a result. The result is written to the folder
in one step and then uploaded. So there are two states after any kill and any lost server: the result is there, or it is
not. Resuming calls the same stages in the same order; one whose result is there, in MLflow or in the folder, is read
instead of computed. `sync.py` uploads what is in the folder of a job. Only training has a finer grain, its checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qexp.config import Config
from qexp.data.datasets import Dataset, Split
from qexp.foundation.text import as_text
from qexp.measurement.host import Host
from qexp.pipeline.loading import local_files
from qexp.pipeline.measure import LocalVersions
from qexp.pipeline.settle import settle
from qexp.progress import say
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import LOCK, RESULT, job_folder, lock_of, remove_folder, remove_if_empty, stage_folder
from qexp.tracking.outage import AdvisedError
from qexp.tracking.results import Kept, Result, keep, kept_in
from qexp.tracking.runs import Run
from qexp.tracking.uploads import upload
from qexp.training.checkpoint import checkpoint_exists

T = TypeVar("T")
AGAIN = "qexp.again"  # tag of the run of a stage alone: the command that repeats it


@dataclass(frozen=True)
class Inputs:
    """Images that a stage works with: splits of the data set by name, and a calibration subset with its digest."""

    dataset: Dataset
    splits: tuple[str, ...] = ("train", "validation", "test")
    calibration: tuple[Split, str] | None = None


@dataclass
class Job:
    """The run of a command, which the runs of its stages are below; without one, each stage is a run at the top.

    `left` are the runs that a stopped process has left below a job that is resumed, by name, the newest first. `again`
    is the command to give once more where a stage alone was stopped before it had a result.
    """

    host: Host
    run_id: str | None = None
    left: dict[str, list[Run]] | None = None
    again: str = ""

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
    ) -> T:
        """What a stage has found: in a run that has finished, in the job's folder, or else by calling `work`.

        Args:
            name: of its run, and of its folder.
            note: Markdown for the page of its run; values of others in it are `opaque`.
            config: what it is told to do.
            work: computes the result; it gets the folder for files that belong to it.
            read: the result that a finished run has logged.
            resume: the run in which `work` was stopped, and resumes, if it has begun.
            holds: whether an earlier result may be used again. None: never; the work is always done.
        """
        if holds:
            found = self._found_before(name, note, read, resume)
            if found is not None and holds(found):
                return found
        say(f"{name}: {as_text(note.replace('`', ''))}")
        return self._done(name, note, config, work, inputs, resume)

    def _done(
        self,
        name: str,
        note: str,
        config: Config,
        work: Callable[[Path], Result],
        inputs: Inputs | None,
        resume: str | None,
    ) -> Any:
        """What `work` finds, in a run of its own."""
        with self._run(name, note, resume) as run_id:
            folder = self._folder(name, run_id)
            tracking.log_setup(config, self.host)
            if self.again:
                tracking.set_tag(AGAIN, self.again)
            _log_inputs(inputs)
            with _new_folder(folder):
                kept = keep(folder, run_id, work(folder))
            sent = self._send(kept, folder)
        self._remove(folder)
        return sent

    def _found_before(self, name: str, note: str, read: Callable[[str], T], resume: str | None) -> T | None:
        """The result of a finished run, or the one that was kept in the folder, which is uploaded now."""
        if self.left is None and resume is None:  # what else is in the folder is of another job
            return None
        if finished := [run for run in (self.left or {}).get(name, []) if run.info.status == "FINISHED"]:
            return read(finished[0].info.run_id)
        job = self.run_id or str(resume)
        if not (kept := kept_in(self._folder(name, job))):
            return None
        with self._run(name, note, kept.run_id):
            found: T = self._send(kept, self._folder(name, job))
        self._remove(self._folder(name, job))
        return found

    def _send(self, kept: Kept, folder: Path) -> Any:
        """Upload a result, and move the alias that a stage alone asks for."""
        found = upload(kept.result, folder, kept.at_ms)
        return found if self.run_id else settle(found)

    def _folder(self, name: str, run_id: str) -> Path:
        return stage_folder(job_folder(self.run_id or run_id), name)

    def _remove(self, folder: Path) -> None:
        remove_folder(folder if self.run_id else folder.parent)

    def files(self, fp32_uri: str, *int8_uris: str) -> AbstractContextManager[LocalVersions]:
        """Copies of the files of the job's versions, to be timed."""
        return local_files(fp32_uri, *int8_uris)

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


def _log_inputs(inputs: Inputs | None) -> None:
    if inputs:
        tracking.log_datasets(inputs.dataset, inputs.splits)
        if inputs.calibration:
            subset, digest = inputs.calibration
            tracking.log_dataset(subset, inputs.dataset, "calibration", digest)
