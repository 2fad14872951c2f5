"""The files of a stored classifier: an exported program (pt2), TorchScript (pth) or ONNX, loaded without MLflow."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
SUFFIXES = (".pt2", ".pth", ".onnx")  # of the model itself, beside MLflow's metadata


def model_file(folder: Path) -> Path:
    """The one model file below `folder`."""
    (file,) = [found for found in folder.rglob("model.*") if found.suffix in SUFFIXES]
    return file


def load_stored(folder: Path, backend: str | None = None) -> Predict:
    """The model whose file is below `folder`: float images [N, 3, H, W] in [0, 1] to float logits [N, classes].

    Args:
        backend: torch's engine for int8 kernels, set for the whole process; None: as it is.
    """
    file = model_file(folder)
    if file.suffix == ".onnx":
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(file)
    if backend:
        torch.backends.quantized.engine = backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(file).module() if file.suffix == ".pt2" else torch.jit.load(file).eval()
