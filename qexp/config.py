"""The configuration: every option once, with its type, range, default, unit and help, and how values are read.

The commands make their options from these models; `config.yaml` and `MLproject` are generated from them
(`make generate`). A file overrides the defaults, the command line the file. `auto` means "not given" everywhere: it
leaves the default, which None stands for where the value is chosen by a later stage.
"""

import difflib
import math
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from qexp.errors import InputError
from qexp.foundation import yaml_file
from qexp.foundation.yaml_file import MOST_OF_A_PATH, shown

SIDES_PX = 8, 1024  # of an image that a model is given, least and most
NO_FILE = ""  # in the place of the path of a configuration file
MOST = 10**9  # of any number of images, steps, threads, …: far more than can be meant
STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
# Options of training that may differ when it is resumed: where and how fast, not what is computed.
HOW_TO_TRAIN = ("device", "processes", "checkpoint_minutes", "train_threads")
PLACES = ("data_dir", "labels", "classes", "calibration_dir")  # of the data on this machine, not what they are
Engine = Literal["fx", "pt2e", "onnx"]
Observer = Literal["histogram", "minmax", "batch_average", "percentile"]
Scale = Literal["channel", "layer"]
Baseline = Literal[
    "fp32_eager", "fp32_traced", "bf16", "fp32_onnx", "fp32_openvino", "bf16_openvino", "fp32_compiled", "bf16_compiled"
]  # fmt: skip

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Counts = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(lambda counts: sorted(set(counts)))]


def _renamed(value: Any) -> Any:
    """`moving_average`, an observer of earlier versions, as the one that has taken its place."""
    if isinstance(value, list):
        return [_renamed(name) for name in value]
    return "batch_average" if value == "moving_average" else value


def _as_list(value: Any) -> Any:
    """A file may say `engine: fx` instead of `engine: [fx]`."""
    return value.split(",") if isinstance(value, str) else value


def _once(names: list[str]) -> list[str]:
    """Each choice once, in the order given."""
    return list(dict.fromkeys(names))


def _in_order_of(words: Any) -> AfterValidator:
    """Each choice once, in the order in which they are declared: the order given has no meaning."""
    return AfterValidator(lambda given: [word for word in get_args(words) if word in given])


def _text(value: str) -> str:
    """A name or an address, which goes into a line of a message and into MLflow."""
    if not value.isprintable():
        raise ValueError("must be text that can be printed")
    return value


