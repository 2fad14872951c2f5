"""The aliases of registered models: `challenger` is a version that loads, `champion` the one to ship."""

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.tracking.store import again, is_missing, split_uri, uri_of

CHALLENGER, CHAMPION = "challenger", "champion"


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


def succeed(int8_uri: str, champion_uri: str | None) -> bool:
    """Make a version `champion` if the one that it was compared with, or none, still is, or if it has the alias itself;
    whether that was so."""
    now = version_with(CHAMPION, split_uri(int8_uri)[0])
    unmoved = (uri_of(now) if now else None) in (champion_uri, int8_uri)
    if unmoved:
        move_champion(int8_uri)
    return unmoved


def move_champion(int8_uri: str) -> None:
    """Make an int8 version `champion`, and the fp32 version that it came from with it.

    Two processes may do so at once. The fp32 alias then follows the int8 one: whoever writes it looks again, until it
    has written what belongs to the int8 version that has the alias.
    """
    set_alias(CHAMPION, int8_uri)
    name, _ = split_uri(int8_uri)
    written = None
    while (champion := version_with(CHAMPION, name)) and champion.tags["fp32_uri"] != written:
        written = champion.tags["fp32_uri"]
        set_alias(CHAMPION, written)
