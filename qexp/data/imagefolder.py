"""Images on disk to uint8 tensors: `DIR/train/<class>/*` and `DIR/test/<class>/*`, decoded once, cached beside them."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.measurement.host import read_cpus
from qexp.progress import say, track

warnings.filterwarnings("ignore", "Palette images with Transparency")  # which is dropped, as intended
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def list_folder(root: Path) -> tuple[tuple[str, ...], dict[str, list[list[str]]]]:
    """Class names in alphabetical order and, for train and test, the image files of each class in order of name.

    Raises:
        InputError: a class is empty, or train and test have different classes.
    """
    classes = {part: _class_names(root, part) for part in ("train", "test")}
    if different := sorted(set(classes["train"]) ^ set(classes["test"])):
        where = "train" if different[0] in classes["train"] else "test"
        raise InputError(
            f"--data-dir {root}: train and test must have the same classes; {different[0]} is only in {where}"
        )
    if len(classes["train"]) < 2:
        raise InputError(f"--data-dir {root}: needs at least 2 class folders in train/, found {classes['train']}")
    files = {part: [_class_files(root / part / name) for name in names] for part, names in classes.items()}
    return tuple(classes["train"]), files


def _class_names(root: Path, part: str) -> list[str]:
    folder = root / part
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _class_files(folder: Path) -> list[str]:
    """Image files of one class, sub-folders included, in the same order on every machine."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes into what is left here
        found += [os.path.join(top, name) for name in names if not name.startswith(".")]
    images = sorted(file for file in found if os.path.splitext(file)[1].lower() in SUFFIXES)
    if not images:
        raise InputError(f"--data-dir: class {folder.name} is empty: no image in {folder}")
    return images


def decode_files(files: Sequence[str], image_size: int, what: str = "--data-dir: broken image") -> Tensor:
    """Decode to RGB, uint8 [N, 3, image_size, image_size]; another size is resized (bilinear, antialiased, uncropped).

    Raises:
        InputError: a file is no image or is cut off; the message begins with `what` and names it.
    """
    images = np.empty((len(files), 3, image_size, image_size), dtype=np.uint8)
    with ThreadPoolExecutor(read_cpus().most_busy) as pool:  # PIL lets go of the interpreter lock while it decodes
        decoded = pool.map(partial(_decode, image_size=image_size, what=what), files, chunksize=256)
        for row, image in enumerate(track(decoded, "decoding images", len(files))):
            images[row] = image
    return torch.from_numpy(images)


def _decode(file: str, image_size: int, what: str) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            image = _with_8_bits(opened).convert("RGB")
    except Exception as error:  # of a broken file, each of Pillow's decoders raises what it likes
        raise InputError(f"{what} {file}: {first_line(error)}") from None
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Grey with 16 bits scaled to 8, which `convert` would clip; ValueError where there is no saying what white is."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # a PNG has 16 bits at most
        raise ValueError("has 32 bits a pixel, whose range is not known; save it with 8 or 16 bits")
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I") else image


def cached(
    root: Path, files: Sequence[str], image_size: int, read: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `read` returns, from the cache in `root` when the files' names, sizes and times are those of last time."""
    cache = root / f".qexp-cache-{image_size}px-{_fingerprint(root, files)}.safetensors"
    try:
        return load_file(cache)
    except (FileNotFoundError, SafetensorError):
        tensors = read()
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        for stale in root.glob(f".qexp-cache-{image_size}px-*.safetensors"):
            stale.unlink(missing_ok=True)
        save_file(tensors, temporary)
        temporary.replace(cache)
    except (OSError, SafetensorError) as error:  # a read-only or full disk costs the next start some seconds, no more
        with suppress(OSError):
            temporary.unlink()
        say(f"no cache of the decoded images in {root}: {error}")
    return tensors


def _fingerprint(root: Path, files: Sequence[str]) -> str:
    """A digest of names below `root`, sizes and times; plain strings, since Path costs 60,000 files a second."""
    start = len(str(root)) + 1
    try:
        status = [(file[start:], os.stat(file)) for file in files]
    except OSError as error:
        raise InputError(f"--data-dir: cannot read {error.filename}: {error.strerror}") from None
    lines = "\n".join(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}" for name, facts in status)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]
