"""Post-training quantization: one file an engine, behind `quantize_model`."""

import torch
from torch import Tensor

from qexp.config import QuantizeConfig
from qexp.errors import StageError
from qexp.quantization import fx, pt2e
from qexp.quantization.result import QuantizedModel

__all__ = ["QuantizedModel", "quantize_model"]


def quantize_model(
    model: torch.nn.Module,
    calibration_images: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
) -> QuantizedModel:
    """Quantize a classifier after training; `model` itself stays as it is.

    Args:
        model: fp32 classifier that takes images in [0, 1].
        calibration_images: uint8 [N, 3, H, W]; their activations set the ranges.
        reduce_range: leave one bit of the activations unused, for CPUs whose int8 products saturate.

    Raises:
        StageError: a Conv2d or Linear stayed fp32 and `options.allow_float` is off; the message names them.
    """
    engines = {"fx": fx.quantize, "pt2e": pt2e.quantize}
    quantized = engines[options.engine](model, calibration_images, options, reduce_range)
    if quantized.result.float_layers and not options.allow_float:
        raise StageError(
            f"not quantized: {', '.join(quantized.result.float_layers)} stayed fp32; "
            "use another --model, or accept it with --allow-float true"
        )
    return quantized
