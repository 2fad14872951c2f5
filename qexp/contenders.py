"""Every model that a latency sweep times, and how each is loaded: as a user would load it.

fp32 is the registered version, an exported program. The fair baselines are made from its weights: the Python module
(eager), traced and frozen by TorchScript, the same in bf16, and exported to ONNX for ONNX Runtime. int8 are registered
versions, each with one choice of kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp import registry, tracking
from qexp.models import load_classifier
from qexp.store.integrity import copy_files

Predict = Callable[[Tensor], object]
BASELINE = "fp32"
EAGER = "fp32_eager"
BF16 = "bf16"


@dataclass(frozen=True)
class Contender:
    """A name, a registered version or the folder of its files, and torch's engine for int8 kernels (None: any)."""

    name: str
    uri: str
    backend: str | None = None


def int8_contenders(uri: str, engine: str, backends: tuple[str | None, ...]) -> tuple[Contender, ...]:
    """A registered int8 version once for each choice of kernels; the first keeps the engine's plain name."""
    return tuple(
        Contender(f"int8_{engine}" if backend in (None, "x86") else f"int8_{engine}_{backend}", uri, backend)
        for backend in backends
    )


def prepare_baseline(fp32_uri: str, name: str, image_size: int, folder: Path) -> None:
    """Write what `load` needs for the baseline of this name into `folder`."""
    weights = registry.find_version(fp32_uri, "fp32").tags["weights_uri"]
    with tracking.downloaded(weights) as file, torch.no_grad():
        model = load_classifier(file)
    example = torch.zeros(2, 3, image_size, image_size)
    if name == "fp32_onnx":
        from qexp.quantization.onnx import export

        return export(model, example, folder / f"{name}.onnx")
    if name == EAGER:
        return torch.save(model, folder / f"{name}.pt")
    torch.jit.save(freeze(model, image_size, torch.bfloat16 if name == BF16 else torch.float32), folder / f"{name}.pt")


def freeze(model: nn.Module, image_size: int, kind: torch.dtype) -> torch.jit.ScriptModule:
    """The model traced and frozen by TorchScript with weights of this kind, which `model` has afterwards too."""
    example = torch.zeros(2, 3, image_size, image_size, dtype=kind)
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(model.to(kind), example, check_trace=False).eval())


def in_bf16(module: torch.jit.ScriptModule) -> Callable[[Tensor], Tensor]:
    """A module of bf16 as a model of float images and float logits."""
    return lambda images: module(images.bfloat16()).float()


def fetch(contenders: Sequence[Contender], folder: Path) -> tuple[Contender, ...]:
    """The same with copies of their files below `folder`, so that loading them asks no store."""
    places = {uri: str(copy_files(uri, folder)) for uri in dict.fromkeys(one.uri for one in contenders)}
    return tuple(replace(one, uri=places[one.uri]) for one in contenders)


def load(contender: Contender, folder: Path) -> Predict:
    """The model, freshly loaded from what `fetch` and `prepare_baseline` have made ready in `folder`."""
    if contender.name == "fp32_onnx":
        from qexp.quantization.onnx import OnnxClassifier

        return OnnxClassifier(folder / "fp32_onnx.onnx")
    if contender.name == EAGER:
        return torch.load(folder / f"{EAGER}.pt", weights_only=False)  # a whole module, that this process has written
    if contender.name in ("fp32_traced", BF16):
        module = torch.jit.load(folder / f"{contender.name}.pt")
        return in_bf16(module) if contender.name == BF16 else module
    return registry.load_files(contender.uri, contender.backend)