def _path(value: str) -> str:
    """A path, with the home folder for ~ wherever it was written: a shell puts it there only at the start of a word."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("must be a path in UTF-8")
    return os.path.expanduser(value)


Text = Annotated[str, AfterValidator(_text)]
Folder = Annotated[str, AfterValidator(_path)]
Model = Annotated[str, AfterValidator(_text), AfterValidator(_path)]


Engines = Annotated[list[Engine], Field(min_length=1), BeforeValidator(_as_list), AfterValidator(_once)]
Names = Annotated[
    list[Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_text)]],
    BeforeValidator(_as_list),
    AfterValidator(lambda names: sorted(set(names))),
]
Baselines = Annotated[
    list[Baseline],
    BeforeValidator(lambda value: [] if value in ("none", ["none"]) else _as_list(value)),
    _in_order_of(Baseline),
]


def _height_and_width(value: Any) -> tuple[int, int]:
    parts = str(value).lower().split("x")
    if isinstance(value, bool) or len(parts) > 2 or not all(re.fullmatch(r" *\d{1,6} *", part) for part in parts):
        raise ValueError(f"must be pixels, {SIDES_PX[0]} to {SIDES_PX[1]}, or HEIGHTxWIDTH")
    height, width = int(parts[0]), int(parts[-1])
    if not all(SIDES_PX[0] <= side <= SIDES_PX[1] for side in (height, width)):
        raise ValueError(f"must be {SIDES_PX[0]} to {SIDES_PX[1]} pixels a side")
    return height, width


def _image_size(value: Any) -> int | str:
    """A number for a square, else HEIGHTxWIDTH."""
    height, width = _height_and_width(value)
    return height if height == width else f"{height}x{width}"


ImageSize = Annotated[int | str, BeforeValidator(_image_size)]


class DataConfig(BaseModel):
    model_config = STRICT
    dataset: Literal["digits", "cifar10", "imagefolder"] = Field(
        cast(Any, None), description="data set; auto: imagefolder where data_dir or labels is given, else digits"
    )
    data_dir: Folder | None = Field(
        None, description="folder of cifar10 (auto: data/cifar10-python) or imagefolder (must be given)"
    )
    image_size: ImageSize = Field(
        32, description="height and width of the model's input, pixels: 224, or HEIGHTxWIDTH as 48x192"
    )
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of the training images kept for validation")
    labels: Folder | None = Field(
        None, description="CSV file of imagefolder's test images and their classes, instead of class folders"
    )
    classes: Folder | None = Field(
        None,
        description="file with the class names in the order of the model's logits, one a line or a JSON list; auto: by "
        "the alphabet",
    )
    calibration_dir: Folder | None = Field(
        None, description="folder of images without labels that set the ranges; auto: the training images"
    )

    @model_validator(mode="before")
    @classmethod
    def _folder_of_images(cls, values: Any) -> Any:
        """What `auto` stands for as data set: a folder of images is what people have."""
        if isinstance(values, dict) and "dataset" not in values:
            given = values.get("data_dir") or values.get("labels")
            return values | {"dataset": "imagefolder" if given else "digits"}
        return values

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return _height_and_width(self.image_size)

    @property
    def has_default_size(self) -> bool:
        """Whether nobody asked for the size, so that another one may hold."""
        return "image_size" not in self.model_fields_set


def _numbers(value: Any) -> Any:
    """One number alone, and text of the command line, as a list."""
    return value if isinstance(value, list) else _as_list(value) if isinstance(value, str) else [value]


def _one_a_channel(values: list[float]) -> list[float]:
    if len(values) not in (1, 3):
        raise ValueError("must be one number, or one for each of three channels")
    return values


MOST_RESIZED_PX = 4096  # of the short side of an image before it is cropped
PerChannel = Annotated[list[float], BeforeValidator(_numbers), AfterValidator(_one_a_channel)]
AboveZero = Annotated[float, Field(gt=0)]


class PreprocessConfig(BaseModel):
    """How images become the input of a model; what is not given is that of `preprocess`, or of the model's weights."""

    model_config = STRICT
    preprocess: Literal["imagenet"] | None = Field(
        None,
        description="preprocessing by its name; imagenet: resize 256, crop 224, bilinear, mean 0.485,0.456,0.406, std "
        "0.229,0.224,0.225",
    )
    resize: int | None = Field(
        None,
        ge=SIDES_PX[0],
        le=MOST_RESIZED_PX,
        description="length of the short side, pixels, before the middle is cropped; auto: the whole image is resized "
        "to the input's size",
    )
    crop: ImageSize | None = Field(
        None, description="height and width of the crop, pixels: 224, or HEIGHTxWIDTH; auto: image_size"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = Field(
        None, description="interpolation of a resized image, antialiased, as Pillow's; auto: bilinear"
    )
    channels: Literal["rgb", "bgr", "grey"] | None = Field(
        None, description="colours that the network expects, in its order; auto: rgb"
    )
    mean: PerChannel | None = Field(
        None,
        description="subtracted from each channel, on the scale of input_range; auto: of the training images, or with "
        "weights 0",
    )
    std: Annotated[list[AboveZero], BeforeValidator(_numbers), AfterValidator(_one_a_channel)] | None = Field(
        None, description="what each channel is divided by after that; auto: of the training images, or with weights 1"
    )
    input_range: Literal["0,1", "0,255", "-1,1"] | None = Field(
        None, description="values of black and white before mean and std are applied; auto: 0,1"
    )

    @property
    def crop_px(self) -> tuple[int, int] | None:
        """Height and width of the crop."""
        return None if self.crop is None else _height_and_width(self.crop)

    def completed(self) -> "PreprocessConfig":
        """These options, with those that their name stands for where they are not given themselves."""
        if self.preprocess is None:
            return self
        return self.model_copy(update=NAMED[self.preprocess] | self.model_dump(exclude_none=True))


NAMED: dict[str, dict[str, Any]] = {
    "imagenet": {
        "resize": 256,
        "crop": 224,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
}


class TrainConfig(BaseModel):
    model_config = STRICT
    epochs: int = Field(
        20,
        ge=0,
        le=10_000,
        description="passes over the training images, at most; 0, and auto with weights: the model is taken as it is",
    )
    batch_size: int = Field(128, ge=2, le=MOST, description="images a step")
    optimizer: Literal["sgd", "adamw"] | None = Field(
        None, description="optimizer; auto: adamw for networks with layer norm and SqueezeNet, else sgd"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak of the one-cycle schedule; auto: adamw 0.001, sgd 0.2 (deep 0.05, without batch norm 0.03)",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of sgd (plain SGD at 0)")
    weight_decay: float | None = Field(
        None, ge=0, description="L2 penalty of sgd, decoupled decay of adamw; auto: 0.0005 with sgd, 0.05 with adamw"
    )
    clip_norm: float = Field(
        5.0, gt=0, description="norm to which the gradient of all weights is scaled down, if larger"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    crop_padding: int = Field(
        4, ge=0, le=MOST, description="random crop after reflecting so many pixels at each border"
    )
    flip: bool | None = Field(None, description="random horizontal flip; auto: off for digits, else on")
    bf16: bool | None = Field(None, description="bf16 autocast; auto: on where timed steps are faster by a fifth")
    channels_last: bool | None = Field(None, description="channels-last memory layout; auto: as timed steps are faster")
    train_threads: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="CPU threads of training; auto: threads if given, else as timed steps are faster",
    )
    device: Literal["cpu", "cuda"] | None = Field(None, description="where to train; auto: cuda if there is one")
    processes: int = Field(1, ge=1, le=64, description="training processes on this machine, started by torchrun")
    checkpoint_minutes: float = Field(
        5.0, gt=0, description="minutes between checkpoints inside an epoch; each epoch ends with one anyway"
    )
    patience: int = Field(
        6,
        ge=1,
        le=MOST,
        description="epochs without a better validation top-1, or the same with a lower loss, before training stops",
    )


class QuantizeConfig(BaseModel):
    model_config = STRICT
    engine: Engines | None = Field(
        None,
        description="quantization engines, side by side: fx, pt2e, onnx; auto: every one that is installed and takes "
        "the network; the best version is chosen (a search takes fx)",
    )
    backend: Literal["x86", "onednn", "onnxruntime", "openvino", "openvino_bf16"] | None = Field(
        None,
        description="int8 kernels of engine fx (x86, onednn), or runtime of engine onnx (onnxruntime, openvino, or "
        "openvino_bf16, with bf16 where int8 is not used); auto: the fastest, as measured (torch alone takes x86)",
    )
    calibration_samples: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="un-augmented training images that set the ranges; auto: 256, or all if there are fewer",
    )
    calibration_batch_size: int = Field(64, ge=1, le=MOST, description="images a calibration step")
    observer: Annotated[Observer, BeforeValidator(_renamed)] = Field(
        "histogram", description="how activation ranges are chosen: histogram, minmax, batch_average, percentile"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of the activations inside the range of observer percentile, percent"
    )
    per_channel: bool = Field(True, description="one weight scale an output channel instead of one a layer")
    fold_pool: bool | None = Field(
        None,
        description="fold a pool that only enlarges its map (VGG at 32 px) into the linear layer after it: true, in "
        "all versions; false, in none; auto: a second version of each engine, where there is such a pool",
    )
    keep_fp32: Names | None = Field(None, description="layers that stay fp32, by their names in the network")
    allow_float: bool = Field(False, description="accept Conv2d and Linear layers that cannot be quantized")
    max_top1_drop: float | None = Field(
        None,
        ge=0,
        description="budget of quantization: layers go back to fp32 until validation top-1 drops by at most this "
        "(upper end), points; the limit of the verdict is gate.max_top1_drop",
        json_schema_extra={"option": "quantize_max_top1_drop"},
    )
    max_tries: int = Field(10, ge=1, le=MOST, description="quantizations that the budget may cost")
    sensitivity_images: int = Field(
        256,
        ge=0,
        le=MOST,
        description="validation images on which each layer's sensitivity is measured; 0: not measured",
    )

    @property
    def percentile_used(self) -> float | None:
        """The percentile, where the observer has one."""
        return self.percentile if self.observer == "percentile" else None

    @property
    def one_engine(self) -> str:
        """The engine of a single quantization: the only one named, or fx."""
        (engine,) = self.engine or ["fx"]
        return engine

    def only(self, *engines: str) -> "QuantizeConfig":
        """These options with these engines."""
        return self.model_copy(update={"engine": list(engines)})

    def with_folding(self, fold: bool) -> "QuantizeConfig":
        """These options, for a version with or without a pool folded away."""
        return self.model_copy(update={"fold_pool": fold})


def _as_weights(value: Any) -> Any:
    """`1:3,128:1` on the command line; JSON has made text of the numbers of a mapping."""
    if isinstance(value, list):  # of one or more parts, already split at the commas
        value = ",".join(map(str, value))
    if isinstance(value, str):
        pairs = [
            (size.strip(), weight or "1") for size, _, weight in (part.partition(":") for part in value.split(","))
        ]
        weights = [_number(weight) for _, weight in pairs]
        are_positive = all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights)
        if not are_positive or len({size for size, _ in pairs}) < len(pairs):
            raise ValueError("must be batch sizes, each once, with weights above 0, as in 1:3,128:1")
        value = dict(pairs)
    return {_number(key): _number(weight) for key, weight in value.items()} if isinstance(value, dict) else value


