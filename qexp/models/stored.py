"""The files of a stored classifier: an exported program (pt2), TorchScript (pth) or ONNX, loaded without MLflow."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from qexp.models.names import BY_OPENVINO, OPENVINO_BF16

T = TypeVar("T")
Predict = Callable[[Tensor], Tensor]
SUFFIXES = (".pt2", ".pth", ".onnx")  # of the model itself, beside MLflow's metadata


def model_file(folder: Path) -> Path:
    """The one model file below `folder`."""
    (file,) = [found for found in folder.rglob("model.*") if found.suffix in SUFFIXES]
    return file


def load_module(file: Path) -> nn.Module:
    """A module that this process, or one that it has started, has pickled: never a file of anybody else."""
    module: nn.Module = importing_torchvision(lambda: torch.load(file, weights_only=False))
    return module


def importing_torchvision(work: Callable[[], T]) -> T:
    """What `work` returns, which may import torchvision.

    In a process that has not imported it before, that fails beside a CPU build of torch without the declarations of
    vision.py.
    """
    try:
        return work()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import qexp.models.vision  # noqa: F401

        return work()


def as_other_modules(module: nn.Module) -> nn.Module:
    """The module of an exported program with `eval` and `train` as any other module has them, which torch replaces by
    methods that raise. Both change nothing: the program holds what evaluation computes."""
    for method in ("eval", "train"):
        vars(module).pop(method, None)
    return module


def load_stored(folder: Path, backend: str | None = None) -> Predict:
    """The model whose file is below `folder`: float images [N, 3, H, W] in [0, 1] to float logits [N, classes].

    Args:
        backend: torch's engine for int8 kernels, set for the whole process; of an ONNX file, its runtime, one of
            RUNTIMES. None: torch's as it is, ONNX Runtime.
    """
    file = model_file(folder)
    if file.suffix == ".onnx" and backend in BY_OPENVINO:
        from qexp.models.openvino_file import OpenvinoClassifier

        return OpenvinoClassifier.of_file(file, bf16=backend == OPENVINO_BF16).forward
    if file.suffix == ".onnx":
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(file).forward  # without what calling a module costs, which would be timed
    if backend:
        torch.backends.quantized.engine = backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(file).module() if file.suffix == ".pt2" else torch.jit.load(file).eval()
