"""Environment variables: set for the length of a block; and what `mlflow run` sets."""

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


def under_mlflow_run() -> bool:
    """Whether `mlflow run` has started this process: in the project's folder, wherever the user was."""
    return "MLFLOW_RUN_ID" in os.environ


def looked_in(path: str | os.PathLike[str]) -> str:
    """What a message says of a path that is not there: where a relative one was looked for."""
    if os.path.isabs(path):
        return ""
    whole = f'; mlflow run works in the project\'s folder, so give the whole path: "$PWD/{os.fspath(path)}"'
    return f" in {os.getcwd()}{whole if under_mlflow_run() else ''}"
