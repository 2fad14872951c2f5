"""Start a command's training processes with torchrun's elastic launcher, and say in one line how one of them died.

The processes run the command that they are given. torchrun's environment tells them that they are several
(distributed.py), so that torchrun itself, on each of several machines, does the same without this module.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qexp.config import HOW_TO_TRAIN, Config, to_yaml
from qexp.errors import InputError, StageError, first_line
from qexp.foundation.environment import environment
from qexp.foundation.processes import OWN_CODE, python_command, python_environment

BAD_INPUT = 2  # the exit code of InputError
SHUTDOWN_TIMEOUT_S = 120  # for the checkpoint that a signal asks for


def is_worker() -> bool:
    """Whether torchrun has started this process."""
    return "WORLD_SIZE" in os.environ


def run_workers(
    command: Sequence[str], config: Config, variables: dict[str, str], resume: Sequence[str] | None = None
) -> None:
    """Run Python with the arguments `command` in `config.train.processes` processes, each with `--config FILE`.

    Args:
        command: for instance -m and the name of the module that is running.
        variables: of the processes' environment.
        resume: arguments by which they resume a run; the options that may change then are added.

    Raises:
        StageError: a process has died; the message says which, and why. The others have been ended.
        InputError: a process has refused its input.
        KeyboardInterrupt, SystemExit: a signal came; the processes have got it too.
    """
    for name in logging.root.manager.loggerDict:  # what they have to say is in the exceptions
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Torch 2.10 has no such setting, and waits 30 s.
    timeout: Any = {"shutdown_timeout": SHUTDOWN_TIMEOUT_S} if hasattr(LaunchConfig, "shutdown_timeout") else {}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.train.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # `--resume` does that, at the user's word
        **timeout,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        # The number of threads that `auto` stands for is no number that was given: training times its own.
        # What `quick` stands for is settled: it must not change what was given beside it, and takes one engine.
        as_given = config.model_copy(
            update={"quick": False} | ({} if config.train.train_threads else {"threads": None})
        )
        if config.quick and not config.quantize.engine:
            as_given = as_given.with_engines(config.quantize.one_engine)
        file.write_text(to_yaml(as_given))
        arguments = [*command, "--config", str(file)]
        if resume:  # the run's own configuration counts, but for these
            arguments += [*resume, *_free_options(config)]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # As this process does: with -P, it imports nothing from there.
        own_code = {} if sys.flags.safe_path else {OWN_CODE: os.getcwd()}
        try:
            with environment(**python_environment(dict(os.environ)) | variables | own_code):
                python, *words = python_command(*arguments)
                elastic_launch(settings, python)(*words)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            kind = InputError if failure.exitcode == BAD_INPUT else StageError
            raise kind(_describe(error, config.train.processes)) from None
        except SignalException as error:
            if error.sigval.name == "SIGINT":
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)
        finally:
            for number, handler in handlers.items():  # the launcher leaves its own there
                signal.signal(number, handler)


def _free_options(config: Config) -> list[str]:
    values = {"threads": config.threads, "data_dir": config.data.data_dir}
    values |= {name: getattr(config.train, name) for name in HOW_TO_TRAIN}
    given = {name: value for name, value in values.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def _describe(error: ChildFailedError, processes: int) -> str:
    rank, failure = error.get_first_failure()
    name = f"training process of rank {rank} (pid {failure.pid}; {processes} in all)"
    if failure.exitcode < 0:
        return f"{name} was ended by {failure.signal_name()}; the others were stopped"
    return f"{name} ended with exit code {failure.exitcode}: {first_line(Exception(failure.message))}"
