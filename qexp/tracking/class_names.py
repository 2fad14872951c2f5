"""The class names of a registered version: in its tag `classes` as JSON, or, where they are too many for a tag, in a
file of the version alone, whose digest is checked with all others. Without torch.

That file is MLmodel, which has them in any case (`metadata.classes`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow.models import Model

LONGEST_TAG = 5_000  # characters; stores of MLflow take 5,000 to 100,000
IN_FILE = "metadata.classes of the file MLmodel"
ELSEWHERE = re.compile(rf"([1-9]\d{{0,8}}) names: {IN_FILE}", re.ASCII)


@dataclass(frozen=True)
class ClassNames:
    """What a tag says: how many names there are, and which; None where they are in the file alone."""

    count: int
    names: tuple[str, ...] | None

    @property
    def place(self) -> str:
        """Where the names are, in words."""
        return f"of `{IN_FILE}`" if self.names is None else "of the tag `classes`"

    def read(self, files: Path) -> tuple[str, ...]:
        """The names, where need be from a checked copy of the version's files."""
        if self.names is not None:
            return self.names
        return tuple((Model.load(str(files)).metadata or {})["classes"])


def as_tag(names: Sequence[str]) -> str:
    """The text of the tag: the names as JSON, or how many there are and where."""
    text = json.dumps(names)
    return text if len(text) <= LONGEST_TAG else f"{len(names)} names: {IN_FILE}"


def parse_tag(text: str) -> ClassNames:
    """What a tag says.

    Raises:
        ValueError: it is nothing that `as_tag` makes.
    """
    if elsewhere := ELSEWHERE.fullmatch(text):
        return ClassNames(int(elsewhere[1]), None)
    names = json.loads(text)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError
    return ClassNames(len(names), tuple(names))
