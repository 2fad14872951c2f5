"""Post-training quantization: exact clean-up, then one of the engines, one file each, behind `quantize_model`.

Takes an fp32 module and calibration images, gives a `QuantizedModel`. An engine's file is imported when it is used:
what it needs may not be installed.
"""

import copy
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError, StageError
from qexp.foundation.extras import OF_ENGINE, check_engines, extra
from qexp.measurement.accuracy import to_float
from qexp.measurement.host import read_host
from qexp.models.names import RUNTIMES
from qexp.quantization.attention import IN_PROJECTION
from qexp.quantization.cleanup import clean, folded_layers
from qexp.quantization.engines import fx
from qexp.quantization.equivalence import MOST_IMAGES, check_kernels, check_sense
from qexp.quantization.result import QuantizedModel, QuantizeResult
from qexp.quantization.sensitivity import simulated_logits
from qexp.quantization.windows import computed_before

__all__ = ["KERNELS", "LOADED_WITHOUT_PICKLE", "QuantizedModel", "quantize_model"]

Engine = Callable[[nn.Module, Tensor, QuantizeConfig, bool], QuantizedModel]
# What may run the models of an engine, the default first: `torch.backends.quantized.engine` at load, or the runtime of
# an ONNX file; None: there is no choice.
KERNELS: dict[str, tuple[str | None, ...]] = {"fx": fx.KERNELS, "pt2e": (None,), "onnx": RUNTIMES}
LOADED_WITHOUT_PICKLE = ("onnx",)  # engines whose versions MLflow loads where it is told not to open pickles


def _imported(name: str, *arguments: Any) -> QuantizedModel:
    """What an engine returns whose file is imported now."""
    check_engines([name])
    with extra(OF_ENGINE[name], f"engine {name}"):
        engine = import_module(f"qexp.quantization.engines.{name}")
    return engine.quantize(*arguments)


ENGINES: dict[str, Engine] = {"fx": fx.quantize, "pt2e": partial(_imported, "pt2e"), "onnx": partial(_imported, "onnx")}


def quantize_model(
    model: nn.Module, calibration_images: Tensor, options: QuantizeConfig, reduce_range: bool | None = None
) -> QuantizedModel:
    """Quantize a classifier after training; `model` itself stays as it is.

    Args:
        model: fp32 classifier that takes images in [0, 1]; with engine onnx also an `OnnxNetwork`.
        calibration_images: [N, 3, H, W], uint8 or float in [0, 1]; their activations set the ranges.
        options: with one engine.
        reduce_range: leave one bit of all weights unused, for CPUs whose int8 products saturate; None: where this CPU
            is one of them.

    Raises:
        InputError: `options.keep_fp32` names a layer that does not exist, or the engine needs a package that is not
            installed.
        StageError: the engine cannot quantize the model; or a Conv2d or Linear stayed fp32 that was not to, and
            `options.allow_float` is off: the message names them; or the int8 kernels compute something else.
    """
    engine = options.one_engine
    check_layer_names(model, options.keep_fp32 or ())
    if reduce_range is None:
        reduce_range = not read_host(None).has_int8_dot_product
    started = time.monotonic()
    if is_onnx_network(model):
        made, source = _quantize_onnx_network(model, calibration_images, options, reduce_range), model
    else:
        made, source = _quantize_module(model, calibration_images, options, reduce_range)
    _refuse_divided_projections(made.result)
    made = replace(made, result=replace(made.result, duration_s=time.monotonic() - started))
    if not options.allow_float:
        _refuse_float_layers(made.result)
    assert made.reference is not None
    found_db = check_kernels(engine, made.reloaded(), made.reference, source, calibration_images)
    if not is_onnx_network(model):
        some, int8 = calibration_images[:MOST_IMAGES], made.result.int8_layers
        simulated = partial(simulated_logits, source, some, names=int8, options=options, reduce_range=reduce_range)
        check_sense(engine, found_db, source, simulated, some)
    return replace(made, source=source, reference=None)


