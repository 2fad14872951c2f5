"""The results of quantization: what an engine returns, how the model was quantized, and the int8 model itself."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import InputError
from qexp.files import replacing
from qexp.tables import Shown, Table


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


SUFFIXES = {"pytorch": ".pth", "onnx": ".onnx"}  # by flavour, of the file that MLflow stores


@dataclass(frozen=True)
class QuantizedModel(Shown):
    """The int8 model, float images [N, 3, H, W] in [0, 1] to float logits [N, classes], and how it was made.

    `source` is the fp32 module that was quantized: the model after its exact clean-up. `result` says how. The model is
    called as a module is; `print(model)` shows what it is.
    """

    module: Callable[[Tensor], Tensor]
    stored: Any
    flavor: Literal["pytorch", "onnx"]
    source: nn.Module
    result: QuantizeResult

    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 [N, classes] of float images [N, 3, H, W] in [0, 1].

        Raises:
            InputError: the images are no float tensor of this shape.
        """
        if not images.is_floating_point() or images.dim() != 4:
            shape = list(images.shape)
            raise InputError(f"images must be float [N, 3, H, W] in [0, 1], and are {images.dtype} {shape}")
        with torch.no_grad():
            return self.module(images.float())

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """The Conv2d and Linear layers that run in int8, by their names in the fp32 module."""
        return self.result.int8_layers

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Those that stayed fp32."""
        return self.result.float_layers

    @property
    def size_bytes(self) -> int:
        """Size of the file that `save` writes; what MLflow stores has the same content."""
        return len(self._saved())

    def save(self, file: Path | str) -> Path:
        """Write what MLflow would store; returns the path.

        Args:
            file: NAME.pth (TorchScript, for `torch.jit.load`), or with engine `onnx` NAME.onnx (for ONNX Runtime).

        Raises:
            InputError: the name ends otherwise.
            StageError: it cannot be written.
        """
        path, suffix = Path(file), SUFFIXES[self.flavor]
        if path.suffix != suffix:
            raise InputError(f"{path}: what engine {self.result.engine} makes is saved as NAME{suffix}")
        with replacing(path) as temporary:
            temporary.write_bytes(self._saved())
        return path

    def tags(self) -> dict[str, Any]:
        """How it was made, as tags of a registered version."""
        result = self.result
        tags: dict[str, Any] = {"engine": result.engine, "flavor": self.flavor}
        tags |= {"backend": result.load_backend} if result.load_backend else {}
        tags |= {"calibration_samples": result.calibration_images}
        return tags | {"float_layers": ",".join(result.float_layers) or "none"}

    def tables(self) -> tuple[Table, ...]:
        result, layers = self.result, len(self.int8_layers) + len(self.float_layers)
        bits = "7" if result.reduce_range else "8"
        if result.saturating_layers:
            bits += f" (7 in {len(result.saturating_layers)} layers)"
        rows = (
            ("layers in int8", f"{len(self.int8_layers)} of {layers}"),
            ("layers in fp32", ", ".join(self.float_layers) or "none"),
            ("weights, bits", bits),
            ("weight scales", "one a channel" if result.per_channel else "one a layer"),
            ("observer of activations", result.observer),
            ("calibration images", str(result.calibration_images)),
            ("kernels", result.backend),
            ("size, MB", f"{self.size_bytes / 1e6:.3f}"),
        )
        return (Table(f"int8 model of engine {result.engine}", ("", "value"), rows),)

    def reloaded(self) -> Callable[[Tensor], Tensor]:
        """The model as a process has it that loads it: torch's int8 convolutions keep the first shape that they see."""
        if self.flavor == "onnx":
            return self.module
        before = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = self.result.load_backend or before
            return torch.jit.load(io.BytesIO(self._saved()))
        finally:
            torch.backends.quantized.engine = before

    def _saved(self) -> bytes:
        if self.flavor == "onnx":
            return bytes(self.stored.SerializeToString())
        buffer = io.BytesIO()  # in a file its own name would stand before each of its parts, and count
        torch.jit.save(self.stored, buffer)
        return buffer.getvalue()
