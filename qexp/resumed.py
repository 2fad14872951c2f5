"""Going on with a run that was stopped or killed: which run, with which configuration, and whether it can."""

from qexp import tracking
from qexp.checkpoint import check_unlocked, checkpoint_exists, checkpoint_folder
from qexp.config import HOW_TO_TRAIN, Config, given_otherwise
from qexp.distributed import read_group
from qexp.errors import InputError
from qexp.tracking import RunFacts

# What may differ when a run goes on: where and how fast, not what comes out.
FREE = ("data_dir", "output_dir", "threads", *HOW_TO_TRAIN)


def config_of_run(config: Config, run_id: str, command: str) -> Config:
    """The configuration that the run of `qexp <command>` was started with; options of FREE are those of `config`.

    Raises:
        InputError: there is no such run, it is of another command or has finished, an option asks for something else,
            or the checkpoint of a training is not here.
    """
    run = tracking.find_run(run_id)
    stage = {"run": "main"}.get(command, command)
    if run.stage != stage:
        right = {"main": "run", "train": "train"}.get(run.stage)
        hint = f"use `qexp {right} --resume {run_id}`" if right else "only runs of `qexp train` and `qexp run` go on"
        raise InputError(f"--resume {run_id}: not a run of `qexp {command}`; {hint}")
    if run.status == "FINISHED":
        raise InputError(f"--resume {run_id}: this run has finished; there is nothing to go on with")
    if leads := read_group().leads:
        check_unlocked(checkpoint_folder(run_id), run_id)
    recorded = tracking.read_config(run_id)
    for name, value, before in given_otherwise(config, recorded):
        key = name.split(".")[1]
        if key not in FREE:
            option = key.replace("_", "-")
            raise InputError(f"--{option} {value}: run {run_id} was started with {before}; leave the option out")
    if stage == "train" and leads:
        check_checkpoint(run)
    return _with_free_options(recorded, config)


def has_trained(main_run_id: str) -> bool:
    """Whether the training of a run of `qexp run` has finished."""
    return any(run.stage == "train" and run.status == "FINISHED" for run in tracking.children_of(main_run_id))


def training_below(main_run_id: str) -> RunFacts | None:
    """The training that a run of `qexp run` has begun, if it has; whatever was left open below it is closed.

    Raises:
        InputError: its checkpoint is not here.
    """
    children = tracking.children_of(main_run_id)
    tracking.end_open_runs([run for run in children if run.stage != "train"], "KILLED")
    training = next((run for run in children if run.stage == "train"), None)
    if training and training.status != "FINISHED":
        check_unlocked(checkpoint_folder(training.run_id), training.run_id)
        check_checkpoint(training)
    return training


def check_checkpoint(run: RunFacts) -> None:
    """Raise InputError if the run has finished epochs whose checkpoint is not here; before the first, it can start."""
    folder = checkpoint_folder(run.run_id)
    if run.epochs and not checkpoint_exists(folder):
        raise InputError(
            f"--resume {run.run_id}: no checkpoint in {folder}; "
            "give the command in the folder where the run was started"
        )


def _with_free_options(recorded: Config, given: Config) -> Config:
    default = Config()
    top = {name: getattr(given, name) for name in ("output_dir", "threads") if getattr(given, name) is not None}
    train = {
        name: getattr(given.train, name)
        for name in HOW_TO_TRAIN
        if getattr(given.train, name) != getattr(default.train, name)
    }
    data = {"data_dir": given.data.data_dir or recorded.data.data_dir}
    sections = {"train": recorded.train.model_copy(update=train), "data": recorded.data.model_copy(update=data)}
    return recorded.model_copy(update=top | sections)
