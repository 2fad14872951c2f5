"""`--model FILE.pt2`: an exported program of torch as a network: its weights are inside, and its code is fixed.

A program is code, as a Python module is: torch runs what the file says. Feeds networks.py.
"""

import copy
import io
import logging
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.errors import InputError
from qexp.models.layers import with_layers
from qexp.models.stored import as_other_modules
from qexp.progress import quiet


def load_program(file: Path) -> nn.Module:
    """The network in an exported program, for batches of any size where its operations take them.

    Raises:
        InputError: it is not an exported program, or one of another torch.
    """
    return _read(file, f"--model {file}")


def as_network(module: nn.Module) -> nn.Module:
    """A module as networks are here: of one that `torch.export` has given, which can be put into no mode, a copy that
    can, with layers; any other as it is."""
    if not isinstance(module, torch.fx.GraphModule) or "train" not in vars(module):
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_layers(as_other_modules(copy.deepcopy(module)))  # type: ignore[arg-type]


def program_bytes(network: nn.Module, example: Tensor) -> bytes:
    """A network that `load_program` gave, without its weights, for `program_from`.

    Args:
        example: images that it takes, two or more.
    """
    batch = torch.export.Dim("batch", min=1, max=65_536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        for name, value in program.state_dict.items():
            small = torch.zeros((), dtype=value.dtype).expand(value.shape)  # one number, whatever its shape
            program.state_dict[name] = nn.Parameter(small, False) if isinstance(value, nn.Parameter) else small
        written = io.BytesIO()
        torch.export.save(program, written)
    return written.getvalue()


def program_from(content: bytes) -> nn.Module:
    """The network that `program_bytes` wrote; its weights are to be assigned, not copied into it."""
    return _read(io.BytesIO(content), "the program in the weights file")


def _read(source: Path | io.BytesIO, what: str) -> nn.Module:
    if not zipfile.is_zipfile(source):
        raise InputError(f"{what}: not an exported program, which torch.export.save writes")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with (
            warnings.catch_warnings(),
            quiet("torch.export", logging.CRITICAL),
        ):  # which logs a traceback before it raises
            warnings.simplefilter("ignore")
            module = torch.export.load(source).module()
    except Exception as error:  # torch, zipfile and json have their own types
        why = "it is not one, is damaged, or is one of another version of torch"
        raise InputError(f"{what}: does not load as an exported program ({type(error).__name__}): {why}") from None
    return with_layers(as_other_modules(module))  # type: ignore[arg-type]