def _number(value: Any) -> Any:
    """Text as the number that it stands for; anything else, and text that is no number, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdecimal() else float(value)
    except ValueError:
        return value


Weights = Annotated[
    dict[PositiveInt, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
    Field(min_length=1),
    BeforeValidator(_as_weights),
    AfterValidator(lambda weights: dict(sorted(weights.items()))),
]


DEFAULT_BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


class LatencyConfig(BaseModel):
    model_config = STRICT
    batch_sizes: Counts = Field(
        DEFAULT_BATCH_SIZES,
        description="images a forward pass; if not chosen, large ones may be left out (fit_batch_sizes)",
    )
    fit_batch_sizes: bool | None = Field(
        None,
        description="leave out each batch size from the first one on at which one pass of the slowest model takes "
        "longer than 1 s; auto: on, off where batch_sizes or profile is given",
    )
    baselines: Baselines = Field(
        list(get_args(Baseline)),
        description="timed beside fp32 and int8, or none: fp32_eager, fp32_traced, fp32_onnx, fp32_openvino; bf16 and "
        "bf16_openvino if the CPU has it; fp32_compiled and bf16_compiled if a C++ compiler is there and they are not "
        "slower at the largest batch size",
    )
    profile: Weights | None = Field(
        None, description="how much each batch size counts, 1:3,128:1; those left out do not; auto: all alike"
    )
    threads: Annotated[Counts, BeforeValidator(_numbers)] | None = Field(
        None,
        description="CPU threads on which models are timed, or several numbers, 1,2: the best one for each batch size "
        "is told; auto: threads",
        json_schema_extra={"option": "latency_threads"},
    )
    warmup: int = Field(5, ge=1, le=MOST, description="untimed passes of each model after each load")
    loads: int = Field(5, ge=1, le=MOST, description="loads of all models at each batch size; at least 3 for a verdict")
    min_repeats: int = Field(
        20, ge=2, le=MOST, description="rounds at each batch size, at least; each times every model"
    )
    min_seconds: float = Field(1.0, ge=0, description="seconds of timing at each batch size, at least")
    max_busy_percent: float = Field(
        5.0,
        ge=0,
        le=100,
        description="share of the timed cores that others may take, percent; above it no verdict rests on the times",
    )

    @property
    def fits_batch_sizes(self) -> bool:
        """Whether batch sizes may be left out: as told, or else unless they were chosen."""
        if self.fit_batch_sizes is not None:
            return self.fit_batch_sizes
        chosen = self.batch_sizes not in (DEFAULT_BATCH_SIZES, QUICK["latency"]["batch_sizes"])
        return not chosen and not self.profile


class ThroughputConfig(BaseModel):
    model_config = STRICT
    workers: Annotated[Counts, BeforeValidator(_numbers)] | None = Field(
        None,
        description="numbers of worker processes to try; auto: one, half and all of those that have cores of their own",
    )
    threads_per_worker: Annotated[Counts, BeforeValidator(_numbers)] | None = Field(
        None, description="numbers of CPU threads, and of cores, of each worker to try; auto: 1, 2, 4, … and all"
    )
    load_rounds: int = Field(
        3, ge=1, le=MOST, description="rounds of every configuration, each with new processes; at least 3 for intervals"
    )
    load_seconds: float = Field(
        1.0, gt=0, le=86_400, description="seconds in which the workers compute with one model, in each round"
    )
    max_p99_ms: float | None = Field(
        None, ge=0.001, le=MOST, description="limit of the 99th percentile of a request's time, ms; auto: no limit"
    )
    images_per_second: float | None = Field(
        None, ge=0.001, le=MOST, description="rate for which the number of cores is wanted, images/s; auto: none"
    )


NotNegative = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]


class ModelGate(BaseModel):
    """Limits of one registered model; those left out are the gate's own."""

    model_config = STRICT
    max_top1_drop: float | None = None
    min_size_ratio: NotNegative | None = None
    min_speedup: NotNegative | None = None
    min_top1: Percent | None = None
    min_agreement: Percent | None = None
    champion_top1_margin: NotNegative | None = None
    champion_slowdown_percent: NotNegative | None = None


