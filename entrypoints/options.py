"""The options of the commands, made from the configuration's models.

An option is declared once: as a field of a model in qexp/config.py. Its text goes to pydantic, which checks type and
range for the command line and the file alike; `auto` means not given, since MLproject has no other word for that.
"""

import inspect
from collections.abc import Callable, Container
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qexp.config import Config, about_quick, load_config, option_name
from qexp.errors import InputError
from qexp.foundation.extras import check_engines
from qexp.models.names import TORCHVISION, check_run_id, parse_version_uri
from qexp.pipeline.checks import check_options

from .ending import finish

NOT_GIVEN = ("auto", "")
# Those that people need first, in the order of help; MLproject has these as parameters, all others in `options`.
COMMON = (
    "model_uri", "resume", "model", "weights", "dataset", "data_dir", "image_size", "preprocess", "epochs", "engine",
    "sample_counts", "register_best", "quick", "output_dir", "config",
)  # fmt: skip
SHORT = {"data_dir": ("--data",)}  # other words for an option
COMMON_GROUP = "Common options"
GROUPS = {  # by section of the configuration
    "": "Seed and threads",
    "data": "Data",
    "preprocess": "Preprocessing: how images become the model's input",
    "train": "Training",
    "quantize": "Quantization",
    "latency": "Latency measurement",
    "throughput": "Throughput measurement",
    "gate": "Gate: limits of the verdict",
    "search": "Search",
}
ModelUri = Annotated[
    str,
    typer.Option(
        help="registered version: models:/NAME/VERSION or models:/NAME@ALIAS", metavar="URI",
        rich_help_panel=COMMON_GROUP,
    ),
]  # fmt: skip
Resume = Annotated[
    str,
    typer.Option(
        help="ID of a stopped run of this command, to resume it", metavar="RUN_ID", rich_help_panel=COMMON_GROUP
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="end with one line of JSON on a terminal too", rich_help_panel=COMMON_GROUP)
]
ConfigFile = Annotated[
    str,
    typer.Option(
        help="YAML file; auto: config.yaml here, if it is there", metavar="FILE", rich_help_panel=COMMON_GROUP
    ),
]
Overrides = dict[str, dict[str, Any]]  # text of the options given, by section and key
Field = tuple[str, FieldInfo, str]  # section, field, its key there


def fields_of(names: tuple[str, ...]) -> dict[str, Field]:
    """The options by name. Each of `names` is a section of `Config` (all its fields), "" for its top, or one option."""
    every: dict[str, Field] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            inside = type(field.default).model_fields
            every |= {option_name(name, key): (name, inner, key) for key, inner in inside.items()}
        else:
            every[name] = ("", field, name)
    return {key: found for key, found in every.items() if key and (key in names or found[0] in names)}


