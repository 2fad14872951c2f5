"""Versions of the registry that qexp has not registered: any model of PyTorch or ONNX that MLflow holds."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlflow
from mlflow.models import Model
from torch import nn

from qexp.errors import InputError, first_line
from qexp.models.factories import current_folder
from qexp.models.preprocessing import Preprocessing
from qexp.progress import quiet
from qexp.tracking import registry
from qexp.tracking.integrity import copied
from qexp.tracking.store import uri_of
from qexp.tracking.tags import tags_of


def is_own(uri: str) -> bool:
    """Whether a run of qexp has registered this version as fp32, so that its data and its tags are known.

    Raises:
        InputError: it does not exist.
    """
    tags = registry.look_up(uri, "MODEL").tags
    return tags.get("kind") == "fp32" and tags.get(registry.MADE_BY) != registry.OWN


def registered_input(uri: str) -> Preprocessing | None:
    """The images that a version of `qexp.register` takes, whose arithmetic on values is inside; None of any other."""
    found = registry.look_up(uri, "MODEL")
    if found.tags.get(registry.MADE_BY) != registry.OWN:
        return None
    taken = tags_of(found).input
    return replace(
        taken, channels="grey" if taken.channels == "grey" else "rgb", mean=None, std=None, input_range=(0.0, 1.0)
    )


def load_plain(uri: str, folder: Path) -> nn.Module | Path:
    """The module of a version of flavour pytorch, loaded by MLflow, or the ONNX file of one of flavour onnx, which lies
    below `folder` then.

    MLflow may open a pickle for it, as its own functions do; MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false forbids that.

    Raises:
        InputError: the version does not exist, is of another flavour, or MLflow cannot load it.
    """
    found = registry.look_up(uri, "MODEL")
    with ExitStack() as stack:
        copy = stack.enter_context(copied(uri_of(found)))
        flavors = Model.load(str(copy)).flavors
        if "onnx" in flavors:
            file = copy / str(flavors["onnx"]["data"])
            return Path(file).rename(folder / "model.onnx")
        if "pytorch" not in flavors:
            has = ", ".join(sorted(set(flavors) - {"python_function"})) or "none"
            raise InputError(f"MODEL {uri}: must have MLflow's flavour pytorch or onnx, and has {has}")
        try:
            with quiet("mlflow"), current_folder():  # a pickle names the module that its class is in
                model: nn.Module = mlflow.pytorch.load_model(str(copy))
        except Exception as error:  # a class that is not importable, a pickle that is not allowed, another torch
            raise InputError(f"MODEL {uri}: cannot be loaded by MLflow ({first_line(error)})") from None
        return model
