"""`qexp sync`: what a run could not log is uploaded from the folder of its job, checkpoints/RUN_ID.

Stages have left their results there (job.py), and a training its checkpoint; both go to the store that the run was
started with.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qexp.errors import InputError
from qexp.pipeline.job import AGAIN
from qexp.pipeline.settle import settle
from qexp.progress import say
from qexp.report.promotion import Promotion
from qexp.report.results import Int8Evidence
from qexp.tracking import metrics
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import check_unlocked, locked, noted_end, remove_folder
from qexp.tracking.outage import store_errors
from qexp.tracking.results import Fp32, kept_in
from qexp.tracking.runs import Run
from qexp.tracking.store import store_name, use_store
from qexp.tracking.training_log import log_curves
from qexp.tracking.uploads import upload
from qexp.training.checkpoint import checkpoint_exists, load_checkpoint
from qexp.training.train import EpochResult

RUN_ID = re.compile(r"[0-9a-f]{32}")


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
            found = list(_upload_results(folder, runs))
            otherwise = (noted_end(folder, run_id) or ("KILLED",))[0]
            for one in runs:
                ended = noted_end(folder, one.info.run_id) or (otherwise,)
                tracking.end_open_runs([tracking.find_run(one.info.run_id)], *ended)
        status = tracking.find_run(run_id).info.status
    more: dict[str, Any] = {}
    for one in found:
        more |= _facts_of(one)
    if status == "FINISHED":
        remove_folder(folder)
        say(f"run {run_id} is complete in {store_name()}")
    if left := _next(run, status):
        more["next"] = left
        say(f"what is left: {left}")
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
        run = next((run for run in runs if run.info.run_id == kept.run_id), None) or tracking.find_run(kept.run_id)
        if run.info.status != "FINISHED":
            with tracking.start_run(place.name, run.data.tags.get("mlflow.note.content", ""), kept.run_id):
                found = upload(kept.result, place, kept.at_ms)
                yield settle(found) if run is runs[0] else found
        remove_folder(place)


def _upload_curves(folder: Path, training: Run) -> None:
    run_id = training.info.run_id
    epochs = load_checkpoint(folder)["position"]["epochs"]
    logged = tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH)
    log_curves([EpochResult(**values) for values in epochs], logged, run_id)


def _facts_of(found: Any) -> dict[str, Any]:
    """What the command's last line shows of a result that has been uploaded."""
    if isinstance(found, Fp32):
        return {"fp32": found.version.uri}
    if isinstance(found, Int8Evidence):
        return {"int8": found.version_uri}
    if isinstance(found, Promotion):
        return {"int8": found.uri, "decision": found.word, "reasons": list(found.reasons)}
    return {}


def _next(job: Run, status: str) -> str:
    """The command that does what is left to do; the empty text if nothing is."""
    stage, again = tracking.stage_of(job), job.data.tags.get(AGAIN, "")
    if stage == "sensitivity" and again:  # of `qexp quantize`, whose next run has not begun
        return again
    if status == "FINISHED":
        return ""
    if stage in ("main", "train"):
        return f"qexp {'run' if stage == 'main' else 'train'} --resume {job.info.run_id}"
    return again or f"the same `qexp {stage}` command again"
