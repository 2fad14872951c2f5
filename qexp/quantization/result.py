"""What every engine gives back."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizeResult:
    """How a model was quantized. Layers are the qualified names of its Conv2d and Linear modules.

    `load_backend` is what `torch.backends.quantized.engine` must be at load for the speed of `backend`; None: any.
    """

    engine: str
    backend: str
    observer: str
    per_channel: bool
    reduce_range: bool
    calibration_images: int
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    duration_s: float
    load_backend: str | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """The int8 module, float images [N, 3, H, W] in [0, 1] to float logits [N, classes], and how it was made."""

    module: torch.jit.ScriptModule
    result: QuantizeResult