def _quantize_module(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool
) -> tuple[QuantizedModel, nn.Module]:
    """What the engine made, with the layers of `model` in their order, and the model after its clean-up."""
    engine = options.one_engine
    with torch.no_grad():
        source = clean(model, to_float(images[:2]), bool(options.fold_pool))
    constant = computed_before(model, source)
    found = _layer_names(source)
    layers = [name for name in _layer_names(model) if name not in constant]
    gone = _never_called(model, [name for name in layers if name not in found], to_float(images[:1]))
    unused = _unused_layers(model, gone, to_float(images[:1]))
    layers = [name for name in layers if name not in unused]
    layers = list(dict.fromkeys([*layers, *found]))  # and attention's first projections
    make = partial(fx.quantize, layers=layers) if ENGINES[engine] is fx.quantize else ENGINES[engine]
    made = make(source, images, options, reduce_range)
    # And those that engine fx has found by itself, and modules in which the others have found functions with weights.
    layers = list(dict.fromkeys([*layers, *_layer_names(made.source), *filter(None, made.int8_layers)]))
    missing = [name for name in layers if name not in made.int8_layers]
    unused = _unused_layers(model, missing, to_float(images[:1]))
    layers, missing = ([name for name in names if name not in unused] for names in (layers, missing))
    result = replace(
        made.result,
        int8_layers=tuple(name for name in layers if name in made.int8_layers),
        float_layers=tuple(dict.fromkeys([*missing, *(name for name in made.float_layers if name not in unused)])),
        folded=bool(folded_layers(model, source) or folded_layers(model, made.source)),
    )
    return replace(made, result=result), source


def is_onnx_network(model: Any) -> bool:
    """Whether it is an `OnnxNetwork` of models/onnx_input.py, whose package may not be installed."""
    return hasattr(model, "onnx_layers")


def _quantize_onnx_network(network: Any, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    """The graph itself is quantized: there is no module to clean up or to export."""
    engine = options.one_engine
    if engine != "onnx":
        raise InputError(
            f"engine {engine}: needs a PyTorch module, and {network.file} is an ONNX file; use engine onnx"
        )
    from qexp.quantization.engines import onnx

    return onnx.quantize_network(network, images, options, reduce_range)


def check_layer_names(network: nn.Module, kept: Sequence[str]) -> None:
    """Raise InputError unless these are `keepable_layers`."""
    known = keepable_layers(network)
    if unknown := [name for name in kept if name not in known]:
        raise InputError(f"--keep-fp32 {','.join(unknown)}: not among the layers {', '.join(known)}")


def keepable_layers(network: nn.Module) -> list[str]:
    """Names of the layers that can be kept in fp32: Conv2d, Linear, and the first projection of attention, which is a
    linear layer of its own once the network has been cleaned up."""
    layers = list(network.onnx_layers) if is_onnx_network(network) else _layer_names(network)  # type: ignore[arg-type]
    blocks = [name for name, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [*layers, *(f"{name}.{IN_PROJECTION}" for name in blocks)]


def _layer_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _never_called(network: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """Of these layers, those that are not called as modules; their weights may be used otherwise."""
    if not names:
        return []
    copied, called = copy.deepcopy(network).eval(), set[str]()
    for name in names:
        copied.get_submodule(name).register_forward_hook(lambda *given, name=name: called.add(name))
    with torch.no_grad():
        copied(images)
    return [name for name in names if name not in called]


def _unused_layers(network: nn.Module, names: Sequence[str], images: Tensor) -> set[str]:
    """Of these layers, those that `forward` never uses: no logit becomes NaN when their weights are."""
    unused: set[str] = set()
    if not names:
        return unused
    network = copy.deepcopy(network).eval()  # in training, a forward would change batch norms
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name in names:
            weight = modules[name]._parameters.get("weight") if name in modules else None
            if weight is None:  # it is computed from others, or the layer is one that the clean-up has made
                continue
            kept = weight.clone()
            try:
                weight.fill_(math.nan)
                if not network(images).isnan().any():
                    unused.add(name)
            finally:
                weight.copy_(kept)
    return unused


def _refuse_divided_projections(result: QuantizeResult) -> None:
    """Of attention between different tokens, engine fx makes several layers; only the first has the name to keep."""
    for name in result.kept_layers:
        parts = re.compile(rf"{re.escape(name)}_\d+")
        if name.endswith(f".{IN_PROJECTION}") and any(map(parts.fullmatch, result.int8_layers)):
            raise StageError(
                f"engine {result.engine}: cannot keep {name} in fp32: this attention takes different tokens, and its "
                "projections become several layers; use --engine onnx"
            )


def _refuse_float_layers(result: QuantizeResult) -> None:
    if unasked := [name for name in result.float_layers if name not in result.kept_layers]:
        raise StageError(
            f"engine {result.engine}: not quantized: {', '.join(unasked)} stayed fp32; "
            "use another --model, or accept it with --allow-float true"
        )
