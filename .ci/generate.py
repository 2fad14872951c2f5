"""Writes what repeats the options of qexp/config.py and entrypoints/: config.yaml, MLproject and the table of options
in the docs (`make generate`)."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from entrypoints.cli import COMMANDS
from entrypoints.options import COMMON, GROUPS, choices, default_text, fields_of, help_text, type_name
from qexp.config import Config

TOP = Path(__file__).resolve().parent.parent
ENTRY_POINTS = ("main", "train", "quantize", "latency", "search", "report")
# ruff: noqa: E501
CONFIG_HEAD = """\
# Every option with its default. Precedence: this file's values < command line; `auto` leaves the choice to qexp.
"""
PROJECT_HEAD = """\
name: qexp

# The parameters that people use; `options` takes all others, as they are written for the command:
#   mlflow run . -e main -P model=vgg16 -P options="--observer minmax --batch-sizes 1,8"
# `-P observer=minmax` works too: MLflow passes on a parameter that is not declared. `auto` means: not given, so
# config.yaml decides. Ranges and words are checked by the program.
# This file is generated: `make generate`.

conda_env: conda.yaml

entry_points:
"""
OPTIONS_HEAD = """\
# Options

<!-- Generated from qexp/config.py: `make generate`. -->

Every option is a line of `config.yaml`, an option of the commands and, under `mlflow run`, a parameter or part of
`-P options="…"`. The command line comes before `config.yaml`, which comes before the defaults. `auto` means "not given"
everywhere.

Options that are true or false are written `--flip`, `--no-flip` or `--flip false`. Lists are written with commas:
`--batch-sizes 1,8,64`. `-h` shows the options of a command, the common ones first.

The file is a regular one in UTF-8, of at most 256 KiB, 8 levels and 10,000 values, with each key once and without YAML's
aliases. The order of a list has no meaning, but for `engine`: the first one is the first in the results.
"""


def config_yaml() -> str:
    """Every option with its default, and its help as a comment."""
    lines = [CONFIG_HEAD.rstrip("\n"), ""]
    sections = {name: field for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)}
    lines += [_line(name, f.default, f.description) for name, f in Config.model_fields.items() if name not in sections]
    for section, field in sections.items():
        lines += ["", f"{section}:"]
        inner = type(field.default).model_fields
        lines += [_line(name, f.default, f.description, "  ") for name, f in inner.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, default: Any, description: str | None, indent: str = "") -> str:
    value = "auto" if default is None else yaml.safe_dump(default, default_flow_style=True, width=10_000).strip()
    return f"{indent}{name}: {value.removesuffix('...').strip()}".ljust(33) + f" # {description}"


def mlproject() -> str:
    """Every entry point with the options that people need first."""
    return PROJECT_HEAD + "\n\n".join(_entry_point(name) for name in ENTRY_POINTS) + "\n"


def _entry_point(name: str) -> str:
    options = inspect.signature(getattr(import_module(f"entrypoints.{name}"), name)).parameters
    lines = [f"  {name}:", "    parameters:"]
    common = [option for option in COMMON if option in options]
    for option in common:
        field = fields_of((option,)).get(option)
        kind = "float" if field and type_name(field[1]) in ("int", "float") else "string"
        default = "" if options[option].default is inspect.Parameter.empty else ", default: auto"
        lines.append(f"      {option}: {{type: {kind}{default}}}")
    lines.append("      options: {type: string, default: auto}")
    lines += ["    command: >-", f"      python -m entrypoints.{name}"]
    lines += [f"      --{option.replace('_', '-')} {{{option}}}" for option in (*common, "options")]
    return "\n".join(lines)


def options_md() -> str:
    """The table of options: name, default, allowed values, meaning, and the commands that have it."""
    text = OPTIONS_HEAD
    signatures = {name: inspect.signature(command).parameters for name, command in COMMANDS.items()}
    for section, title in GROUPS.items():
        text += f"\n## {title if section else 'General'}\n\n"
        text += f"In `config.yaml`: {f'section `{section}`' if section else 'at the top'}.\n\n"
        text += "| option | default | values | what it is | commands |\n|---|---|---|---|---|\n"
        for name, (_, field, key) in fields_of((section,)).items():
            option = f"`--{name.replace('_', '-')}`" + (f"<br>(`{section}.{key}`)" if name != key else "")
            words = choices(name, field) if name != "model" else ()
            values = ", ".join(f"`{word}`" for word in words) or type_name(field).replace("|", " or ")
            commands = ", ".join(command for command, parameters in signatures.items() if name in parameters)
            text += f"| {option} | `{default_text(field)}` | {values} | {help_text(field)} | {commands} |\n"
    return text


FILES = {"config.yaml": config_yaml, "MLproject": mlproject, "docs/reference/options.md": options_md}

if __name__ == "__main__":
    for file, make in FILES.items():
        (TOP / file).parent.mkdir(parents=True, exist_ok=True)
        (TOP / file).write_text(make())