def _int8_name(name: str) -> str:
    if not name.endswith("-int8") or set(name) & set("*?["):
        raise ValueError("must be the whole name of a registered int8 model, which ends with -int8")
    return name


class GateConfig(BaseModel):
    model_config = STRICT
    max_top1_drop: float = Field(
        2.0,
        description="limit of the verdict: largest drop of test top-1 from fp32 to int8, as the upper end of its "
        "95 % interval, percentage points; the budget of quantization is quantize.max_top1_drop",
    )
    min_size_ratio: float = Field(3.0, ge=0, description="smallest fp32 size over int8 size, as stored")
    min_speedup: float = Field(
        1.0,
        ge=0,
        description="smallest speed-up over the fastest float, as the lower end of its 95 % interval, at each size",
    )
    min_top1: float | None = Field(
        None,
        ge=0,
        le=100,
        description="int8 test top-1 that its 95 % interval must not go below, percent; auto: no such limit",
    )
    min_agreement: float | None = Field(
        None,
        ge=0,
        le=100,
        description="share of the test images for which int8 must name the same class as fp32, as the lower end of its "
        "95 % interval, percent; needs no labels; auto: no such limit",
    )
    champion_top1_margin: float = Field(
        1.0,
        ge=0,
        description="points of top-1 below the champion's that a successor's 95 % interval may reach",
    )
    champion_slowdown_percent: float = Field(
        5.0, ge=0, description="largest slowdown against the champion, as the end of its 95 % interval, percent"
    )
    models: dict[Annotated[str, AfterValidator(_int8_name)], ModelGate] = Field(
        {},
        description="limits of single models instead of those above: {vgg16-cifar10-int8: {max_top1_drop: 0.5}}",
        json_schema_extra={"option": ""},
    )

    def of(self, name: str) -> "GateConfig":
        """The limits that count for a registered model."""
        own = self.models.get(name)
        return self.model_copy(update=own.model_dump(exclude_none=True)) if own else self


