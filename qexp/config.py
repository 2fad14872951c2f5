"""The configuration: options.py says what there is; the file overrides its defaults, the command line the file.

The word `auto` means "not given" everywhere: it leaves the default, which None stands for where the value is chosen by
a later stage.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qexp.errors import InputError
from qexp.options import (
    DATASETS,
    HOW_TO_TRAIN,
    Config,
    DataConfig,
    GateConfig,
    LatencyConfig,
    ModelGate,
    QuantizeConfig,
    SearchConfig,
    TrainConfig,
    option_name,
)

__all__ = [
    "DATASETS",
    "HOW_TO_TRAIN",
    "Config",
    "DataConfig",
    "GateConfig",
    "LatencyConfig",
    "QuantizeConfig",
    "SearchConfig",
    "TrainConfig",
    "flat_params",
    "given_otherwise",
    "load_config",
    "parse_options",
    "parse_yaml",
    "to_yaml",
]


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-4` as text; YAML 1.2, and everybody's expectation, reads a number."""


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


for _side in (_Yaml12Loader, _Yaml12Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(path: str | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """The configuration: defaults < the YAML file at `path` < `overrides`.

    Args:
        path: a YAML file; None takes `config.yaml` of the current folder if it is there.
        overrides: text from the command line by section and key; top-level keys are in section "".

    Raises:
        InputError: unknown key, wrong type or value out of range, naming key, value and what is allowed.
    """
    values = _read_file(path)
    given = parse_options(overrides or {})
    for section, options in given.items():
        (values if section == "" else values.setdefault(section, {})).update(options)
    for own in values.get("gate", {}).get("models", {}).values():  # the command line wins over these too
        for key in set(own) & set(given.get("gate", {})):
            del own[key]
    return Config.model_validate(values, strict=True)  # both parts were checked; together they cannot fail


def _read_file(path: str | None) -> dict[str, Any]:
    file = Path(path or "config.yaml")
    if path is None and not file.is_file():
        return {}
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: cannot be read ({error}); give a YAML file like config.yaml") from None
    return _parse(text, str(file))


def parse_yaml(text: str) -> Config:
    """The configuration in `text`, as `to_yaml` writes it."""
    return Config.model_validate(_parse(text, "config.yaml"), strict=True)


def _parse(text: str, file: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Yaml12Loader) or {}
    except yaml.YAMLError as error:
        raise InputError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {file}: must hold `key: value` lines, not {type(values).__name__}")
    values = _without_auto(values)
    try:
        Config.model_validate(values, strict=True)
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0], f"{file}: ", ".", " = ")) from None
    return values


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """`auto` and an empty section mean: as if the line were not there."""
    kept = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in values.items()}
    sections = {name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)}
    return {k: v for k, v in kept.items() if v != "auto" and not (v is None and k in sections)}


def parse_options(overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values of their types from the text of options, by section and key; raises InputError as `load_config` does."""
    nested = dict(overrides.get("", {})) | {name: options for name, options in overrides.items() if name}
    try:
        checked = Config.model_validate(nested)  # not strict: text becomes numbers
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0], "--", "-", " ")) from None
    given = {
        name: {key: getattr(getattr(checked, name), key) for key in keys} for name, keys in overrides.items() if name
    }
    return given | {"": {key: getattr(checked, key) for key in overrides.get("", {})}}


def _explain(error: ErrorDetails, prefix: str, separator: str, equals: str) -> str:
    """One line from pydantic's error: key (or option), value, what is allowed."""
    path = [str(part) for part in error["loc"] if not isinstance(part, int)] or [str(error["loc"][0])]
    section = path[0] if len(path) > 1 else ""
    key = ".".join(path)
    if separator == "-":  # of the command line, where no key is unknown
        key = option_name(section, path[1] if section else path[0]).replace("_", "-")
    if error["type"] == "extra_forbidden":
        fields = _fields_of(path[:-1])
        return f"{prefix}{key}: unknown key; allowed here: {', '.join(fields)}"
    message = error["msg"].replace("Input should be", "must be").replace("'", "")
    message = message.partition(", unable to parse")[0].partition(" or instance of")[0]
    message = "must be a valid boolean, true or false" if error["type"].startswith("bool") else message
    return f"{prefix}{key}{equals}{error['input']}: {message}"


def _fields_of(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path[:2]:
        default = model.model_fields[part].default
        model = ModelGate if isinstance(default, dict) else type(default)
    return list(model.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as text that `load_config` reads back."""
    values = config.model_dump(mode="json")
    return yaml.dump(_auto_named(values), Dumper=_Yaml12Dumper, sort_keys=False)


def _auto_named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _auto_named(inner) for key, inner in value.items()}
    return "auto" if value is None else value


def flat_params(config: Config) -> dict[str, Any]:
    """`section.key` -> value, as MLflow logs it; top-level keys get the section `config`.

    The dot keeps them apart from the parameters that `mlflow run` has logged already, as quoted text.
    """
    params: dict[str, Any] = {}
    for key, value in _auto_named(config.model_dump(mode="json")).items():
        if isinstance(value, dict):
            params |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            params[f"config.{key}"] = value
    return params


def given_otherwise(given: Config, recorded: Config) -> list[tuple[str, Any, Any]]:
    """(`section.key`, given, recorded) wherever `given` is neither the default nor what was recorded."""
    asked, made, default = (flat_params(config) for config in (given, recorded, Config()))
    return [(name, value, made[name]) for name, value in asked.items() if value not in (default[name], made[name])]
