"""Checkpoints that others have saved: weights by name from a file, and into a network that they fit.

A checkpoint is data: nothing in it is executed. Whatever is no checkpoint, or fits no network, is one line.
"""

import os
import pickle
import re
import stat
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qexp.errors import InputError, first_line
from qexp.foundation.yaml_file import MOST_OF_A_PATH, shown
from qexp.progress import say

# Where training scripts put the weights of the network, in the order in which they are looked for.
NAMES = (
    "state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "module", "model_ema", "ema",
    "state_dict_ema",
)  # fmt: skip
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch, around any module
NO_NETWORK = ("optim", "sched", "scaler")  # in the names of other things that training scripts save
# Beside the weights: of auxiliary heads, which only training uses, of averages, and of a counter of operations.
NO_WEIGHTS = ("AuxLogits.", "aux1.", "aux2.")
NO_WEIGHTS_AT_THE_END = ("n_averaged", "total_ops", "total_params")
COUNTER = "num_batches_tracked"  # of batch norm, which evaluation does not use
HELD = 3  # names in a message
CODE = "is a pickle with code in it ({}), which is not executed"
CONVERT = "where you trust it, load it and save the weights alone: torch.save(model.state_dict(), FILE)"
# What begins a file that is none of torch's, and what it is.
OTHER_KINDS = (
    (b"\x89HDF", "is an HDF5 file, of Keras perhaps; save the weights with torch"),
    (b"version https://git-lfs", "is a pointer of Git LFS; fetch the file itself: git lfs pull"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x93NUMPY", "is an array of numpy; save the weights with torch"),
)
NUMPYS = "numpy._core.multiarray", "numpy.core.multiarray"  # today's name of the module, and that before numpy 2
DEEPEST = 3  # level of containers below which no weights are looked for


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a file of torch.save or safetensors, by their names in the network that was saved.

    A state dict is taken as it is, or from under one of NAMES, also inside one of them. Tensors are as they are stored;
    those of safetensors and newer files of torch are read when they are used.

    Raises:
        InputError: there is no such file, or it holds something else than the weights of a network.
    """
    start = _start_of(file)
    if _is_safetensors(file, start):
        return _read_safetensors(file)
    found = _weights_in(_load(file, start), file)
    if any(_is_quantized(name, value) for name, value in found.items()):
        raise _wrong(file, "holds weights that are quantized already; give those of the float network")
    return {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def classes_of_weights(network: nn.Module, state: Mapping[str, Tensor], classes: int) -> int | None:
    """The number of classes of a checkpoint that fits the network but for its last layer, which is for `classes`; None
    where it fits, or where more than that differs."""
    own = network.state_dict()
    fit = _fit(own, *_named_alike(own, state))
    return _classes_of_head(fit, classes) if fit.misses == len(fit.reshaped) else None


def load_weights_into(
    network: nn.Module, state: Mapping[str, Tensor], file: Path | str, classes: int, new_head: bool = False
) -> None:
    """Give a network the weights of a checkpoint, all of them, as fp32 where they are half or double precision.

    Prefixes of the names are left out where that makes them fit, and so is what lies outside the prefix: of a loss or
    of metrics, beside the network in the module that was saved. The counters of batch norm may be missing.

    Args:
        file: as messages name it.
        classes: how many classes the data have.
        new_head: where only the last layer has another number of classes, it keeps its fresh weights: for training.

    Raises:
        InputError: they do not fit, or are no finite real numbers; the network is as it was.
    """
    own = network.state_dict()
    named, outside = _named_alike(own, state)
    fit = _fit(own, named, outside)
    head = _classes_of_head(fit, classes)
    if head and new_head and fit.misses == len(fit.reshaped):
        say(f"{_named(file)}: made for {head} classes; the last layer starts anew, for {classes}")
    elif fit.misses:
        raise _wrong(file, _explained(fit, head, classes))
    elif outside := [name for name in outside if not _is_beside(name)]:
        say(f"{_named(file)}: {_listed('beside the network and left out', outside, 'tensor', 'tensors')}")
    found = {name: tensor for name, tensor in fit.found.items() if tensor.shape == own[name].shape}
    _check_numbers(file, {name: tensor for name, tensor in found.items() if own[name].is_floating_point()})
    network.load_state_dict(own | {name: tensor.to(own[name].dtype) for name, tensor in found.items()})


@dataclass(frozen=True)
class _Fit:
    """Weights by the network's names, and what does not fit: names, and of another shape, both shapes."""

    found: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[list[int], list[int]]]  # in the file, in the network

    @property
    def misses(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def _fit(own: Mapping[str, Tensor], named: Mapping[str, Tensor], outside: Sequence[str] = ()) -> _Fit:
    """How weights fit.

    Args:
        named: weights by the network's names, as far as they have some.
        outside: names of others, which count where weights of the network are missing.
    """
    found = {name: tensor for name, tensor in named.items() if name in own}
    shapes = {name: (list(tensor.shape), list(own[name].shape)) for name, tensor in found.items()}
    missing = [name for name in own if name not in named and not name.endswith(COUNTER)]
    return _Fit(
        found,
        missing,
        [name for name in (*named, *(outside if missing else ())) if name not in own and not _is_beside(name)],
        {name: pair for name, pair in shapes.items() if pair[0] != pair[1] and not name.endswith(COUNTER)},
    )


def _is_beside(name: str) -> bool:
    """Whether a tensor is none of the weights that evaluation needs."""
    return name.startswith(NO_WEIGHTS) or name.endswith((*NO_WEIGHTS_AT_THE_END, COUNTER))


def _named_alike(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without the prefix that keeps most of their names from being the network's, and the names of those
    that do not have it. Where a part of the network has another prefix, as its head may, that one is left out too."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    main, *others = [prefix for prefix, _ in Counter(_prefixes(own, state)).most_common()] or [""]
    named = {name.removeprefix(main): tensor for name, tensor in state.items() if name.startswith(main)}
    outside = {name: tensor for name, tensor in state.items() if not name.startswith(main)}
    parts: dict[str, str] = {}  # names of the network, by those in the file
    for prefix in others:
        found = {name: name.removeprefix(prefix) for name in outside if name.startswith(prefix)}
        parts = {name: rest for name, rest in found.items() if rest in own.keys() - named.keys()} | parts
    whole = {rest: outside[name] for name, rest in parts.items()} | named
    if parts and not _fit(own, whole).misses:
        return whole, [name for name in outside if name not in parts]
    return named, list(outside)


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Of each name, what stands before a name of the network's."""
    for name in state:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        yield from (name[:start] for start in starts if name[start:] in own)


def _classes_of_head(fit: _Fit, classes: int) -> int | None:
    """How many classes the file was made for, where nothing else than their number differs."""
    theirs = {shapes[0][0] for shapes in fit.reshaped.values() if shapes[0]}
    alike = all(given[1:] == needed[1:] and needed[:1] == [classes] for given, needed in fit.reshaped.values())
    return theirs.pop() if alike and len(theirs) == 1 else None


def _explained(fit: _Fit, head: int | None, classes: int) -> str:
    shapes = [f"{name} {given}, not {needed}" for name, (given, needed) in fit.reshaped.items()]
    parts = (
        _listed("missing", fit.missing, "key", "keys"),
        _listed("unexpected", fit.unexpected),
        _listed("of another shape", shapes),
    )
    told = f"does not fit the network: {'; '.join(parts)}"
    if head:
        return f"{told}; its last layer is for {head} classes, and the data have {classes}"
    if not fit.found:
        return f"{told}; it is of another network"
    return told


def _listed(what: str, names: Sequence[str], *word: str) -> str:
    count = f"{len(names)} {word[len(names) != 1]}" if word else str(len(names))
    some = ", ".join(shown(name) for name in names[:HELD])
    return f"{count} {what}" + (f" ({some}{', …' if len(names) > HELD else ''})" if names else "")


def _check_numbers(file: Path | str, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise _wrong(file, f"{shown(name)} has a shape and no numbers: it was saved from the device meta")
        if not tensor.is_floating_point() or tensor.element_size() < 2 or tensor.layout != torch.strided:
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            allowed = "weights must be dense float32, float16, bfloat16 or float64"
            raise _wrong(file, f"{shown(name)} is of {kind}; {allowed}")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise _wrong(file, f"{_listed('with NaN or infinite weights', broken, 'tensor', 'tensors')}")


def _start_of(file: Path) -> bytes:
    """The first bytes of a regular file."""
    try:
        mode = os.stat(file).st_mode
        start = b""
        if stat.S_ISREG(mode):  # opening a pipe would wait
            with file.open("rb") as content:
                start = content.read(512)
    except FileNotFoundError:
        raise _wrong(file, "no such file") from None
    except (OSError, ValueError) as error:
        raise _wrong(file, f"cannot be read ({first_line(error)})") from None
    if not stat.S_ISREG(mode):
        raise _wrong(file, "must be a file, and is a folder" if stat.S_ISDIR(mode) else "must be a regular file")
    if not start:
        raise _wrong(file, "is empty")
    for mark, kind in OTHER_KINDS:
        if start.startswith(mark):
            raise _wrong(file, kind)
    if start.lstrip()[:1] == b"<":
        raise _wrong(file, "is HTML or XML, not weights; was a page saved instead of the download?")
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in start) and not zipfile.is_zipfile(file):
        raise _wrong(file, "is text, not weights")
    return start


def _is_safetensors(file: Path, start: bytes) -> bool:
    return file.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _wrong(file, f"is not a whole safetensors file ({first_line(error)})") from None


def _load(file: Path, start: bytes) -> Any:
    """What torch.save has written, by a reader that makes tensors, numbers, text and their containers alone."""
    archive = start.startswith(b"PK")
    if archive:
        _check_archive(file)
    elif start[:1] != b"\x80":
        raise _wrong(file, "is not a file of torch.save or safetensors")
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:GLOBAL|class|operand|instance of) ([\w.]+)", str(error)):
            raise _wrong(file, f"{CODE.format(found[1])}; {CONVERT}") from None
        raise _wrong(file, "is not a file of torch.save, or not all of it") from None
    except EOFError:
        raise _wrong(file, "is not all there: it ends too early") from None
    except Exception as error:  # torch has many for what is damaged
        raise _wrong(file, f"is damaged, or not a file of torch.save ({first_line(error)})") from None


def _harmless() -> list[Any]:
    """What checkpoints hold beside weights, and what making of it runs no code of theirs: the options of a script,
    numbers of numpy."""
    kinds = {type(np.dtype(kind)) for kind in "?US" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
    made = ((function, f"{module}.{function.__name__}") for function in (scalar, _reconstruct) for module in NUMPYS)
    return [Namespace, np.dtype, np.ndarray, *kinds, *made]


def _check_archive(file: Path) -> None:
    """Raise InputError unless a zip archive is one of torch.save's."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise _wrong(file, f"is not all there, or damaged ({first_line(error)})") from None
    if any(name.startswith("code/") or name == "constants.pkl" for name in names):
        raise _wrong(file, f"is a TorchScript archive, code and weights; {CONVERT}")
    if any(name.startswith("models/") or name == "archive_format" for name in names):
        raise _wrong(file, "is an exported program; give it without weights, as --model FILE.pt2")
    if "data.pkl" not in names:
        raise _wrong(file, "is a zip archive, but not of torch.save")


def _weights_in(saved: Any, file: Path) -> Mapping[Any, Any]:
    """The state dict in what was saved."""
    if not isinstance(saved, Mapping):
        raise _wrong(file, f"holds a {type(saved).__name__}, not the weights of a network by name")
    places = _under(NAMES, saved)
    if not places and _is_state_dict(saved):
        return saved
    if places := places or _under(_other_names(saved), saved):
        name, *others = places
        if others and name not in NAMES:
            raise _wrong(file, f"holds weights of several networks, under {', '.join(map(shown, places))}; save one")
        if others:
            say(f"{_named(file)}: the weights under {name} are taken; there are others under {', '.join(others)}")
        return places[name]
    if "param_groups" in saved or "optimizer" in saved or "optimizer_state_dict" in saved:
        raise _wrong(file, "holds the state of an optimizer, and no weights of a network")
    keys = ", ".join(shown(key) for key in list(saved)[:HELD]) or "nothing"
    raise _wrong(file, f"holds no weights: there is {keys}, and none of {', '.join(NAMES)}")


def _under(names: Sequence[str], saved: Mapping[Any, Any], depth: int = DEEPEST) -> dict[str, Mapping[Any, Any]]:
    """The state dicts under these names, or in what is there."""
    return {name: found for name in names if (found := _state_dict_in(saved.get(name), depth)) is not None}


def _state_dict_in(value: Any, depth: int) -> Mapping[Any, Any] | None:
    if not isinstance(value, Mapping) or not depth:
        return None
    if inside := _under(NAMES, value, depth - 1):
        return next(iter(inside.values()))
    if _is_state_dict(value):
        return value
    other = _under(_other_names(value), value, depth - 1)
    return next(iter(other.values())) if len(other) == 1 else None


def _other_names(saved: Mapping[Any, Any]) -> list[str]:
    """Where the weights of a network may be, too."""
    texts = [name for name in saved if isinstance(name, str) and "param_groups" not in saved]
    return [name for name in texts if name not in NAMES and not any(word in name.lower() for word in NO_NETWORK)]


def _is_state_dict(value: Any) -> bool:
    """Whether these are tensors by name; beside them, extra state of layers may be anything."""
    return isinstance(value, Mapping) and any(
        isinstance(inner, Tensor) and isinstance(name, str) for name, inner in value.items()
    )


def _is_quantized(name: Any, value: Any) -> bool:
    return "_packed_params" in str(name) or (isinstance(value, Tensor) and value.is_quantized)


def _named(file: Path | str) -> str:
    return f"--weights {shown(file, MOST_OF_A_PATH)}"


def _wrong(file: Path | str, why: str) -> InputError:
    return InputError(f"{_named(file)}: {why}")
