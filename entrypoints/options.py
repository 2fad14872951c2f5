"""Command-line options made from the configuration's models, and the one way in which every command ends.

An option is declared once: as a field of a model in qexp/config.py. Its text goes to pydantic, which checks type and
range for the command line and the file alike; `auto` means not given, since MLproject has no other word for that.
"""

import ctypes
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import typer.exceptions
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qexp.config import Config, load_config, option_name
from qexp.environment import wait_without_spinning
from qexp.errors import InputError, StageError, first_line, hide_passwords

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
NOT_GIVEN = ("auto", "")
FLAGS = ("--force", "--json", "--register-best")  # may stand alone, for true
ModelUri = Annotated[
    str, typer.Option(help="registered version: models:/NAME/VERSION or models:/NAME@ALIAS", metavar="URI")
]
Resume = Annotated[str, typer.Option(help="ID of a stopped run of this command, to resume it", metavar="RUN_ID")]
Overrides = dict[str, dict[str, Any]]  # text of the options given, by section and key
ConfigFile = Annotated[str, typer.Option(help="YAML file; auto: config.yaml here, if it is there", metavar="FILE")]


def fields_of(names: tuple[str, ...]) -> dict[str, tuple[str, FieldInfo, str]]:
    """Option name -> (section, field, its key there). A name is a section of `Config` (all its fields) or one."""
    every: dict[str, tuple[str, FieldInfo, str]] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            inside = type(field.default).model_fields
            every |= {option_name(name, key): (name, inner, key) for key, inner in inside.items()}
        else:
            every[name] = ("", field, name)
    return {key: found for key, found in every.items() if key and (key in names or found[0] in names)}


def with_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn `command(config, **own options)` into a function for Typer, with --config and an option for every field of
    `fields_of(names)`. The result of `command` is printed as one line of JSON. A command that has a parameter
    `overrides` is told there which options were given, as `load_config` takes them.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        fields = fields_of(names)

        def run(**given: str) -> None:
            names = set(given) - set(fields) - {"config"}
            own: dict[str, Any] = {name: given[name] for name in names}
            overrides = _overrides(given, fields)
            if "overrides" in inspect.signature(command).parameters:
                own["overrides"] = overrides
            finish(lambda: command(load_config(given_or_none(given["config"]), overrides), **own))

        own = [p for name, p in inspect.signature(command).parameters.items() if name not in ("config", "overrides")]
        file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=ConfigFile)
        parameters = [*own, file, *(_parameter(name, field) for name, (_, field, _) in fields.items())]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def given_or_none(value: str) -> str | None:
    """The value of an option, None for `auto` and the empty text."""
    return None if value in NOT_GIVEN else value


def is_true(option: str, value: str) -> bool:
    """The value of an option that is one of FLAGS; InputError if it is another word than true, false and auto."""
    if value not in ("true", "false", *NOT_GIVEN):
        raise InputError(f"{option} {value}: must be true or false")
    return value == "true"


def _with_values(words: list[str]) -> list[str]:
    """The command line with `true` after every flag that stands alone."""
    completed = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        alone = word in FLAGS and after not in ("true", "false", "auto")
        completed += [word, "true"] if alone else [word]
    return completed


def _overrides(values: dict[str, str], fields: dict[str, tuple[str, FieldInfo, str]]) -> Overrides:
    overrides: dict[str, dict[str, Any]] = {}
    for name, (section, field, key) in fields.items():
        if (text := given_or_none(values[name])) is not None:
            overrides.setdefault(section, {})[key] = text.split(",") if _is_list(field) else text
    return overrides


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    default = "auto" if field.default is None else field.default
    shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    text = f"{field.description} [default: {shown}]"  # which Typer would put in brackets of its own
    option = typer.Option(help=text, metavar=type_name(field), show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=Annotated[str, option])


def type_name(field: FieldInfo) -> str:
    """The type of a field's values as help shows it: int, float, true|false, text, or the allowed words."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = (
        kinds[0]
        if isinstance(field.annotation, UnionType) or type(None) in get_args(field.annotation)
        else field.annotation
    )
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is dict:
        return "N:WEIGHT,…"
    if _is_list(field):
        return "A,B,…"
    return {int: "int", float: "float", bool: "true|false", str: "text"}[kind]  # type: ignore[index]


def _is_list(field: FieldInfo) -> bool:
    return "list[" in str(field.annotation)


def finish(action: Callable[[], dict[str, Any] | None]) -> None:
    """Run a command to its end: a line of JSON (none if another process has printed it), or a line on standard error
    and an exit code.

    2 for bad input, 1 for a stage that failed, 130, 143 and 129 for SIGINT, SIGTERM and SIGHUP.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: loading int8 weights warns of a deprecation
    wait_without_spinning()
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that is closed; under nohup it stays ignored
        signal.signal(signal.SIGHUP, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # when the launcher is killed, its processes stop
    try:
        summary = action()
    except InputError as error:
        _fail(str(error), 2)
    except StageError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except SystemExit as stopped:
        _fail("terminated", int(stopped.code or 0))
    except Exception as error:
        if not type(error).__module__.startswith("mlflow."):
            raise
        _fail(f"MLflow: {first_line(error)}", 1)
    else:
        if summary is not None:
            print(json.dumps(_rounded(summary)), flush=True)


def run_app(app: typer.Typer) -> None:
    """Run a command line; what Typer refuses (unknown or missing options) is one line too, and exit code 2."""
    try:
        code = app(_with_values(sys.argv[1:]), standalone_mode=False)
    except typer.exceptions.TyperException as error:
        typer.echo(f"error: {error.format_message()} (see --help)", err=True)
        code = error.exit_code
    code = code if isinstance(code, int) else 0
    if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may abort a process that Python tears down around them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_alone(command: Callable[..., None]) -> None:
    """Run one command by itself, as MLproject does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    run_app(app)


def _rounded(value: Any) -> Any:
    """Four decimals are more than any measurement here holds."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def _fail(message: str, code: int) -> None:
    line = hide_passwords(" ".join(message.split()))
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the launcher shows it, and ends the other processes
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it sends to this one too, that is ending already
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    else:
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """A signal as an exception, so that runs end as KILLED on the way out."""
    sys.exit(128 + number)
