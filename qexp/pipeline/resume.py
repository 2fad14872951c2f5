"""What a stopped run was started with, and whether it can be resumed: its options, its data, its checkpoint.

`jobs.py` asks before it resumes a run; nothing is changed here.
"""

import os
from pathlib import Path
from typing import Any

from qexp.config import HOW_TO_TRAIN, Config, parse_options
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.models.names import short_name
from qexp.pipeline.job import runs_below
from qexp.tracking import metrics, registry
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import RESULT, check_unlocked, job_folder, stage_folder
from qexp.tracking.runs import Run
from qexp.tracking.store import uri_of
from qexp.training.checkpoint import checkpoint_exists, load_checkpoint
from qexp.training.distributed import read_group

# What may differ when a run is resumed: where and how fast, not what comes out.
FREE = ("data_dir", "output_dir", "threads", *HOW_TO_TRAIN)
Overrides = dict[str, dict[str, Any]]  # text of the options given, by section and key


def config_of_run(overrides: Overrides, run_id: str, command: str) -> Config:
    """The configuration that the run of `qexp <command>` was started with, but for the options of FREE in `overrides`.

    Args:
        overrides: text of the options given, by section and key.

    Raises:
        InputError: there is no such run, it is of another command or has finished, an option asks for something else,
            or the checkpoint of a training is not here.
    """
    run = tracking.find_run(run_id)
    begun_as = tracking.stage_of(run)
    stage = {"run": "main"}.get(command, command)
    if begun_as != stage:
        right = {"main": "run", "train": "train"}.get(begun_as)
        only = "only runs of `qexp train` and `qexp run` can be resumed"
        hint = f"use `qexp {right} --resume {run_id}`" if right else only
        raise InputError(f"--resume {run_id}: not a run of `qexp {command}`; {hint}")
    if run.info.status == "FINISHED":
        raise InputError(f"--resume {run_id}: this run has finished; there is nothing left to do")
    if leads := read_group().leads:
        check_unlocked(run_id)
    try:
        recorded = tracking.read_config(run_id)
    except InputError as error:
        why = f"its configuration cannot be read: {error}"
        raise InputError(f"--resume {run_id}: {why}; if it stopped before it was recorded, start a new run") from None
    given = parse_options(overrides)
    if "threads" in given.get("", {}) and "WORLD_SIZE" not in os.environ:  # as at the start: those of training, too
        given.setdefault("train", {}).setdefault("train_threads", given[""]["threads"])
    config = _with_free_options(recorded, given, run_id)
    if leads:
        _check_training(run, config)
    return config


def _check_training(job: Run, config: Config) -> None:
    """Of a training that was stopped in the middle, the checkpoint must be here."""
    runs = [job, *tracking.children_of(job.info.run_id)]
    training = next((run for run in runs if tracking.stage_of(run) == "train"), None)
    if training and training.info.status != "FINISHED":
        check_checkpoint(training, stage_folder(job_folder(job.info.run_id), f"train-{short_name(config.model)}"))


def _with_free_options(recorded: Config, given: dict[str, dict[str, Any]], run_id: str) -> Config:
    for section, options in given.items():
        before = getattr(recorded, section) if section else recorded
        for name, value in options.items():
            if name not in FREE and value != getattr(before, name):
                option, was = name.replace("_", "-"), getattr(before, name)
                raise InputError(f"--{option} {value}: run {run_id} was started with {was}; leave the option out")
    parts = {name: getattr(recorded, name).model_copy(update=options) for name, options in given.items() if name}
    return recorded.model_copy(update=given.get("", {}) | parts)


def model_of_run(run_id: str, given: str | None) -> str | None:
    """The registered version that a run has begun with, None if it trains; InputError if another one is given."""
    begun = tracking.find_run(run_id).data.tags.get("qexp.model_uri")
    if begun:
        try:
            begun = uri_of(registry.find_version(begun, "fp32", option="version"))
        except InputError as error:
            raise InputError(
                f"--resume {run_id}: its tag qexp.model_uri names no version to resume with: {error}"
            ) from None
    if given and (begun is None or uri_of(registry.find_version(given, "fp32")) != begun):
        was = f"with {begun}" if begun else "without one, with a training"
        raise InputError(f"--model-uri {given}: run {run_id} was started {was}; leave the option out")
    return begun


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


def check_data_of_run(run_id: str, dataset: Dataset) -> None:
    """Raise InputError unless these are the images that the run has begun with."""
    inputs = tracking.find_run(run_id).inputs
    logged = inputs.dataset_inputs if inputs else []
    digests = {tag.value: found.dataset.digest for found in logged for tag in found.tags}  # by what they are used for
    for split in ("train", "validation", "test"):
        if split in digests and not getattr(dataset, split).has_digest(digests[split]):
            raise InputError(f"--data-dir: {dataset.source} holds other images than run {run_id} was started with")
