"""The Python API: thin functions over what the commands call too, for modules and images of one's own.

They check what they are given, and hand it to `quantize_model`, `compare_models`, `measure_latency`, `measure_cost` and
`tracking.registry`. MLflow is imported where a model is registered or loaded, and not before.

Images are [N, 3, H, W], uint8 or float in [0, 1]. A model is an `nn.Module` that takes float images in [0, 1] and gives
logits [N, classes]: what normalises images belongs into it. Modules are used in evaluation mode on the CPU, and are
given back as they were. Whatever is wrong with an argument is a `qexp.errors.InputError` (a ValueError) of one line;
where a stage cannot do its work, that is a `qexp.errors.StageError` (a RuntimeError).
"""

import copy
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from qexp.config import (
    NO_FILE,
    Config,
    DataConfig,
    LatencyConfig,
    PreprocessConfig,
    QuantizeConfig,
    by_section,
    load_config,
)
from qexp.errors import InputError, StageError, as_arguments, first_line
from qexp.foundation.waiting import waiting, waiting_as
from qexp.measurement.accuracy import ComparedModels, compare_models, predict_logits
from qexp.measurement.activity import watch_machine
from qexp.measurement.cost import Cost, measure_cost
from qexp.measurement.host import check_bf16
from qexp.measurement.latency import AGAIN, LatencyResult, Run, measure_latency
from qexp.models.classifier import ModelSpec
from qexp.models.names import BY_OPENVINO, OPENVINO_BF16, RUNTIMES
from qexp.models.preprocessing import Preprocessing, Shape, preprocessing_of, size_text
from qexp.models.taken import wrap
from qexp.pipeline.checks import model_options
from qexp.quantization import KERNELS, QuantizedModel, quantize_model
from qexp.tracking.limits import check_names

if TYPE_CHECKING:
    from qexp.pipeline.checked import Checked

Images: TypeAlias = Tensor | Iterable[Any]
Size: TypeAlias = int | tuple[int, int] | tuple[int, int, int]
Predict: TypeAlias = Callable[[Tensor], Tensor]
Options = TypeVar("Options", bound=BaseModel)
CALIBRATION_IMAGES = 256  # as the commands take, where they are not told
VERIFY_IMAGES = 64
NOT_OPTIONS = ("baselines", "threads")  # of LatencyConfig: models and threads are arguments of `benchmark`
ONNX_CLASSIFIERS = ("OnnxClassifier", "OpenvinoClassifier")
WITH_LABELS = ("max_top1_drop", "max_tries", "sensitivity_images")  # options of the command, which has labels

Function = TypeVar("Function", bound=Callable[..., Any])


