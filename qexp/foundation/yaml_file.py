"""A YAML file that anybody may have written, as plain values: what costs time or memory without end is refused.

It feeds the configuration (config.py), which checks names, types and ranges. PyYAML composes nested values by recursion
and multiplies what aliases name; limits are looked at while the text is read, before anything is built from it.
"""

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from qexp.errors import InputError
from qexp.foundation.environment import looked_in

MOST_BYTES = 256 * 1024  # a file with every option and its comment has 9 KB
MOST_LEVELS = 8  # gate, models, a name and its limits are four
MOST_VALUES = 10_000
MOST_DIGITS = 18
MOST_CHARACTERS = 80  # of a value that a message shows
MOST_OF_A_PATH = 4096  # characters: all of it


class _Refused(yaml.YAMLError):
    """What is YAML, but more than a configuration needs."""


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-4` as text; YAML 1.2, and everybody's expectation, reads a number. Within the limits above."""

    levels = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _Refused(f"has an alias (*{self.peek_event().anchor}); write the value once more")
        self.levels, self.values = self.levels + 1, self.values + 1
        if self.levels > MOST_LEVELS:
            raise _Refused(f"is nested more than {MOST_LEVELS} levels deep")
        if self.values > MOST_VALUES:
            raise _Refused(f"holds more than {MOST_VALUES:,} values")
        node = super().compose_node(parent, index)
        self.levels -= 1
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MOST_DIGITS:
            raise _Refused(f"has a number of {len(node.value)} characters: {shown(node.value)}")
        return int(super().construct_yaml_int(node))


class Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _side in (Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if (found := (key.tag, str(key.value))) in seen:
            line = key.start_mark.line + 1
            raise _Refused(f"has the key {shown(key.value)} twice, again in line {line}; only one of them could count")
        seen.add(found)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it is not there, no regular file (a pipe would be waited for, a device has no end), larger than
            MOST_BYTES, or not UTF-8.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("is no regular file")
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"has more than {MOST_BYTES // 1024} KiB")
        return content.decode()
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 at byte {error.start}"
    except OSError as error:
        why = (error.strerror or str(error)) + (looked_in(path) if error.errno == errno.ENOENT else "")
    except ValueError as error:  # a path with a NUL in it, too
        why = str(error)
    raise InputError(
        f"--config {shown(str(path), MOST_OF_A_PATH)}: cannot be read ({why}); give a YAML file like config.yaml"
    )


def parse(text: str, name: str) -> dict[str, Any]:
    """The values in `text`; `name` is what messages call it.

    Raises:
        InputError: it is not YAML, more than the limits allow, or no mapping.
    """
    try:
        values = yaml.load(text, Loader)
    except _Refused as error:
        raise InputError(f"--config {name}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {name}: not YAML: {shown(str(error), 300)}") from None
    except Exception as error:  # of PyYAML's constructors: int(), float() and datetime() raise what they like
        raise InputError(f"--config {name}: not YAML: a value that is none ({shown(str(error))})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config {name}: must hold `key: value` lines, not {type(values).__name__}")
    return values


def shown(value: object, most: int = MOST_CHARACTERS) -> str:
    """A value as part of one line: short, with what cannot be printed escaped."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} of thousands of digits"
    text = " ".join(text[: 4 * most].split())
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