def with_options(
    *names: str, given: Callable[[dict[str, Any], Overrides], None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn `command(config, **own options)` into a function for Typer, with --config, --json and an option for every
    field of `fields_of(names)`.

    What can be refused at once is, before the command runs. A command that has a parameter `overrides` is told there
    which options were given, as `load_config` takes them. `given` adds to these what the command's own options mean.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        fields = fields_of(names)

        def run(config: str, json: bool, **values: Any) -> None:
            own = {name: value for name, value in values.items() if name not in fields}
            overrides = _overrides(values, fields)
            if "overrides" in inspect.signature(command).parameters:
                own["overrides"] = overrides
            elsewhere = any(given_or_none(str(own.get(name, ""))) for name in ("model_uri", "resume"))

            def action() -> Any:
                _check_given(own)
                if given:
                    given(own, overrides)
                settled = load_config(given_or_none(config), overrides)
                check_options(settled, new_model="model" in fields and not elsewhere)
                if "engine" in fields and not elsewhere:
                    check_engines(settled.quantize.engine or ())
                return command(settled, **own)

            def in_own_words() -> Any:
                try:
                    return action()
                except InputError as error:
                    error.args = (_of_a_model_as_given(str(error), str(own["given"])),)
                    raise

            finish(in_own_words if "given" in own else action, json)

        own = [p for name, p in inspect.signature(command).parameters.items() if name not in ("config", "overrides")]
        made = [_parameter(name, section, field, fields) for name, (section, field, _) in fields.items()]
        made.append(_keyword("config", ConfigFile, "auto"))
        made.sort(key=lambda made: COMMON.index(made.name) if made.name in COMMON else len(COMMON))
        parameters = [*own, *made, _keyword("json", Json, False)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__, run.__name__, run.__module__ = command.__doc__, command.__name__, command.__module__
        return run

    return decorate


def _check_given(own: dict[str, Any]) -> None:
    """Raise InputError where a version or a run cannot be one, before a store is looked for, or made."""
    for name, option in (("model_uri", "--model-uri"), ("uri", "URI")):
        if uri := given_or_none(own.get(name, "")):
            parse_version_uri(uri, option)
    if run_id := given_or_none(own.get("resume", "")):
        check_run_id(run_id, "--resume")


def _of_a_model_as_given(text: str, model: str) -> str:
    """The text of an error in the words of a command that takes MODEL and --data, where others take options."""
    return text.replace("--data-dir", "--data").replace(f"--weights {model}", f"MODEL {model}")


def given_or_none(value: str) -> str | None:
    """The value of an option, None for `auto` and the empty text."""
    return None if value in NOT_GIVEN else value


def _overrides(values: dict[str, Any], fields: dict[str, Field]) -> Overrides:
    overrides: Overrides = {}
    for name, (section, field, key) in fields.items():
        text = {True: "true", False: "false", None: ""}.get(values[name], values[name])
        if (text := given_or_none(text)) is not None:
            overrides.setdefault(section, {})[key] = text.split(",") if _is_list(field) else text
    return overrides


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, section: str, field: FieldInfo, beside: Container[str]) -> inspect.Parameter:
    """An option of a command, `beside` those that it has."""
    group = COMMON_GROUP if name in COMMON else GROUPS[section]
    shared: dict[str, Any] = {"show_default": False, "rich_help_panel": group}  # Typer would show auto as the default
    text = about_quick(beside) if name == "quick" else help_text(field)
    shared["help"] = f"{text} [default: {default_text(field)}]"
    if is_flag(field):
        word = name.replace("_", "-")
        option = typer.Option(f"--{word}/--no-{word}", **shared)
        return _keyword(name, Annotated[bool | None, option], None)
    names = [f"--{name.replace('_', '-')}", *SHORT.get(name, ())]
    option = typer.Option(*names, metavar=type_name(field), autocompletion=_completion(name, field), **shared)
    return _keyword(name, Annotated[str, option], "auto")


def help_text(field: FieldInfo) -> str:
    """A field's description, with other fields as the command line names them."""
    text = field.description or ""
    for section, key in (("gate", "max_top1_drop"), ("quantize", "max_top1_drop")):
        text = text.replace(f"{section}.{key}", f"--{option_name(section, key).replace('_', '-')}")
    return text


def default_text(field: FieldInfo) -> str:
    """A field's default as the command line takes it."""
    default = "auto" if field.default is None else field.default
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)


def is_flag(field: FieldInfo) -> bool:
    """Whether an option is true or false."""
    return _kind(field) is bool


def _kind(field: FieldInfo) -> Any:
    """The type of a field's values where it has one."""
    if isinstance(field.annotation, UnionType) or NoneType in get_args(field.annotation):
        return next(kind for kind in get_args(field.annotation) if kind is not NoneType)
    return field.annotation


def type_name(field: FieldInfo) -> str:
    """The type of a field's values as help shows it: int, float, true|false, text, or the allowed words."""
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if isinstance(kind, UnionType):  # a size: a number, or HEIGHTxWIDTH
        kind = get_args(kind)[0]
    if get_origin(kind) is dict:
        return "N:WEIGHT,…"
    if _is_list(field):
        return "A,B,…"
    if field.annotation == int | str:
        return "int|HxW"
    return {int: "int", float: "float", bool: "true|false", str: "text"}[kind]


def _is_list(field: FieldInfo) -> bool:
    return "list[" in str(field.annotation)


def choices(name: str, field: FieldInfo) -> tuple[str, ...]:
    """The words that an option takes, or that its list is made of; empty if it takes others."""
    return ("smallnet", *TORCHVISION) if name == "model" else _words(field.annotation)


def _words(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((words for inner in get_args(kind) if (words := _words(inner))), ())


def _completion(name: str, field: FieldInfo) -> Callable[[str], list[str]] | None:
    words = choices(name, field)

    def complete(incomplete: str) -> list[str]:
        before, comma, _ = incomplete.rpartition(",") if _is_list(field) else ("", "", incomplete)
        return [before + comma + word for word in words if word not in before.split(",")]

    return complete if words else None
