"""The result of quantization: the int8 model, as an engine returns it, and how it was made."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError, StageError, first_line
from qexp.files import replacing
from qexp.foundation.quantities import NotNegative, Number, Percent
from qexp.foundation.tables import Shown, Table
from qexp.models.names import BY_OPENVINO, ONNXRUNTIME, OPENVINO, OPENVINO_BF16


@dataclass(frozen=True)
class QuantizeResult:
    """How a model was quantized. Layers are the qualified names of its Conv2d and Linear modules, and of the first
    projections of its attention (`….in_proj`), of which quantization makes linear layers.

    With `reduce_range`, all weights have 7 bits; those of `saturating_layers` have, whatever the CPU. `kept_layers` are
    those of `float_layers` that were asked to stay fp32. `load_backend` is what `torch.backends.quantized.engine` must
    be at load for the speed of `backend`, or the runtime of an ONNX file; None: any, or ONNX Runtime. `percentile` is
    that of the observer of this name, None with others. `folded`: a pool was folded into a linear layer before.
    `duration_s` is 0 until all is done.
    """

    engine: str
    backend: str
    observer: str
    per_channel: bool
    reduce_range: bool
    calibration_images: Number
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    duration_s: NotNegative
    load_backend: str | None = None
    kept_layers: tuple[str, ...] = ()
    saturating_layers: tuple[str, ...] = ()
    percentile: Percent | None = None
    folded: bool = False

    @property
    def label(self) -> str:
        """The engine, and whether a pool was folded away: tells the versions of one model apart."""
        return f"{self.engine}_folded" if self.folded else self.engine

    @classmethod
    def with_options(
        cls,
        options: QuantizeConfig,
        reduce_range: bool,
        calibration_images: int,
        *,
        backend: str,
        int8_layers: tuple[str, ...],
        float_layers: tuple[str, ...],
        load_backend: str | None = None,
        saturating_layers: tuple[str, ...] = (),
    ) -> "QuantizeResult":
        """What an engine has found, beside what it was asked for."""
        return cls(
            engine=options.one_engine,
            backend=backend,
            observer=options.observer,
            per_channel=options.per_channel,
            reduce_range=reduce_range,
            calibration_images=calibration_images,
            int8_layers=int8_layers,
            float_layers=float_layers,
            duration_s=0,
            load_backend=load_backend,
            kept_layers=tuple(options.keep_fp32 or ()),
            saturating_layers=saturating_layers,
            percentile=options.percentile_used,
        )


SUFFIXES = {"pytorch": ".pth", "onnx": ".onnx"}  # by flavour, of the file that MLflow stores


@dataclass(frozen=True)
class QuantizedModel(Shown):
    """The int8 model, float images [N, 3, H, W] in [0, 1] to float logits [N, classes], and how it was made.

    `stored` is what the MLflow flavour of the name `flavor` logs, and what a reloaded version computes with. `source`
    is the fp32 module that was quantized: the model after its exact clean-up. `result` says how. `reference` is there
    until the int8 kernels have been held against it: the quantized program from before the engine put them into it, the
    same integers computed with in fp32. The model is called as a module is; `print(model)` shows what it is.
    """

    module: Callable[[Tensor], Tensor]
    stored: Any
    flavor: Literal["pytorch", "onnx"]
    source: nn.Module
    result: QuantizeResult
    reference: Callable[[Tensor], Tensor] | None = None

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
        return len(self.stored_bytes())

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
            temporary.write_bytes(self.stored_bytes())
        return path

    @property
    def computes_in_float(self) -> bool:
        """Whether it is an ONNX file that has products of floats, or normalizations, beside what is int8: bf16 may make
        them faster."""
        if self.flavor != "onnx":
            return False
        from qexp.models.onnx_file import has_float_work

        return has_float_work(self.stored)

    def in_openvino(self, bf16: bool = False) -> "QuantizedModel":
        """The same ONNX file, run by OpenVINO.

        Args:
            bf16: compute in bf16, not in fp32, what is not int8; for a CPU that has bf16 instructions.

        Raises:
            InputError: OpenVINO is not installed, or the engine makes no ONNX file.
            StageError: OpenVINO cannot read the file.
        """
        if self.flavor != "onnx":
            raise InputError(f"engine {self.result.engine} makes no ONNX file, which OpenVINO reads")
        from qexp.models.openvino_file import OpenvinoClassifier

        try:
            module = OpenvinoClassifier(self.stored_bytes(), bf16)
        except RuntimeError as error:  # of an operation that it does not know
            raise StageError(f"OpenVINO cannot read what engine onnx has made: {first_line(error)}") from error
        runtime = OPENVINO_BF16 if bf16 else OPENVINO
        return replace(self, module=module, result=replace(self.result, backend=runtime, load_backend=runtime))

    def as_by_mlflow(self) -> Callable[[Tensor], Tensor]:
        """The model in the runtime in which MLflow loads it: of an ONNX file, ONNX Runtime."""
        if self.result.load_backend not in BY_OPENVINO:
            return self.module
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(self.stored)

    def tags(self) -> dict[str, Any]:
        """How it was made, as tags of a registered version."""
        result = self.result
        tags: dict[str, Any] = {"engine": result.engine, "flavor": self.flavor}
        if self.flavor == "onnx":
            tags["runtime"] = result.load_backend or ONNXRUNTIME
        elif result.load_backend:
            tags["backend"] = result.load_backend
        tags |= {"calibration_samples": result.calibration_images} | ({"folded": "true"} if result.folded else {})
        return tags | {"float_layers": ",".join(result.float_layers) or "none"}

    def tables(self) -> tuple[Table, ...]:
        result, layers = self.result, len(self.int8_layers) + len(self.float_layers)
        bits = "7" if result.reduce_range else "8"
        if result.saturating_layers:
            bits += f" (7 in {len(result.saturating_layers)} layers)"
        rows = (
            ("layers in int8", f"{len(self.int8_layers)} of {layers}"),
            ("layers in fp32", ", ".join(self.float_layers) or "none"),
            *([("folded", "a pool, into the linear layer after it")] if result.folded else []),
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
            return torch.jit.load(io.BytesIO(self.stored_bytes()))
        finally:
            torch.backends.quantized.engine = before

    def stored_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        if self.flavor == "onnx":
            return bytes(self.stored.SerializeToString())
        buffer = io.BytesIO()  # in a file its own name would stand before each of its parts, and count
        torch.jit.save(self.stored, buffer)
        return buffer.getvalue()
