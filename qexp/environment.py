"""Environment variables: set for the length of a block; OMP_WAIT_POLICY, by which OpenMP's threads wait; and what
`mlflow run` sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of this process and of those that it starts; after the block they are as they were before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


WAIT_POLICY = "OMP_WAIT_POLICY"  # of OpenMP, which reads it when torch is imported
SET_BY_QEXP = "QEXP_SET_OMP_WAIT_POLICY"  # in the environment where the user had set none


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user has chosen; call it before importing
    torch.

    By default they spin. Beside another busy process, a thread that spins keeps the core from the very thread it waits
    for: resnet18 was trained at 35 images/s on two threads so, and at 276 without spinning.
    """
    if WAIT_POLICY not in os.environ:
        os.environ.update({WAIT_POLICY: "passive", SET_BY_QEXP: "1"})


def wait_as_the_user_does() -> None:
    """Undo `wait_without_spinning`, for a command that times models in its own process; call it before importing
    torch."""
    if os.environ.pop(SET_BY_QEXP, None):
        os.environ.pop(WAIT_POLICY, None)


def as_the_user_set(variables: dict[str, str]) -> dict[str, str]:
    """`variables` without what `wait_without_spinning` has set: for a process that is timed as a user would run it."""
    ours = {WAIT_POLICY, SET_BY_QEXP} if SET_BY_QEXP in variables else set()
    return {name: value for name, value in variables.items() if name not in ours}


def waiting() -> str:
    """How OpenMP's threads wait in this process: passive, active, or default (they spin for a while)."""
    return os.environ.get(WAIT_POLICY, "default").lower()


def under_mlflow_run() -> bool:
    """Whether `mlflow run` has started this process: in the project's folder, wherever the user was."""
    return "MLFLOW_RUN_ID" in os.environ


def looked_in(path: str | os.PathLike[str]) -> str:
    """What a message says of a path that is not there: where a relative one was looked for."""
    if os.path.isabs(path):
        return ""
    whole = f'; mlflow run works in the project\'s folder, so give the whole path: "$PWD/{os.fspath(path)}"'
    return f" in {os.getcwd()}{whole if under_mlflow_run() else ''}"
