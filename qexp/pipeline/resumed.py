"""Going on with a run that was stopped or killed: which run, with which configuration, and whether it can."""

import os
from typing import Any

from qexp.config import HOW_TO_TRAIN, Config, parse_options
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.quantization.sensitivity import SensitivityResult
from qexp.tracking import leftovers, metrics
from qexp.tracking import runs as tracking
from qexp.tracking.runs import Run
from qexp.training.checkpoint import check_unlocked, checkpoint_exists, checkpoint_folder, load_checkpoint
from qexp.training.distributed import read_group

# What may differ when a run goes on: where and how fast, not what comes out.
FREE = ("data_dir", "output_dir", "threads", *HOW_TO_TRAIN)


def config_of_run(overrides: dict[str, dict[str, Any]], run_id: str, command: str) -> Config:
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
        hint = f"use `qexp {right} --resume {run_id}`" if right else "only runs of `qexp train` and `qexp run` go on"
        raise InputError(f"--resume {run_id}: not a run of `qexp {command}`; {hint}")
    if run.info.status == "FINISHED":
        raise InputError(f"--resume {run_id}: this run has finished; there is nothing to go on with")
    if leads := read_group().leads:
        check_unlocked(checkpoint_folder(run_id), run_id)
    try:
        recorded = tracking.read_config(run_id)
    except InputError as error:
        why = f"its configuration cannot be read: {error}"
        raise InputError(f"--resume {run_id}: {why}; if it stopped before it was recorded, start a new run") from None
    given = parse_options(overrides)
    if "threads" in given.get("", {}) and "WORLD_SIZE" not in os.environ:  # as at the start: those of training, too
        given.setdefault("train", {}).setdefault("train_threads", given[""]["threads"])
    config = _with_free_options(recorded, given, run_id)
    if stage == "train" and leads:
        check_checkpoint(run)
    return config


def _with_free_options(recorded: Config, given: dict[str, dict[str, Any]], run_id: str) -> Config:
    for section, options in given.items():
        before = getattr(recorded, section) if section else recorded
        for name, value in options.items():
            if name not in FREE and value != getattr(before, name):
                option, was = name.replace("_", "-"), getattr(before, name)
                raise InputError(f"--{option} {value}: run {run_id} was started with {was}; leave the option out")
    parts = {name: getattr(recorded, name).model_copy(update=options) for name, options in given.items() if name}
    return recorded.model_copy(update=given.get("", {}) | parts)


def check_data(run_id: str, dataset: Dataset) -> None:
    """Raise InputError unless these are the images that the run has begun with."""
    inputs = tracking.find_run(run_id).inputs
    logged = inputs.dataset_inputs if inputs else []
    digests = {tag.value: found.dataset.digest for found in logged for tag in found.tags}  # by what they are used for
    for split in ("train", "validation", "test"):
        own = getattr(dataset, split).digest
        if digests.get(split, own) != own:
            raise InputError(f"--data-dir: {dataset.source} holds other images than run {run_id} was started with")


def has_trained(main_run_id: str) -> bool:
    """Whether the training of a run of `qexp run` has finished."""
    return bool(_finished(main_run_id, "train"))


def quantized_below(main_run_id: str) -> list[str]:
    """The runs in which a run of `qexp run` has quantized its model, those that have finished."""
    return _finished(main_run_id, "quantize")


def sensitivity_below(main_run_id: str) -> SensitivityResult | None:
    """What a run of `qexp run` has found out about each layer, if it has come so far."""
    done = _finished(main_run_id, "sensitivity")
    return tracking.read_result(SensitivityResult, done[0], "sensitivity") if done else None


def _finished(main_run_id: str, stage: str) -> list[str]:
    ended = (run for run in tracking.children_of(main_run_id) if run.info.status == "FINISHED")
    return [run.info.run_id for run in ended if tracking.stage_of(run) == stage]


def training_below(main_run_id: str) -> Run | None:
    """The training that a run of `qexp run` has begun, if it has; whatever else was left open below it is closed.

    Raises:
        InputError: its checkpoint is not here.
    """
    children = tracking.children_of(main_run_id)
    unfinished = [run for run in children if tracking.stage_of(run) != "train" and run.info.status != "FINISHED"]
    for run in unfinished:
        leftovers.discard_versions(run.info.run_id)
    tracking.end_open_runs(unfinished, "KILLED")
    training = next((run for run in children if tracking.stage_of(run) == "train"), None)
    if training and training.info.status != "FINISHED":
        check_unlocked(checkpoint_folder(training.info.run_id), training.info.run_id)
        check_checkpoint(training)
    return training


def check_checkpoint(run: Run) -> None:
    """Raise InputError if the run has finished epochs whose checkpoint is not here, or is damaged."""
    run_id = run.info.run_id
    folder = checkpoint_folder(run_id)
    if checkpoint_exists(folder):
        load_checkpoint(folder)
    if tracking.logged_steps(run_id, metrics.FIRST_OF_EPOCH) and not checkpoint_exists(folder):
        raise InputError(
            f"--resume {run_id}: no checkpoint in {folder}; give the command in the folder where the run was started"
        )
