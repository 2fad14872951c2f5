"""Send to MLflow what a run could not: `qexp sync`, for a training whose store was away, and the job above it.

A training that is over gets all that its run lacks: curves, weights, registered version, results and its end. One that
is not gets its curves. What comes after training is done by `--resume`. Whatever fails here can be repeated.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from qexp.errors import InputError
from qexp.pipeline.stages import log_curves, publish_trained
from qexp.pipeline.trained import load_trained
from qexp.progress import say
from qexp.report.results import Fp32Evidence
from qexp.tracking import leftovers, metrics
from qexp.tracking import runs as tracking
from qexp.tracking.outage import noted_end, store_errors
from qexp.tracking.runs import Run
from qexp.tracking.store import store_name, use_store
from qexp.training.checkpoint import TRAINED, check_unlocked, checkpoint_exists, load_checkpoint, locked
from qexp.training.train import EpochResult

RUN_ID = re.compile(r"[0-9a-f]{32}")


def sync_run(folder: Path) -> dict[str, Any]:
    """Upload what is in the folder of a run, checkpoints/RUN_ID, to the store that it was started with.

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
        job = tracking.find_run(run.data.tags.get("mlflow.parentRunId", run_id), "RUN_DIR")
        return _sync_job(job, [job, *tracking.children_of(job.info.run_id)], folder.resolve().parent)


def _sync_job(job: Run, runs: list[Run], folders: Path) -> dict[str, Any]:
    for run in runs:
        check_unlocked(folders / run.info.run_id, run.info.run_id)
    trainings = [run for run in runs if tracking.stage_of(run) == "train" and run.info.status != "FINISHED"]
    uris = [uri for run in trainings if (uri := _sync_training(run, folders / run.info.run_id))]
    otherwise = (noted_end(folders / job.info.run_id) or ("KILLED",))[0]
    for run in runs:
        ended = noted_end(folders / run.info.run_id) or (otherwise,)
        tracking.end_open_runs([tracking.find_run(run.info.run_id)], *ended)
    status = tracking.find_run(job.info.run_id).info.status
    more: dict[str, Any] = {"fp32": uris[0]} if uris else {}
    if status == "FINISHED":
        say(f"run {job.info.run_id} is complete in {store_name()}")
    else:
        more["next"] = _next(job, uris)
        say(f"what is left: {more['next']}")
    return {"command": "sync", "run_id": job.info.run_id, "status": status, **more}


def _next(job: Run, uris: list[str]) -> str:
    """The command that goes on."""
    stage = tracking.stage_of(job)
    if stage in ("main", "train"):
        return f"qexp {'run' if stage == 'main' else 'train'} --resume {job.info.run_id}"
    return f"qexp {stage} --model-uri {uris[0]}" if uris else f"qexp {stage} again"


def _sync_training(run: Run, folder: Path) -> str | None:
    """The URI of its version, if the training is over; its folder is then removed."""
    run_id = run.info.run_id
    if not (folder / TRAINED).exists():
        if checkpoint_exists(folder):
            epochs = load_checkpoint(folder)["position"]["epochs"]
            log_curves(run_id, [EpochResult(**values) for values in epochs], _logged(run_id))
        return None
    model, trained = load_trained(folder)
    note = run.data.tags.get("mlflow.note.content", "")
    with locked(folder, run_id), tracking.start_run(f"train-{trained.evidence.model}", note, run_id):
        if metrics.LAST_OF_TRAINING in run.data.metrics:
            evidence = tracking.read_result(Fp32Evidence, run_id, "fp32")
        else:
            leftovers.discard_versions(run_id)
            _, evidence = publish_trained(model, trained, run_id, _logged(run_id))
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other runs may have theirs there
        folder.parent.rmdir()
    return evidence.version_uri


def _logged(run_id: str) -> set[int]:
    return tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH)
