"""A float model compiled by torch's inductor with its weights frozen, ahead of time and for each batch size.

A sweep writes it to its own temporary folder, which the compiler's cache shares: nothing of it is left afterwards.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.foundation.environment import environment
from qexp.models.preprocessing import Shape

CACHE = "cache"
# Of inductor. Without the last one it would compile a program for each set of instructions that the CPU has, to see
# whether the compiler knows them, which takes as long as a small network.
OPTIONS = {"freezing": True, "compile_threads": 1, "cpp.vec_isa_ok": True}


def has_compiler() -> bool:
    """Whether the C++ compiler that inductor calls is installed."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


class _InBf16(nn.Module):
    """Float images to float logits, by a network whose weights it makes bf16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.bfloat16())
        return logits.float()


def compile_for(model: nn.Module, shape: Shape, batch_sizes: Sequence[int], folder: Path, bf16: bool = False) -> None:
    """Write the model, compiled for this process's number of threads, to `folder`, a file for each batch size.

    Args:
        model: in evaluation mode; its weights are bf16 afterwards if `bf16`.
    """
    folder.mkdir(exist_ok=True)
    model = _InBf16(model).eval() if bf16 else model
    with _within(folder), torch.no_grad():
        for size in batch_sizes:
            program = torch.export.export(model, (torch.zeros(size, *shape),))
            file = str(_file(folder, size))
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=OPTIONS)
            shutil.rmtree(folder / CACHE, ignore_errors=True)  # which has the weights once more


class Compiled:
    """The models in the folder of `compile_for` as one: the one for the size of the last batch is loaded, the smallest
    at first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._load(min(int(file.stem) for file in folder.glob("*.pt2")))

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != self._size:
            self._load(len(images))
        return self._model(images)

    def _load(self, size: int) -> None:
        with _within(self._folder):
            self._model: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(_file(self._folder, size)))
        self._size = size


def _within(folder: Path) -> AbstractContextManager[None]:
    """Whatever torch compiles, or unpacks to load it, lies in this folder."""
    return environment(TORCHINDUCTOR_CACHE_DIR=str(folder / CACHE), TMPDIR=str(folder))


def _file(folder: Path, batch_size: int) -> Path:
    return folder / f"{batch_size}.pt2"
