"""Every option of qexp: its default, range, unit and help, declared once; the file and the command line override it.

`config.yaml` repeats the defaults, the Typer commands make their options from these models, and MLproject mirrors them
(tests compare all three). The word `auto` means "not given" everywhere: it leaves the default, which None stands for
where the value is chosen by a later stage.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from qexp.errors import InputError

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
HOW_TO_TRAIN = ("device", "processes", "checkpoint_minutes")  # options of training that do not change what comes out
DATASETS = ("digits", "cifar10", "imagefolder")

PositiveInt = Annotated[int, Field(gt=0)]
Counts = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(lambda counts: sorted(set(counts)))]


class DataConfig(BaseModel):
    model_config = STRICT
    dataset: Literal["digits", "cifar10", "imagefolder"] = Field("digits", description="data set")
    data_dir: str | None = Field(
        None, description="folder of cifar10 (auto: data/cifar10-python) or imagefolder (must be given)"
    )
    image_size: int = Field(32, ge=8, le=1024, description="height and width of the model's input, pixels")
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of the training images kept for validation")


class TrainConfig(BaseModel):
    model_config = STRICT
    epochs: int = Field(20, ge=1, le=10_000, description="passes over the training images, at most")
    batch_size: int = Field(128, ge=2, description="images a step")
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the one-cycle schedule; auto: 0.2 with batch norm, 0.03 without"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum (plain SGD at 0)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on the weights")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    crop_padding: int = Field(4, ge=0, description="random crop after reflecting so many pixels at each border")
    flip: bool | None = Field(None, description="random horizontal flip; auto: on, off for digits")
    bf16: bool | None = Field(None, description="bf16 autocast; auto: on where the CPU has bf16 instructions")
    device: Literal["cpu", "cuda"] | None = Field(None, description="where to train; auto: cuda if there is one")
    processes: int = Field(1, ge=1, le=64, description="training processes on this machine, started by torchrun")
    checkpoint_minutes: float = Field(
        5.0, gt=0, description="minutes between checkpoints inside an epoch; each epoch ends with one anyway"
    )
    patience: int = Field(
        6,
        ge=1,
        description="epochs without a better validation top-1, or the same with a lower loss, before training stops",
    )


class QuantizeConfig(BaseModel):
    model_config = STRICT
    engine: Literal["fx", "pt2e"] = Field("fx", description="quantization engine")
    backend: Literal["x86", "onednn"] = Field("x86", description="int8 kernels of engine fx; a plain load uses x86")
    calibration_samples: int | None = Field(
        None, ge=1, description="un-augmented training images that set the ranges; auto: 256, or all if there are fewer"
    )
    calibration_batch_size: int = Field(64, ge=1, description="images a calibration step")
    observer: Literal["histogram", "minmax", "moving_average"] = Field(
        "histogram", description="how activation ranges are chosen"
    )
    per_channel: bool = Field(True, description="one weight scale an output channel instead of one a layer")
    allow_float: bool = Field(False, description="accept Conv2d and Linear layers that stay fp32")


class LatencyConfig(BaseModel):
    model_config = STRICT
    batch_sizes: Counts = Field([1, 2, 4, 8, 16, 32, 64, 128], description="images a forward pass")
    warmup: int = Field(5, ge=1, description="untimed passes of each model at each batch size")
    min_repeats: int = Field(20, ge=2, description="timed passes of each model at each batch size, at least")
    min_seconds: float = Field(1.0, ge=0, description="seconds of timing at each batch size, at least")


class GateConfig(BaseModel):
    model_config = STRICT
    max_top1_drop: float = Field(1.0, description="largest drop of test top-1 from fp32 to int8, percentage points")
    min_size_ratio: float = Field(3.0, ge=0, description="smallest fp32 size over int8 size, as stored")
    min_speedup: float = Field(1.0, ge=0, description="smallest fp32 p50 over int8 p50, at every batch size")


class SearchConfig(BaseModel):
    model_config = STRICT
    sample_counts: Counts = Field([8, 16, 32, 64, 128, 256, 512], description="calibration sample counts to try")
    observers: list[Literal["histogram", "minmax", "moving_average"]] | None = Field(
        None, min_length=1, description="observers to try; auto: the one of quantize.observer"
    )
    seeds_per_point: int = Field(3, ge=1, description="calibration subsets drawn for each point")
    sampler: Literal["grid", "tpe"] = Field("grid", description="grid: every point once; tpe: Optuna's TPE")
    trials: int = Field(20, ge=1, description="trials of the tpe sampler; the grid has its own number")
    study: str | None = Field(None, description="name of the study; auto: made from the model version and the options")
    study_dir: str = Field("studies", description="folder of the study's journal file")
    register_best: bool = Field(False, description="quantize again with the winner, measure and register it")


class Config(BaseModel):
    model_config = STRICT
    model: str = Field("smallnet", description="smallnet, vgg16 or any torchvision classifier by its registered name")
    seed: int = Field(0, ge=0, lt=2**32, description="of split, weights, augmentation and calibration subset")
    threads: int | None = Field(None, ge=1, description="CPU threads of every stage; auto: one a core")
    output_dir: str | None = Field(None, description="folder that gets a copy of the report; auto: only MLflow has it")
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    latency: LatencyConfig = LatencyConfig()
    gate: GateConfig = GateConfig()
    search: SearchConfig = SearchConfig()


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
    key = path[-1].replace("_", "-") if separator == "-" else ".".join(path)
    if error["type"] == "extra_forbidden":
        fields = _fields_of(path[:-1])
        return f"{prefix}{key}: unknown key; allowed here: {', '.join(fields)}"
    message = error["msg"].replace("Input should be", "must be").replace("'", "")
    return f"{prefix}{key}{equals}{error['input']}: {message}"


def _fields_of(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path:
        model = type(model.model_fields[part].default)
    return list(model.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as text that `load_config` reads back."""
    values = config.model_dump(mode="json")
    named = {k: _auto_named(v) if isinstance(v, dict) else ("auto" if v is None else v) for k, v in values.items()}
    return yaml.dump(named, Dumper=_Yaml12Dumper, sort_keys=False)


def _auto_named(section: dict[str, Any]) -> dict[str, Any]:
    return {key: "auto" if value is None else value for key, value in section.items()}


def flat_params(config: Config) -> dict[str, Any]:
    """`section.key` -> value, as MLflow logs it; top-level keys get the section `config`.

    The dot keeps them apart from the parameters that `mlflow run` has logged already, as quoted text.
    """
    params: dict[str, Any] = {}
    for key, value in yaml.load(to_yaml(config), _Yaml12Loader).items():
        if isinstance(value, dict):
            params |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            params[f"config.{key}"] = value
    return params


def given_otherwise(given: Config, recorded: Config) -> list[tuple[str, Any, Any]]:
    """(`section.key`, given, recorded) wherever `given` is neither the default nor what was recorded."""
    asked, made, default = (flat_params(config) for config in (given, recorded, Config()))
    return [(name, value, made[name]) for name, value in asked.items() if value not in (default[name], made[name])]
