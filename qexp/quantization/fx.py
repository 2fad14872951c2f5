"""FX graph mode quantization, then TorchScript traced and frozen, so that the int8 model loads without qexp.

Method: https://docs.pytorch.org/docs/2.13/quantization.html (post-training static, FX graph mode).
"""

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from qexp.config import QuantizeConfig
from qexp.errors import StageError, first_line
from qexp.quantization.result import QuantizedModel, QuantizeResult

OBSERVERS: dict[str, Any] = {
    "histogram": HistogramObserver,
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
}


def quantize(model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    """See `qexp.quantization.quantize_model`."""
    started = time.monotonic()
    with _kernels(options.backend), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao.quantization and torch.jit announce their successors on every call
        converted = _calibrate_and_convert(model, images, options, reduce_range)
        int8_layers, float_layers = _layers_by_type(model, converted)
        module = _trace(converted, images[:2].float() / 255)
    result = QuantizeResult(
        engine="fx",
        backend=options.backend,
        observer=options.observer,
        per_channel=options.per_channel,
        reduce_range=reduce_range,
        calibration_images=len(images),
        int8_layers=int8_layers,
        float_layers=float_layers,
        duration_s=time.monotonic() - started,
        load_backend=options.backend,
    )
    return QuantizedModel(module, result)


def _calibrate_and_convert(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool
) -> fx.GraphModule:
    try:
        mapping = _qconfig_mapping(options, reduce_range)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (images[:2].float() / 255,))
        for batch in images.split(options.calibration_batch_size):
            prepared(batch.float() / 255)
        return convert_fx(prepared)
    except Exception as error:  # tracing raises whatever the model's Python code does when it meets a symbol
        raise StageError(f"engine fx cannot quantize this model: {first_line(error)}") from error


def _trace(converted: fx.GraphModule, example: Tensor) -> torch.jit.ScriptModule:
    try:
        return torch.jit.freeze(torch.jit.trace(converted, example, check_trace=False).eval())
    except Exception as error:  # an operation for which there is no int8 kernel
        raise StageError(f"engine fx quantized this model, but it does not run: {first_line(error)}") from error


@contextmanager
def _kernels(backend: str) -> Iterator[None]:
    """Pack weights for `backend` inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _qconfig_mapping(options: QuantizeConfig, reduce_range: bool) -> QConfigMapping:
    """Torch's default mapping (operations with fixed ranges included) with our observers in place of its own."""
    weight_observer: Any = PerChannelMinMaxObserver if options.per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if options.per_channel else torch.per_tensor_symmetric
    qconfig = QConfig(
        activation=OBSERVERS[options.observer].with_args(dtype=torch.quint8, reduce_range=reduce_range),
        weight=weight_observer.with_args(dtype=torch.qint8, qscheme=scheme),
    )
    mapping = get_default_qconfig_mapping(options.backend).set_global(qconfig)
    for pattern, default in list(mapping.object_type_qconfigs.items()):
        if default is not None and not _has_fixed_range(default):
            mapping.set_object_type(pattern, qconfig)
    return mapping.set_module_name("normalize", None)  # one multiplication on three channels; int8 would cost accuracy


def _has_fixed_range(qconfig: QConfig) -> bool:
    return isinstance(qconfig.activation(), torch.ao.quantization.FixedQParamsObserver)


def _layers_by_type(model: nn.Module, converted: fx.GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the Conv2d and Linear modules of `model` whose replacement computes in int8, and those of the others.

    A layer is int8 only if the converted graph calls a quantized module under its name: a layer that tracing went
    around, or that kept its reference (fp32) form, counts as fp32.
    """
    called = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
    modules = dict(converted.named_modules())
    int8: list[str] = []
    other: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            replaced = name in called and isinstance(modules.get(name), nnq.Conv2d | nnq.Linear)
            (int8 if replaced else other).append(name)
    return tuple(int8), tuple(other)