def _in_words_of_python(function: Function) -> Function:
    """`function`, whose errors name arguments instead of the command line's options, which what it calls knows."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (InputError, StageError) as error:
            error.args = (as_arguments(str(error)),)
            raise

    return called  # type: ignore[return-value]


class _Times(LatencyResult):
    """What `benchmark` returns: its shortcomings name arguments, too."""

    @property
    def shortcomings(self) -> tuple[str, ...]:
        return tuple(map(as_arguments, super().shortcomings))


@_in_words_of_python
def quantize(
    model: nn.Module,
    images: Images,
    engine: Literal["fx", "pt2e", "onnx"] = "fx",
    *,
    reduce_range: bool | None = None,
    **options: Any,
) -> QuantizedModel:
    """Quantize a classifier after training; `model` stays as it is.

    Args:
        model: fp32, float images [N, 3, H, W] in [0, 1] to logits [N, classes].
        images: for calibration, not augmented: uint8 or float in [0, 1], a tensor [N, 3, H, W], or an iterable of
            batches, also of pairs (images, labels) as a DataLoader gives them. At most `calibration_samples` count:
            of a tensor evenly spaced ones, of an iterable the first.
        engine: "fx" (torch, TorchScript file), "pt2e" (torchao, TorchScript file; extra `pt2e`), or "onnx" (ONNX
            Runtime, .onnx file; extra `onnx`).
        reduce_range: leave one bit of all weights unused; None: where int8 products saturate on this CPU.
        options: those of the commands, checked in the same way: `observer` ("histogram", "minmax", "batch_average",
            "percentile"), `percentile`, `per_channel`, `keep_fp32` (names of layers), `allow_float` (accept Conv2d and
            Linear layers that cannot be quantized), `fold_pool`, `backend` (with engine fx "x86" or "onednn", with onnx
            "onnxruntime", "openvino", or "openvino_bf16", which computes in bf16 what is not int8),
            `calibration_samples` (256), `calibration_batch_size` (64 images).

    Returns:
        The int8 model: float images to float logits when called, with `int8_layers`, `float_layers`, `size_bytes`,
        `save(file)`.

    Raises:
        InputError: unknown engine, option or layer; images of another shape or range, or none; the model does not take
            them; a package of the engine is not installed.
        StageError: the engine cannot quantize the model, or a layer stayed fp32 that was not to.
    """
    settings = _quantize_options(engine, options)
    calibration = _calibration(images, settings.calibration_samples or CALIBRATION_IMAGES)
    with _evaluated(model) as module:
        _check_model(module, calibration[:2])
        made = quantize_model(module, calibration, settings, reduce_range)
    if settings.backend not in BY_OPENVINO:
        return made
    return made.in_openvino(bf16=settings.backend == OPENVINO_BF16)


@_in_words_of_python
def compare(model: Predict, int8: Predict, images: Images, labels: Any = None) -> ComparedModels:
    """The accuracy of both models on the same images, and how they differ image by image.

    Args:
        model: the fp32 model: a module, or another function of float images in [0, 1].
        int8: the int8 model, as `quantize` or `load` returns it.
        images: uint8 or float in [0, 1], a tensor [N, 3, H, W] or an iterable of batches, which is read once, batch by
            batch.
        labels: class numbers [N], a tensor or a sequence; None where `images` gives pairs (images, labels).

    Returns:
        Top-1 and top-3 of both in percent, the drop in points with its 95 % interval, the images that only one of them
        gets right, and how often both name the same class.

    Raises:
        InputError: images of another shape or range, or none; labels of another number or range.
    """
    logits: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    with _evaluated(model) as fp32, _evaluated(int8) as quantized:
        for batch, of_batch in _batches(images):
            if not logits:
                _check_models(fp32, quantized, batch[:1])
            logits.append((predict_logits(fp32, batch), predict_logits(quantized, batch)))
            if labels is None:
                given.append(_labels(of_batch))
    first, second = (torch.cat(found) for found in zip(*logits, strict=True))
    truth = torch.cat(given) if labels is None else _labels(labels)
    _check_labels(truth, first)
    return compare_models(first, second, truth)


@_in_words_of_python
def benchmark(
    models: Mapping[str, Predict],
    image_size: Size,
    batch_sizes: Sequence[int] = (1, 8),
    *,
    threads: int | None = None,
    **options: Any,
) -> LatencyResult:
    """Time models in turns in this process, at each batch size; they are loaded anew several times for it.

    The commands do the same in a clean subprocess. int8 models are loaded from their stored form, modules are copied,
    other functions are called as they are.

    Args:
        models: by the names that the result uses; the first is what speed-ups refer to.
        image_size: of the images, in pixels: one number for squares of three channels, (height, width), or (channels,
            height, width) with 1 or 3 channels.
        batch_sizes: images a forward pass.
        threads: CPU threads; None: as many as torch has now.
        options: `loads` (5), `min_repeats` (20 rounds a batch size), `min_seconds` (1.0 a batch size), `warmup` (5
            passes), `max_busy_percent` (5: above it, `shortcomings` says that the machine was busy), `profile` (how
            much each batch size counts).

    Returns:
        Medians and percentiles in ms, images a second, speed-ups with 95 % intervals, and as noise one of the models
        against its own copy.

    Raises:
        InputError: no model; an option that is unknown or out of range; a model does not take images of this size.
    """
    if not isinstance(models, Mapping) or not models or AGAIN in models:
        raise InputError(f"models: must be models by name, one at least, none of them named {AGAIN!r}")
    settings = _checked(LatencyConfig, "benchmark", {"batch_sizes": list(batch_sizes)} | options, NOT_OPTIONS)
    shape = _shape(image_size)
    before = torch.get_num_threads()
    baseline, repeated = next(iter(models)), _first_int8(models)
    with torch.no_grad():
        try:
            torch.set_num_threads(_threads(threads) or before)
            with _all_evaluated(models) as modules:
                for name, module in modules.items():
                    _check_model(module, torch.zeros(min(settings.batch_sizes), *shape), name)
                prepare = partial(_load_anew, modules, repeated, shape)
                watch = partial(watch_machine, torch.get_num_threads())
                rows = measure_latency(prepare, baseline, repeated, settings, watch=watch)
                used = torch.get_num_threads()
        finally:
            torch.set_num_threads(before)
    return _Times(baseline, rows, (), used, settings.profile or {}, settings.max_busy_percent)


@_in_words_of_python
def cost(
    model: nn.Module | QuantizedModel,
    image_size: Size,
    *,
    int8: QuantizedModel | Sequence[str] = (),
    batch_sizes: Sequence[int] = (1,),
) -> Cost:
    """Parameters, multiply-accumulates of a forward pass, and how many of them run in int8.

    Args:
        model: an fp32 module; of an int8 model, what it was made from is counted, with its int8 layers.
        image_size: of the images, in pixels: one number for squares of three channels, (height, width), or (channels,
            height, width) with 1 or 3 channels.
        int8: an int8 model of `model`, or the names of the layers that run in int8.
        batch_sizes: images a forward pass.

    Raises:
        InputError: `model` is no module, or does not take images of this size; `int8` names a layer that it lacks.
    """
    shape = _shape(image_size)
    sizes = _checked(LatencyConfig, "cost", {"batch_sizes": list(batch_sizes)}).batch_sizes
    _check_kind(model)
    source = model.source if isinstance(model, QuantizedModel) else model
    made = model if isinstance(model, QuantizedModel) and not int8 else int8
    layers = made.int8_layers if isinstance(made, QuantizedModel) else tuple(made)
    with _evaluated(source) as module:
        known = dict(module.named_modules())
        # The first projection of attention is a layer once the model has been cleaned up.
        unknown = [name for name in layers if name not in known and name.removesuffix(".in_proj") not in known]
        if unknown and not isinstance(made, QuantizedModel):  # whose layers may be functions in a `forward`
            raise InputError(f"int8: the model has no layer {', '.join(unknown)}")
        _check_model(module, torch.zeros(1, *shape))
        return measure_cost(module, shape, sizes, layers)


@_in_words_of_python
def register(
    model: nn.Module | QuantizedModel,
    name: str,
    *,
    classes: Sequence[str],
    image_size: Size | None = None,
    **preprocessing: Any,
) -> str:
    """Register a model in MLflow's registry, and verify that it reloads bit for bit in a clean subprocess.

    It is logged in the active MLflow run, or in a new one of the active experiment, to the store that
    MLFLOW_TRACKING_URI names. `load`, `mlflow.pytorch.load_model`, `qexp predict`, `qexp models` and `qexp check` take
    the version; the commands that train, quantize, time or promote do not: they need a training run and its data, which
    it lacks.

    Args:
        model: an fp32 module, stored as an exported program, or what `quantize` returns.
        name: of the registered model, by convention MODEL-DATA-fp32 or MODEL-DATA-int8.
        classes: their names, in the order of the logits.
        image_size: of the images, in pixels: one number for squares of three channels, (height, width), or (channels,
            height, width) with 1 or 3 channels; None: that of the crop.
        preprocessing: how a file becomes the image that the model is given, as options of the commands: `preprocess`
            ("imagenet"), `resize`, `crop`, `interpolation`, `channels`. What changes the values, `mean`, `std`,
            `input_range` and channels "bgr", becomes the first layer of the registered model, which takes images in
            [0, 1]; an int8 model has that inside already.

    Returns:
        The version's URI, models:/NAME/VERSION. Its tag `verified` is false, and a line on standard error says why,
        where it does not reload bit for bit.

    Raises:
        InputError: MLflow takes no such name; the model gives another number of logits, or does not take images of
            this size; options of the preprocessing contradict each other; the store does not answer.
        StageError: the model cannot be stored.
    """
    wanted, names = _preprocessing(image_size, preprocessing), tuple(str(one) for one in classes)
    check_names(name, names)
    sample = torch.randint(0, 256, (VERIFY_IMAGES, *wanted.shape), generator=torch.Generator().manual_seed(0))
    sample = sample.to(torch.uint8)
    _check_kind(model)
    kind = "int8" if isinstance(model, QuantizedModel) else "fp32"
    spec = ModelSpec(name.removesuffix(f"-{kind}"), names, wanted)
    changes = wanted.changes_values
    if changes and isinstance(model, QuantizedModel):
        raise InputError("model: an int8 model has mean, std, input_range and bgr inside already; leave them out")
    with _evaluated(model) as module:
        if changes:
            module = wrap(copy.deepcopy(module), spec)
        logits = _check_model(module, sample[:2])
        if logits.shape[1] != len(names):
            raise InputError(f"classes: {len(names)} names, but the model gives {logits.shape[1]} logits")
        from qexp.tracking import own_models

        if isinstance(model, QuantizedModel):
            return own_models.register(kind, model.as_by_mlflow(), name, spec, sample, model.tags(), model.stored)
        return own_models.register(kind, module, name, spec, sample, {}, copy.deepcopy(module))


@_in_words_of_python
def check(
    model: nn.Module | str | PathLike[str],
    data: str | PathLike[str] | None = None,
    *,
    architecture: str | None = None,
    name: str | None = None,
    register: bool = True,
    **options: Any,
) -> "Checked":
    """Whether a classifier that was trained elsewhere can ship as int8 on this CPU: `qexp check` in Python.

    It is quantized, both models are evaluated on the test images and timed, the gate decides; the table and the verdict
    are printed.

    Args:
        model: a module (float images [N, C, H, W] in [0, 1], normalised by `mean` and `std` if these are given, to
            logits [N, classes]), a file of weights (with `architecture`), FILE.onnx, FILE.pt2, or models:/NAME/VERSION.
        data: a folder with DIR/test/<class>/ or DIR/val/<class>/, and DIR/train/<class>/ for calibration unless
            `calibration_dir` is given.
        architecture: of a file of weights: a torchvision classifier, timm:NAME or package.module:factory.
        name: of the model in the registry and the report; None: that of the class or the file.
        register: put both models into MLflow's registry, in the store that MLFLOW_TRACKING_URI names; False needs no
            MLflow server or database.
        options: those of the command, with `_` for `-`: `preprocess="imagenet"`, `image_size=224`, `engine=["fx"]`,
            `calibration_dir=…`, `batch_sizes=[1, 8]`, `quick=True`, …

    Returns:
        The answer: `verdict` with its word and reason, `evidence` with every figure. It prints as a table, and shows as
        HTML in a notebook.

    Raises:
        InputError: the model, its weights, the images or an option cannot be used.
        StageError: no engine could quantize the model, or the store fails.
    """
    config, module = _job(model, data, architecture, name, options | {"epochs": 0})
    return _checked_by(config, register, module)


@_in_words_of_python
def run(
    model: nn.Module | str | PathLike[str],
    data_dir: str | PathLike[str] | None = None,
    *,
    architecture: str | None = None,
    name: str | None = None,
    register: bool = True,
    **options: Any,
) -> "Checked":
    """The whole job: `qexp run` in Python. A model that has weights is taken as it is, as by `check`, and with `epochs`
    it is trained from them on; an architecture alone is trained.

    Args:
        model: as for `check`, or the name of an architecture, which `weights` may be given for. A version that qexp
            has registered brings its data, its preprocessing and its training.
        data_dir: a folder of images; None: the data set that `dataset` names, or that of the version.
        architecture, name: as for `check`.
        register: as for `check`; what is trained is always registered.
        options: those of the command, with `_` for `-`: `weights="best.pt"`, `dataset="cifar10"`, `epochs=20`, …

    Returns:
        The answer, as `check` gives it.

    Raises:
        InputError, StageError: as `check`; or the training fails.
    """
    config, module = _job(model, data_dir, architecture, name, options)
    if not (config.trained_elsewhere or register):
        raise InputError("register=False: only for a model that is taken as it is; what is trained is registered")
    return _checked_by(config, register, module)


def _job(
    model: Any, data: Any, architecture: str | None, name: str | None, options: dict[str, Any]
) -> tuple[Config, nn.Module | None]:
    """The configuration that `check` and `run` stand for, and the module if the model is one."""
    given = dict(options)
    module = model if isinstance(model, nn.Module) else None
    if module is None and name is not None:
        raise InputError(f"name={name!r}: only a module has no name of its own")
    if module is not None:
        given["model"] = name or type(module).__name__.lower()
    elif isinstance(model, str | PathLike):
        may_train = given.get("epochs") != 0
        given |= model_options(os.fspath(model), architecture, given.get("weights"), may_train)
    else:
        raise InputError(f"model: must be an nn.Module, a file or the name of a model, and is {type(model).__name__}")
    if module is not None or given["model"].startswith("models:/"):
        if given.setdefault("epochs", 0) != 0:
            raise InputError(f"epochs={given['epochs']}: must be left out; the model is taken as it is")
        if given.get("weights") is not None:
            raise InputError(f"weights={given['weights']}: must be left out; the model has its weights inside")
    if data is not None:
        given["data_dir"] = os.fspath(data)
    return load_config(NO_FILE, by_section(given)), module


def _checked_by(config: Config, register: bool, module: nn.Module | None) -> "Checked":
    """What the whole job finds, printed."""
    from qexp.pipeline.check import check as whole
    from qexp.pipeline.checked import Checked

    with waiting_as(waiting()):  # the job changes it
        done = whole(config, register, module)
    assert done is not None  # no other process does the work
    found = Checked(done.evidence, done.run_id, done.report_uri)
    print(found)
    return found


@_in_words_of_python
def load(uri: str, runtime: Literal["onnxruntime", "openvino", "openvino_bf16"] | None = None) -> Predict:
    """The registered model at `uri` as a function of images, with the int8 kernels that won when it was measured.

    `mlflow.pytorch.load_model(uri)` gives the same outputs; this sets the engine recorded in the version's tags first,
    because TorchScript packs int8 weights at load, for whatever engine the process has chosen. A version of engine
    `onnx` is run by the runtime that won, ONNX Runtime or OpenVINO, on as many threads as torch. OpenVINO compiles it
    when it first sees a batch size.

    Args:
        uri: models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS.
        runtime: of an ONNX file, whichever won ("openvino_bf16": OpenVINO, which computes in bf16 what is not int8);
            None: the one that won, or ONNX Runtime where OpenVINO won and is not installed, or fp32 where bf16 won and
            this CPU has none.

    Returns:
        Float images [N, 3, H, W] in [0, 1] to float logits [N, classes]. A version of engine `onnx` also takes numpy
        arrays and uint8.

    Raises:
        InputError: the URI has another form or does not exist, there is no such runtime, the version is no ONNX file
            and has none, or the extra `onnx` or `openvino` is needed and not installed.
        StageError: MLflow was told to load nothing like it.
    """
    from qexp.tracking.registry import load_version

    if runtime not in (None, *RUNTIMES):
        raise InputError(f"runtime={runtime!r}: must be one of {', '.join(RUNTIMES)}")
    return load_version(uri, runtime)


def _quantize_options(engine: str, options: dict[str, Any]) -> QuantizeConfig:
    given = {"engine": engine} | options
    if not isinstance(given["engine"], str) or "," in given["engine"]:
        raise InputError(f"engine={engine!r}: must be one of fx, pt2e, onnx")
    settings = _checked(QuantizeConfig, "quantize", given, WITH_LABELS)
    if settings.backend and settings.backend not in KERNELS[engine]:
        has = ", ".join(one for one in KERNELS[engine] if one)
        allowed = f"must be one of {has} with engine {engine}" if has else f"engine {engine} has no choice of kernels"
        raise InputError(f"backend={settings.backend!r}: {allowed}")
    if settings.backend == OPENVINO_BF16:
        check_bf16(f"backend={settings.backend!r}")
    return settings


def _checked(kind: type[Options], function: str, given: dict[str, Any], left_out: Sequence[str] = ()) -> Options:
    """Options of a function, checked by the model of the configuration; `left_out` are those that it does not have."""
    allowed = [name for name in kind.model_fields if name not in left_out]
    if unknown := [name for name in given if name not in allowed]:
        raise InputError(f"{unknown[0]}: no option of qexp.{function}, which has {', '.join(allowed)}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].replace("Input should be", "must be").partition(", unable to parse")[0]
        raise InputError(f"{first['loc'][0]}={first['input']!r}: {message}") from None


def _check_kind(model: Any) -> None:
    # What `load` gives of an ONNX file are modules without layers; what they need may not be installed.
    if not isinstance(model, nn.Module | QuantizedModel) or type(model).__name__ in ONNX_CLASSIFIERS:
        raise InputError(f"model: must be an nn.Module or what qexp.quantize returns, and is {type(model).__name__}")


def _shape(value: Any) -> Shape:
    """Channels, height and width of what one number for squares, two numbers, or three of them mean."""
    sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, tuple | list) else []
    found = sides if len(sides) == 3 else [3, *sides]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in found)
    if len(found) != 3 or not whole or found[0] not in (1, 3):
        allowed = "must be a number of pixels, 1 or more, (height, width) or (1 or 3 channels, height, width)"
        raise InputError(f"image_size={value!r}: {allowed}")
    return found[0], found[1], found[2]


def _preprocessing(image_size: Size | None, options: dict[str, Any]) -> Preprocessing:
    """What `register` was told of the images."""
    given = _checked(PreprocessConfig, "register", options).completed()
    if image_size is None:
        if given.crop_px is None:
            raise InputError("image_size=None: must be given, unless there is a crop")
        return preprocessing_of(DataConfig(), given)
    shape = _shape(image_size)
    if shape[0] == 1:
        given = given.model_copy(update={"channels": given.channels or "grey"})
    data = DataConfig.model_construct({"image_size"}, image_size=size_text(*shape[1:]))
    found = preprocessing_of(data, given)
    if found.shape != shape:
        raise InputError(f"image_size={image_size!r}: must be {found.shape}, as the preprocessing says, or left out")
    return found


def _threads(value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"threads={value!r}: must be a number, 1 or more")
    return value


def _batches(images: Images) -> Iterator[tuple[Tensor, Any]]:
    """Batches of checked images with the labels that came with them (None without); one batch of a tensor."""
    if isinstance(images, Tensor):
        yield _checked_images(images), None
        return
    if not isinstance(images, Iterable):
        raise InputError(f"images: must be a tensor or an iterable of batches, and are {type(images).__name__}")
    found = False
    for item in images:
        batch, labels = [*item, None][:2] if isinstance(item, tuple | list) else (item, None)
        if not isinstance(batch, Tensor):
            raise InputError(f"images: a batch must be a tensor, or begin with one, and is {type(batch).__name__}")
        found = True
        yield _checked_images(batch), labels
    if not found:
        raise InputError("images: there are none")


def _checked_images(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            f"images: must have the shape [N, 3, H, W], or [N, 1, H, W] if they are grey, and have {list(images.shape)}"
        )
    if images.numel() == 0:
        raise InputError("images: there are none")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"images: must be uint8, or float in [0, 1], and are {images.dtype}")
    low, high = (end.item() for end in images.aminmax())  # with a NaN, both are
    if not (0 <= low and high <= 1):
        raise InputError(f"images: floats must be in [0, 1], and are from {low:.4g} to {high:.4g}")
    return images.float()


def _calibration(images: Images, count: int) -> Tensor:
    """At most `count` images: of a tensor evenly spaced ones, since it may be sorted by class."""
    if isinstance(images, Tensor):
        found = _checked_images(images)
        return found[torch.linspace(0, len(found) - 1, count).round().long()] if len(found) > count else found
    parts: list[Tensor] = []
    for batch, _ in _batches(images):
        if parts and (batch.shape[1:] != parts[0].shape[1:] or batch.dtype != parts[0].dtype):
            first, other = ([str(part.dtype), list(part.shape[1:])] for part in (parts[0], batch))
            raise InputError(f"images: batches must be alike, and are {first} and {other}")
        parts.append(batch)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _labels(labels: Any) -> Tensor:
    if labels is None:
        raise InputError("labels: must be given, unless images are batches of pairs (images, labels)")
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: must be class numbers ({first_line(error)})") from None
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"labels: must be class numbers [N], and are {found.dtype} {list(found.shape)}")
    return found.long()


def _check_models(fp32: Any, int8: Any, images: Tensor) -> None:
    first, second = _check_model(fp32, images, "model"), _check_model(int8, images, "int8")
    if first.shape != second.shape:
        raise InputError(f"int8: gives {second.shape[1]} logits, and the model {first.shape[1]}")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if len(labels) != len(logits):
        raise InputError(f"labels: there are {len(labels)}, for {len(logits)} images")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        allowed = f"0 to {logits.shape[1] - 1}"
        raise InputError(f"labels: must be {allowed}, and are from {int(labels.min())} to {int(labels.max())}")


@contextmanager
def _evaluated(model: Any) -> Iterator[Any]:
    """The model as it is evaluated: a module in evaluation mode and on the CPU, for which one elsewhere is copied."""
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise InputError(f"model: must be an nn.Module or a function of images, and is {type(model).__name__}")
        yield model
        return
    if any(tensor.device.type != "cpu" for tensor in chain(model.parameters(), model.buffers())):
        model = copy.deepcopy(model).cpu()
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


@contextmanager
def _all_evaluated(models: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(_evaluated(model)) for name, model in models.items()}


def _check_model(model: Any, images: Tensor, name: str = "model") -> Tensor:
    """The model's logits of a few images; InputError where it does not take them, or gives something else."""
    if isinstance(model, QuantizedModel):
        model = model.module
    try:
        logits = predict_logits(model, images)
    except Exception as error:  # of the model's own code
        raise InputError(f"{name}: does not take images {list(images.shape)} ({first_line(error)})") from None
    if logits.dim() != 2 or len(logits) != len(images):
        raise InputError(f"{name}: must give logits [N, classes], and gives {list(logits.shape)}")
    return logits


def _first_int8(models: Mapping[str, Predict]) -> str:
    """What is measured against its own copy: the first int8 model, or the last of all."""
    return next((name for name, model in models.items() if isinstance(model, QuantizedModel)), list(models)[-1])


def _load_anew(models: Mapping[str, Any], repeated: str, shape: Shape, batch_size: int) -> dict[str, Run]:
    """The calls to time at a batch size, on models that lie elsewhere in memory than those of before."""
    images = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(batch_size))
    runs: dict[str, Run] = {}
    for name, model in (*models.items(), (AGAIN, models[repeated])):
        runs[name] = partial(_anew(model), images)
    return runs


def _anew(model: Any) -> Any:
    if isinstance(model, QuantizedModel):
        return model.reloaded()
    if isinstance(model, torch.jit.ScriptModule):  # whose packed weights cannot be copied
        buffer = io.BytesIO()
        torch.jit.save(model, buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model
