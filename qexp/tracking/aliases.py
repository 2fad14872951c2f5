"""The aliases of registered models: `challenger` is a version that loads, `champion` the one to ship."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from uuid import uuid4

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.progress import say
from qexp.tracking.store import again, is_missing, quickly, split_uri, uri_of
from qexp.tracking.tags import tags_of

CHALLENGER, CHAMPION = "challenger", "champion"
MOVES = "qexp.moves_champion."  # begins the tag of a registered model by which a process says that it moves the alias
ABANDONED_S = 60.0  # after which such a tag is that of a process that was killed: moving takes less than a second


def version_with(alias: str, name: str) -> ModelVersion | None:
    """The version of a registered model that has this alias, None if none has."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def set_alias(alias: str, uri: str) -> None:
    """Give the version `models:/NAME/VERSION` an alias of its model."""
    name, number = split_uri(uri)
    again(lambda: mlflow.MlflowClient().set_registered_model_alias(name, alias, number))


@contextmanager
def only_mover(name: str) -> Iterator[Callable[[], bool]]:
    """While this process alone moves `champion` of the registered model `name`: between looking who has the alias and
    giving it to another, no other process does.

    MLflow has no lock, but what one has written the others see. So each process writes a tag of its own and then looks
    for those of others. Of two that do so at once, one at least sees the other's, withdraws its own, and tries again.
    A tag that stays for ABANDONED_S is removed. A process that stood still for so long asks what this yields before it
    moves the alias: whether its tag is still there. If not, the tag is written anew, and it has to look again who has
    the alias.
    """
    own = f"{MOVES}{uuid4().hex}"
    client = mlflow.MlflowClient()

    def still_alone() -> bool:
        if own in client.get_registered_model(name).tags:
            return True
        say(f"this process stood still, and another one may have moved {CHAMPION} of {name}; looking again")
        _write_mark(client, name, own)
        return False

    try:
        _write_mark(client, name, own)
        yield still_alone
    finally:
        with suppress(MlflowException), quickly():  # of a store that is away, ABANDONED_S does it
            again(partial(client.delete_registered_model_tag, name, own))


def _write_mark(client: mlflow.MlflowClient, name: str, own: str) -> None:
    """Write the tag `own`, as soon as no other process has one."""
    first_seen = dict[str, float]()
    while True:
        again(partial(client.set_registered_model_tag, name, own, "true"))
        others = [tag for tag in client.get_registered_model(name).tags if tag.startswith(MOVES) and tag != own]
        if not others:
            return
        again(partial(client.delete_registered_model_tag, name, own))
        if not first_seen:
            say(f"another process moves {CHAMPION} of {name}; waiting for it")
        for tag in others:
            if time.monotonic() - first_seen.setdefault(tag, time.monotonic()) > ABANDONED_S:
                say(f"it has left its mark {tag} there for {ABANDONED_S:g} s; removed")
                again(partial(client.delete_registered_model_tag, name, tag))
        time.sleep(random.uniform(0.05, 0.3))


def succeed(int8_uri: str, champion_uri: str | None) -> bool:
    """Make a version `champion` if the one that it was compared with, or none, still is, or if it has the alias itself;
    whether that was so."""
    name, _ = split_uri(int8_uri)
    with only_mover(name) as still_alone:
        while True:
            now = version_with(CHAMPION, name)
            unmoved = (uri_of(now) if now else None) in (champion_uri, int8_uri)
            if not unmoved or still_alone():
                break
        if unmoved:
            move_champion(int8_uri)
    return unmoved


def move_champion(int8_uri: str) -> None:
    """Make an int8 version `champion`, and the fp32 version that it came from with it.

    People may move the alias of the int8 model by hand meanwhile. That of fp32 follows it: whoever writes it looks
    again, until it has written what belongs to the int8 version that has the alias.
    """
    set_alias(CHAMPION, int8_uri)
    name, _ = split_uri(int8_uri)
    written = None
    while (champion := version_with(CHAMPION, name)) and tags_of(champion).known("fp32_uri") not in (None, written):
        written = tags_of(champion).fp32_uri
        set_alias(CHAMPION, written)
