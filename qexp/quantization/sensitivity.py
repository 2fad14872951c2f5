"""How much each layer suffers from int8: a simulation on the fp32 model, the same for every engine.

Method: after the debugging steps of Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295. One
layer is quantized while all others stay fp32, and the other way round, and the accuracy is measured each time. Values
are rounded to the int8 grid and computed with in fp32 ("fake quantization").
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, observer

from qexp.config import QuantizeConfig
from qexp.evaluation import to_float
from qexp.progress import track
from qexp.quantization.observers import calibration_batches, observer_class

BATCH_SIZE = 32  # stays in the caches of a CPU: SmallNet takes half the time that it does at 256, VGG16 the same


@dataclass(frozen=True)
class LayerSensitivity:
    """One Conv2d or Linear.

    Args:
        layer: its qualified name.
        sqnr_db: power of its fp32 output over that of the error when its input and weight are quantized, both on
            fp32 inputs, over all images; higher is better. None where there is no finite ratio: no error, as in a
            layer that only gives zeros, or no signal.
        top1_only_int8_percent: accuracy with this layer quantized and all others in fp32.
        top1_only_fp32_percent: accuracy with this layer in fp32 and all others quantized: its input still comes in
            int8 from the layer before, unless it is the first.
    """

    layer: str
    sqnr_db: float | None
    top1_only_int8_percent: float
    top1_only_fp32_percent: float


@dataclass(frozen=True)
class SensitivityResult:
    """All layers that the network calls as modules, in its own order; `int8_top1_percent` has all of them quantized."""

    layers: tuple[LayerSensitivity, ...]
    fp32_top1_percent: float
    int8_top1_percent: float
    images: int
    observer: str
    per_channel: bool
    percentile: float | None = None


def measure_sensitivity(
    source: nn.Module,
    calibration_images: Tensor,
    images: Tensor,
    labels: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
) -> SensitivityResult:
    """Quantize layer after layer in simulation, two evaluations for each.

    What engines do between layers (sums of residual blocks, the pools) is not simulated. A layer that is called
    several times has one range for all calls.

    Args:
        source: the fp32 model after its exact clean-up (`QuantizedModel.source`); it is left as it was.
        calibration_images: uint8 [N, 3, H, W]; their activations set the ranges.
        images: uint8 [M, 3, H, W], all of which are evaluated.
        labels: int64 [M].
        options: observer, percentile, per_channel and calibration_batch_size count.
        reduce_range: as in `quantize_model`.
    """
    with torch.no_grad(), _simulated(source, calibration_images, options, reduce_range) as layers:
        _compare_outputs(source, images, layers)
        fp32 = _top1(source, images, labels, layers, ())
        int8 = _top1(source, images, labels, layers, tuple(layers))
        found = []
        for name, layer in track(layers.items(), "sensitivity", len(layers)):
            only_int8 = _top1(source, images, labels, layers, (name,))
            others = [other for other in layers if other != name]
            only_fp32 = _top1(source, images, labels, layers, others, [] if layer.is_first else [name])
            found.append(LayerSensitivity(name, _decibels(layer.signal, layer.noise), only_int8, only_fp32))
    observed = options.observer, options.per_channel, options.percentile_used
    return SensitivityResult(tuple(found), fp32, int8, len(images), *observed)


def most_sensitive_first(result: SensitivityResult) -> tuple[str, ...]:
    """The order in which layers go back to fp32: by the accuracy that this gains, ties by the lower SQNR.

    The gain is measured with all other layers in int8, which is the network that the layer would go back into.
    """

    def rank(layer: LayerSensitivity) -> tuple[float, float]:
        return -layer.top1_only_fp32_percent, math.inf if layer.sqnr_db is None else layer.sqnr_db

    return tuple(layer.layer for layer in sorted(result.layers, key=rank))


@dataclass
class _Layer:
    """A layer and its two ways to compute; `signal` and `noise` are sums of squares of outputs and their errors."""

    module: Any
    forward: Callable[[Tensor], Tensor]  # the module's own
    fp32_weight: Any  # a parameter, as the next one
    int8_weight: nn.Parameter
    observer: Any
    calls: list["_Layer"]  # of all layers, in their order
    range: tuple[Tensor, Tensor] | None = None  # scale and zero point of the input
    signal: float = 0.0
    noise: float = 0.0

    @property
    def is_first(self) -> bool:
        """Whether its input comes from no other layer."""
        return self.calls[0] is self

    def observe(self, input: Tensor) -> Tensor:
        self.calls.append(self)
        self.observer(input)
        return self.forward(input)

    def fp32(self, input: Tensor) -> Tensor:
        self.module.weight = self.fp32_weight
        return self.forward(input)

    def int8(self, input: Tensor) -> Tensor:
        self.module.weight = self.int8_weight
        return self.forward(self._rounded(input))

    def kept(self, input: Tensor) -> Tensor:
        """In fp32, after a layer in int8."""
        return self.fp32(self._rounded(input))

    def _rounded(self, input: Tensor) -> Tensor:
        assert self.range is not None
        scale, zero = self.range
        lowest, highest = self.observer.quant_min, self.observer.quant_max
        return torch.fake_quantize_per_tensor_affine(input, scale, zero, lowest, highest)

    def compare(self, input: Tensor) -> Tensor:
        quantized, output = self.int8(input), self.fp32(input)
        self.signal += _sum_of_squares(output)
        self.noise += _sum_of_squares(quantized - output)
        return output


@contextmanager
def _simulated(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool
) -> Iterator[dict[str, _Layer]]:
    """The layers that the model calls, calibrated, by name. Their `forward` may be changed inside the block.

    Weights are exchanged as whole parameters, so that afterwards the model has the very ones that it had.
    """
    make: Any = observer_class(observer, options)
    calls: list[_Layer] = []
    layers = {
        name: _Layer(module, module.forward, module.weight, _int8_weight(module.weight, options.per_channel),
                     make(dtype=torch.quint8, reduce_range=reduce_range), calls)
        for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }  # fmt: skip
    try:
        for layer in layers.values():
            layer.module.forward = layer.observe
        for batch in calibration_batches(images, options.calibration_batch_size):
            model(to_float(batch))
        called = {name: layer for name, layer in layers.items() if layer.observer.min_val.isfinite().all()}
        for layer in called.values():
            scale, zero = layer.observer.calculate_qparams()
            layer.range = scale, zero.int()
        yield called
    finally:
        for layer in layers.values():
            layer.module.weight = layer.fp32_weight
            del layer.module.forward  # what hid the one of its class


def _int8_weight(weight: Tensor, per_channel: bool) -> nn.Parameter:
    kind: Any = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    watch = kind(dtype=torch.qint8, qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric)
    watch(weight.detach())
    scale, zero = watch.calculate_qparams()
    if per_channel:
        quantized = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, -128, 127)
    else:
        quantized = torch.fake_quantize_per_tensor_affine(weight, scale, zero.int(), -128, 127)
    return nn.Parameter(quantized, requires_grad=False)


def _compare_outputs(model: nn.Module, images: Tensor, layers: dict[str, _Layer]) -> None:
    for layer in layers.values():
        layer.module.forward = layer.compare
    for batch in images.split(BATCH_SIZE):
        model(to_float(batch))


def _top1(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    layers: dict[str, _Layer],
    quantized: Sequence[str],
    kept: Sequence[str] = (),
) -> float:
    """Accuracy in percent with some layers quantized, some `kept` between these; logits with NaN count as wrong."""
    for name, layer in layers.items():
        layer.module.forward = layer.int8 if name in quantized else layer.kept if name in kept else layer.fp32
    logits = torch.cat([model(to_float(batch)) for batch in images.split(BATCH_SIZE)])
    return 100 * ((logits.argmax(1) == labels) & ~logits.isnan().any(1)).double().mean().item()


def _sum_of_squares(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and 0 < noise < math.inf else None
