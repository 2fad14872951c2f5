"""Weights that come with a package: `--weights DEFAULT`, or a name of torchvision's, with the preprocessing and the
class names that belong to them.

Feeds external.py. A file that has been downloaded before is used; otherwise it is fetched.
"""

import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.models import names
from qexp.models.checkpoints import read_checkpoint
from qexp.models.networks import import_timm
from qexp.models.preprocessing import Channels, Interpolation, Preprocessing
from qexp.progress import say

DEFAULT = "DEFAULT"
ANSWER_S = 20.0  # a server that says nothing for so long is away
# Their code turns ImageNet's normalisation into this one, which they were trained with; here it is given at once.
FROM_TENSORFLOW = ("googlenet", "inception_v3")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # on the hub, the first one wherever both are
OLD_DENSE_LAYER = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\..*)")  # in files of torchvision 0.2


def is_published(weights: str) -> bool:
    """Whether `--weights` names weights of a package, not a file: in capitals, as torchvision does."""
    return bool(re.fullmatch(r"[A-Z][A-Z0-9_]*", weights)) and not os.path.lexists(weights)


def published_file(model: str, weights: str) -> Path:
    """The file with these weights, downloaded unless it is there.

    Raises:
        InputError: there are no such weights, or they are not here and cannot be downloaded.
    """
    return _timm_file(model, weights) if model.startswith(names.TIMM) else _torchvision_file(model, weights)


def published_weights(model: str, weights: str) -> dict[str, Tensor]:
    """The weights in that file, by name.

    Raises:
        InputError: as `published_file` and `read_checkpoint`.
    """
    state = read_checkpoint(published_file(model, weights))
    if model.startswith("densenet"):
        state = {OLD_DENSE_LAYER.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    return state


def own_preprocessing(model: str, weights: str | None) -> Preprocessing | None:
    """What the authors of these weights give their network; None where nothing is known. For timm's models it is
    known without weights too.

    Raises:
        InputError: there are no such weights, or no such model.
    """
    if model.startswith(names.TIMM):
        return _timm_preprocessing(model)
    if weights is None or not is_published(weights):
        return None
    found: Any = _weights_of(model, weights).transforms()
    mean, std = (0.5,) * 3, (0.5,) * 3
    if model not in FROM_TENSORFLOW:
        mean, std = tuple(found.mean), tuple(found.std)
    (side,), (resize,) = found.crop_size, found.resize_size
    return Preprocessing(side, side, resize, found.interpolation.value, "rgb", mean, std)


def own_classes(model: str, weights: str | None) -> tuple[str, ...] | None:
    """The names of the classes of these weights in the order of the logits; None where they are not known."""
    if weights is None or not is_published(weights) or model.startswith(names.TIMM):
        return None
    return tuple(_weights_of(model, weights).meta["categories"])


def sha256_of(file: Path) -> str:
    """Of a whole file, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _weights_of(model: str, weights: str) -> Any:
    if names.is_file(model) or names.is_factory(model) or model == "smallnet":
        raise InputError(f"--weights {weights}: must be a file; only models of torchvision and timm have some by name")
    from qexp.models.vision import torchvision

    known = torchvision.models.get_model_weights(model).__members__
    if weights not in known:
        allowed = ", ".join(known) or "a file: there are none"
        raise InputError(f"--weights {weights}: no such weights of {model}, and no such file; must be {allowed}")
    return known[weights]


def _torchvision_file(model: str, weights: str) -> Path:
    url = _weights_of(model, weights).url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    found = re.search(r"-([a-f0-9]{8,})\.", file.name)
    digest = found[1] if found else ""
    if file.is_file():
        if not sha256_of(file).startswith(digest):
            say(f"warning: {file} is not the file that torchvision publishes, whose SHA-256 begins with {digest}")
        return file
    say(f"downloading {url}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _patience():
            torch.hub.download_url_to_file(url, str(file), digest or None, progress=False)
    except Exception as error:  # of the network, the disk, or a wrong digest
        why = f"{url} cannot be downloaded ({first_line(error)})"
        raise InputError(f"--weights {weights}: {why}; the file is expected at {file}") from None
    return file


def _timm_file(model: str, weights: str) -> Path:
    """From the cache of Hugging Face's client, which would try for most of a minute where there is no network."""
    if weights != DEFAULT:
        raise InputError(f"--weights {weights}: must be a file or DEFAULT; timm has others as --model {model}.TAG")
    timm = import_timm(model)
    import huggingface_hub as hub

    config = timm.get_pretrained_cfg(model.removeprefix(names.TIMM), allow_unregistered=True)
    if not (config and config.hf_hub_id):
        raise InputError(f"--weights {weights}: timm has no weights of {model}")
    found = [hub.try_to_load_from_cache(config.hf_hub_id, file) for file in TIMM_FILES]
    for file in found:
        if isinstance(file, str):
            return Path(file)
    url = hub.hf_hub_url(config.hf_hub_id, TIMM_FILES[0])
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S).close()
        say(f"downloading {url}")
        return Path(hub.hf_hub_download(config.hf_hub_id, TIMM_FILES[0]))
    except Exception as error:  # of the network, the disk, or the hub
        folder = Path(hub.constants.HF_HUB_CACHE, f"models--{config.hf_hub_id.replace('/', '--')}")
        why = f"{url} cannot be downloaded ({first_line(error)})"
        raise InputError(f"--weights {weights}: {why}; the file is expected in {folder}") from None


def _timm_preprocessing(model: str) -> Preprocessing | None:
    timm = import_timm(model)
    config = timm.get_pretrained_cfg(model.removeprefix(names.TIMM), allow_unregistered=True)
    if config is None:
        return None
    found = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    channels, height, width = found["input_size"]
    resize = None if found["crop_mode"] == "squash" else floor(min(height, width) / found["crop_pct"])
    method: Interpolation = found["interpolation"]
    method = method if method in get_args(Interpolation) else "bilinear"
    colours: Channels = "grey" if channels == 1 else "rgb"
    return Preprocessing(height, width, resize, method, colours, tuple(found["mean"]), tuple(found["std"]))


@contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(ANSWER_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
