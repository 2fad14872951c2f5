"""How sensitive each layer is to int8: a simulation on the fp32 model, the same for every engine.

Method: after the debugging steps of Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295. One
layer is quantized while all others stay fp32, and the other way round, and the logits are compared with those of fp32
each time. Values are rounded to the int8 grid and computed with in fp32 ("fake quantization").

Layers are ranked by the Kullback-Leibler divergence of the class probabilities from those of fp32 with only the layer
in int8. On two disjoint sets of 96 images, the ranks of mobilenet_v2's 53 layers by it agree (Spearman's correlation
0.99); by the divergence, or the top-1, with only the layer in fp32 they do not (-0.10, -0.15), since there the noise of
all other layers hides what one of them adds. Of top-1 only what exceeds chance is told (`beyond_chance`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import bdtr
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, observer
from torch.nn.functional import kl_div

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.foundation.quantities import Finite, NotNegative, Number, Percent, Some
from qexp.measurement.accuracy import to_float, top_k_credit
from qexp.progress import track
from qexp.quantization.attention import IN_PROJECTION
from qexp.quantization.engines import fx
from qexp.quantization.observers import calibration_batches, observer_class

BATCH_SIZE = 32  # stays in the caches of a CPU: SmallNet takes half the time that it does at 256, VGG16 the same


@dataclass(frozen=True)
class LayerSensitivity:
    """One Conv2d or Linear: "only int8" has it quantized and all others in fp32, "only fp32" the other way round.

    With only this layer in fp32, its input still comes in int8 from the layer before, unless it is the first.

    Args:
        layer: its qualified name.
        sqnr_db: power of its fp32 output over that of the error when its input and weight are quantized, both on
            fp32 inputs, over all images; higher is better. None where there is no finite ratio: no error, as in a
            layer that only gives zeros, or no signal.
        top1_only_int8_percent: accuracy with only this layer in int8.
        top1_only_fp32_percent: accuracy with only this layer in fp32.
        kl_only_int8_nats: mean divergence of the class probabilities from those of fp32, with only this layer in
            int8. None where it is not finite, and in results of versions that did not measure it; so is the next.
        kl_only_fp32_nats: the same with only this layer in fp32.
        only_int8_lost_images: right in fp32, wrong with only this layer in int8.
        only_int8_gained_images: wrong in fp32, right with only this layer in int8.
        only_fp32_lost_images: right with all layers in int8, wrong with only this layer in fp32.
        only_fp32_gained_images: wrong with all layers in int8, right with only this layer in fp32.
        weight_bits: of the simulated weights.
    """

    layer: str
    sqnr_db: Finite | None
    top1_only_int8_percent: Percent
    top1_only_fp32_percent: Percent
    kl_only_int8_nats: NotNegative | None = None
    kl_only_fp32_nats: NotNegative | None = None
    only_int8_lost_images: Number = 0
    only_int8_gained_images: Number = 0
    only_fp32_lost_images: Number = 0
    only_fp32_gained_images: Number = 0
    weight_bits: Some = 8


@dataclass(frozen=True)
class SensitivityResult:
    """All layers that the network calls as modules, in its own order; `int8_...` values have all of them quantized.

    `engines` are those whose bits were simulated, empty in results of versions that simulated 8 bits, or 7 for inputs.
    """

    layers: tuple[LayerSensitivity, ...]
    fp32_top1_percent: Percent
    int8_top1_percent: Percent
    images: Some
    observer: str
    per_channel: bool
    percentile: Percent | None = None
    int8_kl_nats: NotNegative | None = None
    engines: tuple[str, ...] = ()


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
        options: engine, observer, percentile, per_channel and calibration_batch_size count. Weights have 7 bits
            where any of the engines reduces them.
        reduce_range: as in `quantize_model`.

    Raises:
        InputError: the model is an ONNX file, whose layers cannot be exchanged one by one.
    """
    if hasattr(source, "onnx_layers"):
        raise InputError(
            "--sensitivity-images: the layers of an ONNX file cannot be tried one by one; "
            "say with --keep-fp32 which ones stay fp32"
        )
    with torch.no_grad(), _simulated(source, calibration_images, options, reduce_range) as layers:
        _compare_outputs(source, images, layers)
        fp32, int8 = (_logits(source, images, layers, quantized) for quantized in ((), tuple(layers)))
        fp32_correct, int8_correct = (top_k_credit(logits, labels, 1) > 0.5 for logits in (fp32, int8))
        found = []
        for name, layer in track(layers.items(), "sensitivity", len(layers)):
            others = [other for other in layers if other != name]
            only_int8 = _logits(source, images, layers, [name])
            only_fp32 = _logits(source, images, layers, others, [] if layer.is_first else [name])
            int8_alone, fp32_alone = (top_k_credit(logits, labels, 1) > 0.5 for logits in (only_int8, only_fp32))
            found.append(
                LayerSensitivity(
                    layer=name,
                    sqnr_db=_decibels(layer.signal, layer.noise),
                    top1_only_int8_percent=_percent(int8_alone),
                    top1_only_fp32_percent=_percent(fp32_alone),
                    kl_only_int8_nats=_divergence_nats(fp32, only_int8),
                    kl_only_fp32_nats=_divergence_nats(fp32, only_fp32),
                    only_int8_lost_images=_only_first(fp32_correct, int8_alone),
                    only_int8_gained_images=_only_first(int8_alone, fp32_correct),
                    only_fp32_lost_images=_only_first(int8_correct, fp32_alone),
                    only_fp32_gained_images=_only_first(fp32_alone, int8_correct),
                    weight_bits=layer.weight_bits,
                )
            )
    return SensitivityResult(
        layers=tuple(found),
        fp32_top1_percent=_percent(fp32_correct),
        int8_top1_percent=_percent(int8_correct),
        images=len(images),
        observer=options.observer,
        per_channel=options.per_channel,
        percentile=options.percentile_used,
        int8_kl_nats=_divergence_nats(fp32, int8),
        engines=tuple(options.engine or ["fx"]),
    )


