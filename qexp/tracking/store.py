"""MLflow's store, which other processes use at the same time: its first use, and writes that two make at once.

Without torch, for commands that only look something up.
"""

import fcntl
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output ends with our JSON line

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.errors import InputError, first_line
from qexp.foundation.environment import environment, under_mlflow_run
from qexp.foundation.text import hide_secrets
from qexp.tracking.address import IN_A_PROJECT, Address, addresses, check, connect, folders, use_plain_paths

T = TypeVar("T")
TRIES = 6
MISSING = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # MLflow's words for what is not there
LOST_A_RACE = ("BAD_REQUEST", "TEMPORARILY_UNAVAILABLE")  # MLflow's words for a row that is there, a locked database

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)
# It writes an error's whole traceback, which is then raised with the same words.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def quickly() -> AbstractContextManager[None]:
    """Ask a store that may be away without waiting for it: twice, ten seconds at most each time."""
    return environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10")


def is_missing(error: MlflowException) -> bool:
    """Whether the store has answered that what it was asked for is not there."""
    return error.error_code in MISSING


def all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Everything that one of MLflow's searches finds; `search` takes a `page_token`."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def uri_of(version: ModelVersion) -> str:
    """`models:/NAME/VERSION`."""
    return f"models:/{version.name}/{version.version}"


def split_uri(uri: str) -> tuple[str, str]:
    """Name and version of `models:/NAME/VERSION`."""
    name, version = uri.removeprefix("models:/").split("/")
    return name, version


def model_id_of(uri: str) -> str:
    """The id of the logged model that a version `models:/NAME/VERSION` was registered from."""
    return logged_model_of(mlflow.MlflowClient().get_model_version(*split_uri(uri)))


def logged_model_of(version: ModelVersion) -> str:
    """The id of its logged model, which MLflow keeps in one of two places."""
    return version.model_id or str(version.source).removeprefix("models:/")


def page_of_run(run_id: str, tab: str = "") -> str:
    """The address of a run's page, or of a tab there, as text of another page of the same UI links it."""
    experiment = mlflow.MlflowClient().get_run(run_id).info.experiment_id
    return f"#/experiments/{experiment}/runs/{run_id}" + (f"/{tab}" if tab else "")


def page_of_version(uri: str) -> str:
    """The address of the page of a version `models:/NAME/VERSION`."""
    name, number = split_uri(uri)
    return f"#/models/{quote(name, safe='')}/versions/{number}"


def store_name() -> str:
    """The tracking store's URI, as it may be shown."""
    return hide_secrets(mlflow.get_tracking_uri())


def registry_name() -> str:
    """The registry's URI, as it may be shown."""
    return hide_secrets(mlflow.get_registry_uri())


def use_store() -> None:
    """Check once, without MLflow's minutes of retries, that tracking store and registry answer; a SQLite file that is
    not there is made.

    Raises:
        InputError: one does not; the message names its URI. Or `mlflow run` has begun a run that is not in this store.
    """
    found = use_plain_paths()
    for address in found:
        check(address)
    with quickly(), _alone(*folders(found)):
        for address in found:
            connect(address)
        for address, ask in _questions():
            try:
                ask()
            except Exception as error:  # no server, wrong scheme, a store of another version: any library's
                raise address.refusal(first_line(error)) from None
        if under_mlflow_run():
            _check_given_run(os.environ["MLFLOW_RUN_ID"])


def ask_store() -> None:
    """Any library's error if tracking store or registry do not answer."""
    for _, ask in _questions():
        ask()


def _questions() -> Iterator[tuple[Address, Callable[[], object]]]:
    found = addresses()
    tracking, registry = found[0].uri, found[-1].uri
    yield found[0], lambda: mlflow.MlflowClient(tracking, tracking).search_experiments(max_results=1)
    yield found[-1], lambda: mlflow.MlflowClient(tracking, registry).search_registered_models(max_results=1)


def _check_given_run(run_id: str) -> None:
    try:
        mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
        hint = f"; {IN_A_PROJECT}" if (file := addresses()[0].file) and not file.is_absolute() else ""
        raise InputError(f"MLFLOW_RUN_ID {run_id}: no such run in {store_name()} in {os.getcwd()}{hint}") from None


@contextmanager
def _alone(*folders: Path) -> Iterator[None]:
    """One process at a time: two that make the tables of a new SQLite file at once break it for good.

    The lock is on the file's folder, so that nothing is left behind, and ends with the process. A file system without
    such locks goes without.
    """
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def again(write: Callable[[], T]) -> T:
    """What `write` returns, tried anew if another process was faster.

    MLflow looks whether a data set, a tag or an alias is there before it inserts it: of two processes that do so at
    once, one gets an error, and finds it there the next time. `write` must be harmless when repeated.
    """
    for left in reversed(range(TRIES)):
        try:
            return write()
        except MlflowException as error:
            if not left or error.error_code not in LOST_A_RACE:
                raise
            time.sleep(random.uniform(0.01, 0.2))
    raise AssertionError  # the last try returns or raises