class SearchConfig(BaseModel):
    model_config = STRICT
    objective: Literal["top1", "top1+latency", "top1+size"] = Field(
        "top1", description="validation top-1, alone or with p50 latency or size on disk as a second objective"
    )
    sample_counts: Counts = Field([8, 16, 32, 64, 128, 256, 512], description="calibration sample counts to try")
    observers: (
        Annotated[list[Observer], Field(min_length=1), BeforeValidator(_renamed), _in_order_of(Observer)] | None
    ) = Field(None, description="observers to try; auto: the one of quantize.observer")
    weight_scales: Annotated[list[Scale], Field(min_length=1), _in_order_of(Scale)] | None = Field(
        None,
        description="weight scales to try: channel (one a channel), layer (one a layer); auto: as per_channel",
    )
    fp32_layer_counts: Annotated[
        list[Annotated[int, Field(ge=0, le=MOST)]],
        Field(min_length=1),
        AfterValidator(lambda counts: sorted(set(counts))),
    ] = Field([0], description="how many layers stay fp32, most sensitive first, to try; 0: none")
    latency_batch_size: int = Field(1, ge=1, le=MOST, description="batch size at which a trial is timed")
    seeds_per_point: int = Field(3, ge=1, le=MOST, description="calibration subsets drawn for each point")
    sampler: Literal["grid", "tpe", "nsga2"] = Field(
        "grid", description="grid: every point once; tpe, nsga2: Optuna's samplers of these names"
    )
    trials: int = Field(
        20, ge=1, le=MOST, description="trials of tpe and nsga2, over all workers; the grid has its own number"
    )
    study: Text | None = Field(None, description="name of the study; auto: made from the model version and the options")
    study_dir: Folder = Field("studies", description="folder of the study's journal file")
    storage: Text | None = Field(
        None, description="database of a study with several workers, postgresql://USER@HOST/DATABASE; auto: study_dir"
    )
    heartbeat_seconds: int = Field(
        5,
        ge=1,
        le=3600,
        description="seconds between heartbeats of a worker; after six missed ones its trial is redone",
    )
    register_best: bool = Field(False, description="quantize again with the winner, measure and register it")