def simulated_logits(
    source: nn.Module,
    calibration_images: Tensor,
    images: Tensor,
    names: Sequence[str],
    options: QuantizeConfig,
    reduce_range: bool,
) -> Tensor | None:
    """Logits [M, classes] with the layers of these names quantized as in `measure_sensitivity`, whose arguments the
    others are. None where one of them is no module that the model calls; projections of attention stay fp32."""
    wanted = [name for name in names if not name.endswith(f".{IN_PROJECTION}")]
    with torch.no_grad(), _simulated(source, calibration_images, options, reduce_range) as layers:
        return _logits(source, images, layers, wanted) if wanted and layers.keys() >= set(wanted) else None


def most_sensitive_first(result: SensitivityResult) -> tuple[str, ...]:
    """The order in which layers go back to fp32: by the divergence that each causes alone, ties by the lower SQNR."""

    def rank(layer: LayerSensitivity) -> tuple[float, float]:
        return -(layer.kl_only_int8_nats or 0.0), math.inf if layer.sqnr_db is None else layer.sqnr_db

    return tuple(layer.layer for layer in sorted(result.layers, key=rank))


def beyond_chance(flips: Sequence[tuple[int, int]], level: float = 0.05) -> list[bool]:
    """For each of several comparisons of two models on the same images, whether the first is right more often.

    McNemar's test in its exact form, two-sided (only the images that flip carry information), with Holm's correction
    for the number of comparisons (Scandinavian Journal of Statistics 6, 1979), so that the largest of many differences
    is not taken for a finding because it is the largest.

    Args:
        flips: images that only the first model has right, and those that only the second has right.
        level: most probable share of reports with a false finding.
    """
    values = [_exact_p_value(first, second) for first, second in flips]
    order = sorted(range(len(values)), key=values.__getitem__)
    found, rejected = [False] * len(values), True
    for place, number in enumerate(order):
        rejected = rejected and values[number] * (len(values) - place) <= level
        found[number] = rejected and flips[number][0] > flips[number][1]
    return found


def _exact_p_value(first: int, second: int) -> float:
    """Of so uneven a split or a more uneven one, where both sides are as probable."""
    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


@dataclass
class _Layer:
    """A layer and its two ways to compute; `signal` and `noise` are sums of squares of outputs and their errors."""

    module: Any
    forward: Callable[[Tensor], Tensor]  # the module's own
    fp32_weight: Any  # a parameter, as the next one
    int8_weight: nn.Parameter
    weight_bits: int
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
    layers: dict[str, _Layer] = {}
    reduced = fx.saturating_layers(model, options) if "fx" in (options.engine or ["fx"]) else ()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bits = 7 if reduce_range or name in reduced else 8
            weight = _int8_weight(module.weight, options.per_channel, bits)
            layers[name] = _Layer(module, module.forward, module.weight, weight, bits, make(dtype=torch.quint8), calls)
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


def _int8_weight(weight: Tensor, per_channel: bool, bits: int) -> nn.Parameter:
    kind: Any = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    watch = kind(dtype=torch.qint8, qscheme=scheme, quant_min=lowest, quant_max=highest)
    watch(weight.detach())
    scale, zero = watch.calculate_qparams()
    if per_channel:
        quantized = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, lowest, highest)
    else:
        quantized = torch.fake_quantize_per_tensor_affine(weight, scale, zero.int(), lowest, highest)
    return nn.Parameter(quantized, requires_grad=False)


def _compare_outputs(model: nn.Module, images: Tensor, layers: dict[str, _Layer]) -> None:
    for layer in layers.values():
        layer.module.forward = layer.compare
    for batch in images.split(BATCH_SIZE):
        model(to_float(batch))


def _logits(
    model: nn.Module,
    images: Tensor,
    layers: dict[str, _Layer],
    quantized: Sequence[str],
    kept: Sequence[str] = (),
) -> Tensor:
    """With some layers quantized, some `kept` between these, and all others in fp32."""
    for name, layer in layers.items():
        layer.module.forward = layer.int8 if name in quantized else layer.kept if name in kept else layer.fp32
    return torch.cat([model(to_float(batch)) for batch in images.split(BATCH_SIZE)])


def _divergence_nats(expected: Tensor, logits: Tensor) -> float | None:
    """Mean Kullback-Leibler divergence of the class probabilities of `logits` from the expected ones."""
    log_expected, log_found = (each.double().log_softmax(1) for each in (expected, logits))
    divergence = kl_div(log_found, log_expected, reduction="batchmean", log_target=True).item()
    return max(divergence, 0.0) if math.isfinite(divergence) else None  # below 0 by rounding alone


def _only_first(first: Tensor, second: Tensor) -> int:
    """How many images only the first of two models has right."""
    return int((first & ~second).sum())


def _percent(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def _sum_of_squares(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and 0 < noise < math.inf else None
