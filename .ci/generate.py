"""Writes what repeats the options of qexp/config.py and entrypoints/: config.yaml and MLproject (`make generate`)."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from entrypoints.options import fields_of, type_name
from qexp.config import Config

TOP = Path(__file__).resolve().parent.parent
ENTRY_POINTS = ("main", "train", "quantize", "latency", "search", "report")
# ruff: noqa: E501
CONFIG_HEAD = """\
# Every option with its default. Precedence: this file's values < command line; `auto` leaves the choice to qexp.
"""
PROJECT_HEAD = """\
name: qexp

# Parameters mirror the options of entrypoints/*.py (a test compares them). `auto` means: not given, so config.yaml decides.
# MLflow checks only `path` and `uri`; ranges and words are checked by the program.

conda_env: conda.yaml

entry_points:
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
    """Every entry point with the options of its command."""
    return PROJECT_HEAD + "\n\n".join(_entry_point(name) for name in ENTRY_POINTS) + "\n"


def _entry_point(name: str) -> str:
    options = inspect.signature(getattr(import_module(f"entrypoints.{name}"), name)).parameters
    lines = [f"  {name}:", "    parameters:"]
    for option, parameter in options.items():
        field = fields_of((option,)).get(option)
        kind = "float" if field and type_name(field[1]) in ("int", "float") else "string"
        default = "" if parameter.default is inspect.Parameter.empty else ", default: auto"
        lines.append(f"      {option}: {{type: {kind}{default}}}")
    lines += ["    command: >-", f"      python -m entrypoints.{name}"]
    lines += [f"      --{option.replace('_', '-')} {{{option}}}" for option in options]
    return "\n".join(lines)


if __name__ == "__main__":
    (TOP / "config.yaml").write_text(config_yaml())
    (TOP / "MLproject").write_text(mlproject())