# What `quick` changes, in words, by the option whose default it takes the place of: values of QUICK.
QUICK_WORDS = {
    "epochs": "4 epochs",
    "sensitivity_images": "64 sensitivity images",
    "batch_sizes": "batch sizes 1, 8, 32",
    "baselines": "baseline fp32_onnx",
    "loads": "6 rounds in 3 loads",
    "load_seconds": "0.3 s of load a round",
    "engine": "the first engine that takes the network",
}


def about_quick(options: Container[str] = QUICK_WORDS) -> str:
    """What `quick` does in a command that has these options."""
    less = ", ".join(words for option, words in QUICK_WORDS.items() if option in options)
    verdict = "; a verdict is still possible" if "loads" in options else ""
    return f"less of everything that is not given: {less}{verdict}"


class Config(BaseModel):
    model_config = STRICT
    model: Model = Field(
        "smallnet",
        description="smallnet, vgg16 or any torchvision classifier by its registered name; timm:NAME; "
        "package.module:factory; a .pt2 or .onnx file",
    )
    weights: Folder | None = Field(
        None,
        description="weights of a model that was trained elsewhere: a file (.pt, .pth, .safetensors), DEFAULT or "
        "another name of torchvision's; auto: none, the model is trained",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of split, weights, augmentation and calibration subset")
    threads: int | None = Field(
        None, ge=1, le=MOST, description="CPU threads of every stage; auto: one a physical core, within the CPU quota"
    )
    output_dir: Folder | None = Field(
        None,
        description="folder that gets a copy of the report (a relative one: below the current folder, which is the "
        "project's under mlflow run); auto: only MLflow has it",
    )
    quick: bool = Field(False, description=about_quick())
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    train: TrainConfig = TrainConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    latency: LatencyConfig = LatencyConfig()
    throughput: ThroughputConfig = ThroughputConfig()
    gate: GateConfig = GateConfig()
    search: SearchConfig = SearchConfig()

    def with_preprocessing(self, height_px: int, width_px: int, options: dict[str, Any]) -> "Config":
        """This configuration with these options of preprocessing in full, for images of this size."""
        size = height_px if height_px == width_px else f"{height_px}x{width_px}"
        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"image_size": size}),
                "preprocess": PreprocessConfig.model_validate(options),
            }
        )

    @property
    def has_weights(self) -> bool:
        """Whether the model comes with weights, and not as an architecture alone."""
        return self.weights is not None or self.model.startswith("models:/") or self.model.endswith((".onnx", ".pt2"))

    @property
    def trained_elsewhere(self) -> bool:
        """Whether the model is taken as it is."""
        return self.train.epochs == 0

    def with_engines(self, *engines: str) -> "Config":
        """This configuration with these engines."""
        return self.model_copy(update={"quantize": self.quantize.only(*engines)})

    def with_training(self, options: dict[str, Any]) -> "Config":
        """This configuration with these options of training."""
        return self.model_copy(update={"train": self.train.model_copy(update=options)})


