"""What MLflow's stores and URIs cannot hold: refused before a training, and not after it. Without torch."""

import unicodedata
from collections.abc import Sequence

from qexp.errors import InputError

# What MLflow refuses in a name, of a registered model or of a logged one, and what ends the name in a URI.
NAME_EXCLUDES = "/:.%\"'@?#"
LONGEST_PARAM = 6_000  # characters of a parameter of a run
LONGEST_NAME = 250  # characters; the columns of PostgreSQL and MySQL have room for 256


def check_names(model: str, classes: Sequence[str]) -> None:
    """Raise InputError unless a model can be registered, and found again, under this name and with these class names.

    How many classes there are and how long their names are does not matter: see class_names.py.
    """
    if (
        not model.strip()
        or set(model) & set(NAME_EXCLUDES)
        or not set(map(unicodedata.category, model)).isdisjoint(("Cc", "Cs"))
    ):
        allowed = f"must not be empty, nor have control characters or one of {' '.join(NAME_EXCLUDES)} in it"
        raise InputError(f"name {model!r}: {allowed}")
    if len(model) > LONGEST_NAME:
        raise InputError(f"name {model[:20]!r}…: has {len(model)} characters; at most {LONGEST_NAME} are allowed")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"classes: {name!r} is not UTF-8; rename it") from None


def short_param(value: object) -> str:
    """A parameter of a run as text that a store takes: of a long list, the beginning. config.yaml has all of it."""
    text = str(value)
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 1]}…"
