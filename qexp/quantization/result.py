"""The results of quantization: what an engine returns, how the model was quantized, and the int8 model itself."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EngineResult:
    """An int8 model as an engine has made it.

    `call` takes float images [N, 3, H, W] in [0, 1] and gives float logits [N, classes]. `stored` is what the MLflow
    flavour of the name `flavor` logs, and what a reloaded version computes with. Layers are the qualified names of
    Conv2d and Linear modules. `load_backend` is what `torch.backends.quantized.engine` must be at load for the speed
    of `backend`; None: any. The weights of `saturating_layers` have 7 bits, whatever the CPU. `reference` is the
    quantized program from before the engine put int8 kernels into it: the same integers, computed with in fp32.
    """

    call: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    stored: Any
    flavor: Literal["pytorch", "onnx"]
    backend: str
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    load_backend: str | None = None
    saturating_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizeResult:
    """How a model was quantized. Layers are the qualified names of its Conv2d and Linear modules, and of the first
    projections of its attention (`….in_proj`), of which quantization makes linear layers.

    With `reduce_range`, all weights have 7 bits. `kept_layers` are those of `float_layers` that were asked to stay
    fp32. `load_backend` and `saturating_layers` are as in `EngineResult`. `percentile` is that of the observer of this
    name, None with others.
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
    kept_layers: tuple[str, ...] = ()
    saturating_layers: tuple[str, ...] = ()
    percentile: float | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """The int8 model, float images [N, 3, H, W] in [0, 1] to float logits [N, classes], and how it was made.

    `source` is the fp32 module that was quantized: the model after its exact clean-up.
    """

    module: Callable[[Tensor], Tensor]
    stored: Any
    flavor: Literal["pytorch", "onnx"]
    source: nn.Module
    result: QuantizeResult

    def saved_bytes(self) -> int:
        """Size of the file in which MLflow would store it."""
        if self.flavor == "onnx":
            return int(self.stored.ByteSize())
        with tempfile.NamedTemporaryFile() as file:
            torch.jit.save(self.stored, file.name)
            return Path(file.name).stat().st_size

    def reloaded(self) -> Callable[[Tensor], Tensor]:
        """The model as a process has it that loads it: torch's int8 convolutions keep the first shape that they see."""
        if self.flavor == "onnx":
            return self.module
        buffer, before = io.BytesIO(), torch.backends.quantized.engine
        torch.jit.save(self.stored, buffer)
        buffer.seek(0)
        try:
            torch.backends.quantized.engine = self.result.load_backend or before
            return torch.jit.load(buffer)
        finally:
            torch.backends.quantized.engine = before