# What `quick` puts in the place of defaults: at least 3 loads and 6 rounds, so that a verdict is still possible.
QUICK: dict[str, dict[str, Any]] = {
    "train": {"epochs": 4},
    "quantize": {"sensitivity_images": 64},
    "latency": {
        "batch_sizes": [1, 8, 32],
        "baselines": ["fp32_onnx"],
        "warmup": 2,
        "loads": 3,
        "min_repeats": 6,
        "min_seconds": 0.0,
    },
    "throughput": {"load_seconds": 0.3},
}


def option_name(section: str, key: str) -> str:
    """The command line's name of a field, with underscores: its key, unless two sections have the same key; empty for
    what only the file can say."""
    owner = type(Config.model_fields[section].default) if section else Config
    return str((owner.model_fields[key].json_schema_extra or {}).get("option", key))  # type: ignore[union-attr]


def by_section(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by their names on the command line, with underscores, as `load_config` takes them.

    Raises:
        InputError: there is no such option.
    """
    places = {
        name: ("", name) for name, field in Config.model_fields.items() if not isinstance(field.default, BaseModel)
    }
    for section, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            places |= {option_name(section, key): (section, key) for key in type(field.default).model_fields}
    found: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in places or not name:
            near = difflib.get_close_matches(name, places, n=3)
            raise InputError(f"{name}: no such option" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        section, key = places[name]
        if value is not None:
            found.setdefault(section, {})[key] = value
    return found


def load_config(path: str | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """The configuration: defaults < the YAML file at `path` < `overrides`.

    Args:
        path: a YAML file; None takes `config.yaml` of the current folder if it is there, NO_FILE no file.
        overrides: text from the command line by section and key; top-level keys are in section "".

    Where `quick` is true, QUICK takes the place of what neither `overrides` nor the file (with a value other than the
    default) has given.

    Raises:
        InputError: unknown key, wrong type or value out of range, naming key, value and what is allowed.
    """
    values = _read_file(path)
    if values.get("data", {}).get("image_size") == DataConfig.model_fields["image_size"].default:
        del values["data"]["image_size"]  # as every option stands in config.yaml: it asks for nothing
    given = parse_options(overrides or {})
    for section, options in given.items():
        (values if section == "" else values.setdefault(section, {})).update(options)
    for own in values.get("gate", {}).get("models", {}).values():  # the command line wins over these too
        for key in set(own) & set(given.get("gate", {})):
            del own[key]
    if "batch_sizes" in given.get("latency", {}):  # chosen, even if they are the default's
        values["latency"].setdefault("fit_batch_sizes", False)
    config = Config.model_validate(values, strict=True)  # both parts were checked; together they cannot fail
    config = _with_size_of_crop(config, given.get("data", {}))
    config = _quicker(config, given) if config.quick else config
    asked = "epochs" in given.get("train", {}) or values.get("train", {}).get("epochs", 20) != 20
    return config if asked or not config.has_weights else config.with_training({"epochs": 0})


def _with_size_of_crop(config: Config, given: dict[str, Any]) -> Config:
    """`config` with the crop as the size of the input, where that was not given.

    Raises:
        InputError: both were, and differ.
    """
    crop, size = config.preprocess.completed().crop, config.data.image_size
    if crop is None or crop == size:
        return config
    if "image_size" in given or not config.data.has_default_size:
        named = "" if config.preprocess.crop else f" of --preprocess {config.preprocess.preprocess}"
        raise InputError(f"--image-size {size}: must be that of --crop, {crop}{named}; leave one of them out")
    return config.model_copy(update={"data": config.data.model_copy(update={"image_size": crop})})


def _quicker(config: Config, given: dict[str, dict[str, Any]] | None = None) -> Config:
    """`config` with the values of QUICK wherever it has the default that is not in `given`. A batch size that counts in
    the profile is timed as well."""
    sections: dict[str, BaseModel] = {}
    for section, quick in QUICK.items():
        options = getattr(config, section)
        left = {key: value for key, value in quick.items() if is_default(config, section, key)}
        left = {key: value for key, value in left.items() if key not in (given or {}).get(section, {})}
        if section == "latency" and "batch_sizes" in left:
            left["batch_sizes"] = sorted({*left["batch_sizes"], *(options.profile or {})})
        sections[section] = options.model_copy(update=left)
    return config.model_copy(update=sections)


def is_default(config: Config, section: str, key: str) -> bool:
    """Whether an option of a section has its default value."""
    options = getattr(config, section)
    return bool(getattr(options, key) == type(options).model_fields[key].default)


def _read_file(path: str | None) -> dict[str, Any]:
    if path == NO_FILE:
        return {}
    file = Path(os.path.expanduser(path or "config.yaml"))
    if path is None and not os.path.lexists(file):
        return {}
    return _checked(yaml_file.read_text(file), shown(file, MOST_OF_A_PATH))


def parse_yaml(text: str) -> Config:
    """The configuration in `text`, as `to_yaml` writes it."""
    return Config.model_validate(_checked(text, "config.yaml"), strict=True)


def _checked(text: str, file: str) -> dict[str, Any]:
    """What `text` says, once it is known that it is a configuration; `file` is what messages call it."""
    values = _without_auto(yaml_file.parse(text, file))
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
    place = error["loc"] or (error["input"],)  # nowhere: a key that is no text in UTF-8
    path = [shown(part) for part in place if not isinstance(part, int)] or [shown(place[0])]
    section = path[0] if len(path) > 1 else ""
    key = ".".join(path)
    if separator == "-":  # of the command line, where no key is unknown
        key = option_name(section, path[1] if section else path[0]).replace("_", "-")
    if error["type"] == "extra_forbidden":
        fields = _fields_of(path[:-1])
        return f"{prefix}{key}: unknown key; allowed here: {', '.join(fields)}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("'", "")
    message = message.partition(", unable to parse")[0].partition(" or instance of")[0]
    message = "must be a valid boolean, true or false" if error["type"].startswith("bool") else message
    value = error["input"]
    if separator == "-" and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ",".join(value)  # as it was written
    return f"{prefix}{key}{equals}{shown(value)}: {message}"


def _fields_of(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path[:2]:
        default = model.model_fields[part].default
        model = ModelGate if isinstance(default, dict) else type(default)
    return list(model.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as text that `load_config` reads back."""
    values = config.model_dump(mode="json")
    return yaml.dump(_auto_named(values), Dumper=yaml_file.Dumper, sort_keys=False)


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
    neutral = _quicker(Config(quick=True)) if given.quick else Config()
    asked, made, default = (flat_params(config) for config in (given, recorded, neutral))
    return [(name, value, made[name]) for name, value in asked.items() if value not in (default[name], made[name])]
