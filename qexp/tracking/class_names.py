"""The class names of a registered version: in its tag `classes` as JSON, or, where they are too many for a tag, in a
file of the version alone, whose digest is checked with all others. Without torch.

That file is MLmodel, which has them in any case (`metadata.classes`).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mlflow.models import Model

LONGEST_TAG = 5_000  # characters; stores of MLflow take 5,000 to 100,000
IN_FILE = "metadata.classes of the file MLmodel"
ELSEWHERE = re.compile(rf"(\d+) names: {IN_FILE}")


def as_tag(names: Sequence[str]) -> str:
    """The text of the tag: the names as JSON, or how many there are and where."""
    text = json.dumps(names)
    return text if len(text) <= LONGEST_TAG else f"{len(names)} names: {IN_FILE}"


def count_of(tag: str) -> int:
    """How many names there are, by the tag."""
    elsewhere = ELSEWHERE.fullmatch(tag)
    return int(elsewhere[1]) if elsewhere else len(json.loads(tag))


def place_of(tag: str) -> str:
    """Where the names are, in words."""
    return f"of `{IN_FILE}`" if ELSEWHERE.fullmatch(tag) else "of the tag `classes`"


def in_tag(tag: str) -> tuple[str, ...] | None:
    """The names, if the tag has them."""
    return None if ELSEWHERE.fullmatch(tag) else tuple(json.loads(tag))


def names_of(tag: str, files: Path) -> tuple[str, ...]:
    """The names, from the tag of a version or from a checked copy of its files."""
    if (names := in_tag(tag)) is not None:
        return names
    return tuple((Model.load(str(files)).metadata or {})["classes"])
