"""The models of a latency sweep, and how each is loaded: as a user would load it.

fp32 is the stored version, an exported program. The fair baselines are made from its weights: the Python module
(eager), traced and frozen by TorchScript, the same in bf16, and exported to ONNX for ONNX Runtime. int8 models are
stored versions, each with one choice of kernels, or of the runtime for an ONNX file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.models.classifier import load_classifier
from qexp.models.factories import NotImportable
from qexp.models.names import ONNXRUNTIME, OPENVINO
from qexp.models.preprocessing import Shape
from qexp.models.program import load_program
from qexp.models.stored import load_module, load_stored, model_file

Predict = Callable[[Tensor], object]
BASELINE = "fp32"
EAGER = "fp32_eager"
BF16 = "bf16"
DEFAULTS = (None, "x86", ONNXRUNTIME)  # kernels and runtimes


@dataclass(frozen=True)
class SweepModel:
    """A name, the folder of a stored version's files, and what runs them: torch's engine for int8 kernels, or the
    runtime of an ONNX file (None: any). A model that is not `needed` is left out where it does not load or run."""

    name: str
    folder: str
    backend: str | None = None
    needed: bool = True

    @property
    def compiles_for_each_size(self) -> bool:
        """Whether the first pass at a batch size is the one that compiles the model for it."""
        return self.backend == OPENVINO


def int8_models(folder: str, engine: str, backends: tuple[str | None, ...]) -> tuple[SweepModel, ...]:
    """A stored int8 version once for each choice of kernels or runtimes; the default has the engine's plain name."""
    return tuple(
        SweepModel(f"int8_{engine}" if backend in DEFAULTS else f"int8_{engine}_{backend}", folder, backend, place == 0)
        for place, backend in enumerate(backends)
    )


def backend_in(name: str, engine: str) -> str | None:
    """The kernels or the runtime in a name that `int8_models` has given; None: the default of the engine."""
    return name.removeprefix(f"int8_{engine}").removeprefix("_") or None


def prepare_baseline(weights: Path, stored: Path, name: str, shape: Shape, folder: Path) -> None:
    """Write what `load` needs for the baseline of this name into `folder`, from a weights file of `save_classifier`, or
    from an exported program.

    A network whose code lies in the user's folder, from which this process imports nothing, is taken from `stored`, the
    folder of the fp32 version: its exported program has the same operations.
    """
    try:
        with torch.no_grad():
            model: nn.Module = load_program(weights) if weights.suffix == ".pt2" else load_classifier(weights)
    except NotImportable:
        model = load_program(model_file(stored))
    example = torch.zeros(2, *shape)
    if name == "fp32_onnx":
        from qexp.models.onnx_file import export

        return export(model, example, folder / f"{name}.onnx")
    if name == EAGER:
        return torch.save(model, folder / f"{name}.pt")
    torch.jit.save(freeze(model, shape, torch.bfloat16 if name == BF16 else torch.float32), folder / f"{name}.pt")


def freeze(model: nn.Module, shape: Shape, kind: torch.dtype) -> torch.jit.ScriptModule:
    """The model traced and frozen by TorchScript with weights of this kind, which `model` has afterwards too."""
    example = torch.zeros(2, *shape, dtype=kind)
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(model.to(kind), example, check_trace=False).eval())


def in_bf16(module: torch.jit.ScriptModule) -> Callable[[Tensor], Tensor]:
    """A module of bf16 as a model of float images and float logits."""
    return lambda images: module(images.bfloat16()).float()


def load(model: SweepModel, folder: Path) -> Predict:
    """The model, freshly loaded from its own folder or from what `prepare_baseline` has written to `folder`."""
    if model.name == "fp32_onnx":
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(folder / "fp32_onnx.onnx").forward  # as load_stored does
    if model.name == EAGER:
        return load_module(folder / f"{EAGER}.pt")  # which this process has written
    if model.name in ("fp32_traced", BF16):
        module = torch.jit.load(folder / f"{model.name}.pt")
        return in_bf16(module) if model.name == BF16 else module
    return load_stored(Path(model.folder), model.backend)
