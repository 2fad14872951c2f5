"""CIFAR-10: the original archive, read by torchvision, decoded once and cached beside it. Feeds datasets.py."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.config import DataConfig
from qexp.data.decoding import DECODER, check_memory, fitted_tensors
from qexp.errors import InputError
from qexp.files import by_umask
from qexp.models.preprocessing import Preprocessing
from qexp.progress import say

CIFAR10_IMAGES = 50_000, 10_000  # to train with, to test with
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Read = tuple[str, tuple[str, ...], dict[str, Tensor]]  # source, class names, the four tensors
LEFT_S = 3600  # after which a cache that was not written to its end is nobody's


def read_cifar10(options: DataConfig, wanted: Preprocessing) -> Read:
    """The original CIFAR-10 archive, read by torchvision, which downloads it unless it is there."""
    root = Path(options.data_dir or "data/cifar10-python")
    folder = root / "cifar-10-batches-py"
    if not folder.is_dir():
        _decode_cifar10(root, wanted)
    files = sorted(str(file) for file in folder.iterdir())
    tensors = cached(
        root, files, wanted, lambda: _decode_cifar10(root, wanted), lambda found: _fits_cifar10(found, wanted)
    )
    return str(root), CIFAR10_CLASSES, tensors


def _fits_cifar10(found: dict[str, Tensor], preprocessing: Preprocessing) -> bool:
    counts: dict[str, int] = {name: len(found[name]) for name in ("train_labels", "test_labels") if name in found}
    return _fit(found, preprocessing, counts) and all(
        found[name].min() >= 0 and found[name].max() < len(CIFAR10_CLASSES) for name in counts
    )


def _decode_cifar10(root: Path, preprocessing: Preprocessing) -> dict[str, Tensor]:
    from qexp.models.vision import torchvision

    check_memory(sum(CIFAR10_IMAGES), preprocessing)
    try:
        sets = [torchvision.datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a proxy's page, a cut-off file: many kinds of errors, the same ways out
        raise InputError(
            f"--dataset cifar10: not in {root}, no download: {error}; put cifar-10-python.tar.gz there, or "
            "use --dataset imagefolder --data-dir DIR (DIR/train/<class>/ and DIR/test/<class>/) or --dataset digits"
        ) from None
    parts = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in sets]
    size = [preprocessing.height_px, preprocessing.width_px]
    if not preprocessing.is_plain:
        parts = [fitted_tensors(part, preprocessing) for part in parts]
    elif size != list(parts[0].shape[-2:]):
        parts = [torchvision.transforms.functional.resize(part, size, antialias=True) for part in parts]
    labels = [torch.tensor(part.targets) for part in sets]
    return tensors_of(parts[0], labels[0], parts[1], labels[1])


def _fit(found: dict[str, Tensor], preprocessing: Preprocessing, counts: dict[str, int]) -> bool:
    """Whether a cache holds the tensors that `tensors_of` names, of their types and shapes; `counts` are of labels."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if len(counts) < 2:
        return False
    for name, count in counts.items():
        expected[name] = torch.int64, (count,)
        expected[name.replace("labels", "images")] = torch.uint8, (count, *preprocessing.shape)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == expected


def tensors_of(*tensors: Tensor) -> dict[str, Tensor]:
    """The four tensors of a data set by name, as they are cached: images and labels of train, then of test."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return dict(zip(names, tensors, strict=True))


def cached(
    root: Path,
    files: Sequence[str],
    preprocessing: Preprocessing,
    read: Callable[[], dict[str, Tensor]],
    fits: Callable[[dict[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """What `read` returns, from the cache in `root` when the files' names, sizes and times are those of last time.

    Args:
        fits: whether the tensors of a cache can be those of these files.
    """
    cache = root / f".qexp-cache-{preprocessing.geometry_text}-{_fingerprint(root, files)}.safetensors"
    with suppress(OSError, SafetensorError, ValueError):
        tensors = load_file(cache)
        if fits(tensors):
            return tensors
    tensors = read()
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        for left in root.glob(".qexp-cache-*.tmp"):  # by a process that was killed: writing one takes seconds
            if time.time() - left.stat().st_mtime > LEFT_S:
                left.unlink()
    try:
        for stale in root.glob(f".qexp-cache-{preprocessing.geometry_text}-*.safetensors"):
            stale.unlink(missing_ok=True)
        with by_umask(temporary):
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
    return hashlib.sha256(f"{DECODER}\n{lines}".encode(errors="surrogateescape")).hexdigest()[:16]
