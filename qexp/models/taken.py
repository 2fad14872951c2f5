"""Models that qexp has not built: a module, an exported program or an ONNX file of somebody else's.

pipeline/take.py takes them in. Those that a clean process cannot build again from a name travel as an exported program.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import StageError, with_place
from qexp.models.classifier import Classifier, ModelSpec, check_network, normalization
from qexp.models.names import OBJECT, is_rebuilt_by_name
from qexp.models.program import load_program
from qexp.models.stored import model_file
from qexp.progress import quiet


def wrap(module: nn.Module, spec: ModelSpec) -> Classifier:
    """A module of somebody else's, with its normalisation before it.

    Raises:
        InputError: it does not take such images, or gives another number of logits than there are classes.
    """
    own = ModelSpec(OBJECT + spec.architecture.removeprefix(OBJECT), spec.classes, spec.preprocessing)
    classifier = Classifier(own, *normalization(spec.preprocessing, None), module).eval()
    check_network(classifier, own)
    return classifier


def is_rebuilt(model: Any) -> bool:
    """Whether a clean process can build this model again from its spec and its weights."""
    return isinstance(model, Classifier) and is_rebuilt_by_name(model.spec.architecture)


def is_onnx(model: Any) -> bool:
    """Whether a model is an ONNX file run by ONNX Runtime; onnx is not imported to find out."""
    return hasattr(model, "SerializeToString") or hasattr(model, "canonical")


def count_parameters(model: Any) -> int:
    """Numbers in all weights of a module or of an ONNX model."""
    if is_onnx(model):
        graph = (model if hasattr(model, "SerializeToString") else model.canonical).graph
        return sum(math.prod(tensor.dims) for tensor in graph.initializer)
    return sum(parameter.numel() for parameter in model.parameters())


def export_program(model: nn.Module, example: Tensor, file: Path) -> None:
    """Write a module in evaluation mode as an exported program (pt2) for batches of any size.

    Args:
        example: float [N >= 2, C, H, W].

    Raises:
        StageError: torch.export does not take the module; the message names the operation.
    """
    batch = torch.export.Dim("batch", min=1, max=65_536)
    try:
        with warnings.catch_warnings(), _without_graph(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy.deepcopy(model).eval(), (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, file)
    except Exception as error:  # torch.export raises whatever the module's Python code does with a symbol
        raise StageError(f"the model cannot be stored: torch.export does not take it ({with_place(error)})") from error


@contextmanager
def _without_graph() -> Iterator[None]:
    """While the block lasts, torch does not print the whole graph of a module that it cannot export."""
    with quiet("torch.fx.experimental.symbolic_shapes", logging.CRITICAL), redirect_stderr(io.StringIO()):
        yield


def load_taken(folder: Path, spec: ModelSpec) -> nn.Module:
    """The model whose exported program or ONNX file is below `folder`, with the spec that its version has."""
    file = model_file(folder)
    if file.suffix == ".onnx":
        from qexp.models.onnx_input import read_canonical

        model: nn.Module = read_canonical(file, spec.shape, len(spec.classes))
    else:
        model = load_program(file)
    model.spec = spec  # type: ignore[assignment]
    return model


def as_model(stored: Any, spec: ModelSpec) -> Any:
    """What a registry stores of an fp32 model, as the stages take it: a module that has its spec."""
    if hasattr(stored, "SerializeToString"):
        from qexp.models.onnx_input import OnnxNetwork

        stored = OnnxNetwork(stored, spec.shape, len(spec.classes), Path(spec.architecture), ())
    if not isinstance(stored, Classifier):
        stored.spec = spec
    return stored
