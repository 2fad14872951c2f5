"""Images on disk to uint8 tensors: `DIR/train/<class>/*` and `DIR/test/<class>/*`, decoded once, cached beside them.

Takes folders that anybody made; whatever is in them, the answer is tensors or one line that names the file. Feeds
datasets.py, and decodes the files of `qexp predict`.
"""

import hashlib
import math
import os
import re
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.files import by_umask
from qexp.measurement.host import free_memory_bytes, read_cpus
from qexp.models.preprocessing import Preprocessing
from qexp.progress import say, track

warnings.filterwarnings("ignore", "Palette images with Transparency")  # which is dropped, as intended
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from half the limit on
MOST_PIXELS = "QEXP_MAX_IMAGE_PIXELS"  # environment variable; without it, Pillow's 178,956,970
# What Pillow opens only with the help of another program, or names without decoding.
NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
LEFT_S = 3600  # after which a cache that was not written to its end is nobody's
DECODER = 2  # version of the decoding below, in the caches' names: 2 honours EXIF orientations


@cache
def formats() -> tuple[str, ...]:
    """The image formats that Pillow decodes by itself, by its names for them, in the order in which they are tried."""
    Image.init()
    able = set(Image.OPEN) - NOT_DECODED
    usual = [name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF") if name in able]
    return (*usual, *sorted(able.difference(usual)))


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of these formats, in small letters."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


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
    names = sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and not entry.name.startswith("."))
    for name in names:
        if not _is_text(name):
            shown = os.fsencode(name).decode(errors="backslashreplace")
            raise InputError(f"--data-dir {root}: the name of class folder {part}/{shown} is not UTF-8; rename it")
    return names


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise InputError(f"--data-dir: {entry.path}: cannot be read ({error.strerror})") from None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_files(folder: Path) -> list[str]:
    """Image files of one class, sub-folders and links to folders included, in the same order on every machine."""
    found, entered = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in entered:  # by a link that leads back, or two to one folder
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk goes into what is left here
        found += [os.path.join(top, name) for name in names if not name.startswith(".")]
    images = sorted(filter(_is_image, found))
    if skipped := Counter(os.path.splitext(file)[1] or "no suffix" for file in set(found).difference(images)):
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(skipped.items()))
        say(f"class {folder.name}: {skipped.total()} files of {folder} are skipped, which are no images: {kinds}")
    if not images:
        raise InputError(f"--data-dir: class {folder.name} is empty: no image in {folder}")
    return images


def _is_image(file: str) -> bool:
    """By its suffix, or, without one, by its first bytes. What is named as an image and is no file is refused."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in suffixes() and suffix:
        return False
    with suppress(OSError):  # decoding says what is wrong with a link that leads nowhere
        if not stat.S_ISREG(os.stat(file).st_mode):
            if suffix:
                raise InputError(f"--data-dir: {file}: is no regular file")
            return False
    if suffix:
        return True
    try:
        with Image.open(file, formats=formats()):
            return True
    except Image.DecompressionBombError:  # decoding says so
        return True
    except Exception:  # of what is no image, each of Pillow's decoders raises what it likes
        return False


def decode_files(files: Sequence[str], preprocessing: Preprocessing, what: str = "--data-dir: broken image") -> Tensor:
    """Decode to uint8 [N, *preprocessing.shape], as `fitted` brings each image to that shape.

    Raises:
        InputError: a file is no image or is cut off (the message begins with `what` and names it), or the memory does
            not hold so many images.
    """
    check_memory(len(files), preprocessing)
    _allow_pixels()
    images = np.empty((len(files), *preprocessing.shape), dtype=np.uint8)
    with ThreadPoolExecutor(read_cpus().most_busy) as pool:  # PIL lets go of the interpreter lock while it decodes
        decoded = pool.map(partial(_decode, preprocessing=preprocessing, what=what), files, chunksize=256)
        for row, image in enumerate(track(decoded, "decoding images", len(files))):
            images[row] = image
    return torch.from_numpy(images)


def _allow_pixels() -> None:
    """Set how many pixels an image may have before it is decoded: a small file can hold as many as fill the memory.

    Raises:
        InputError: the environment variable holds no number.
    """
    text = os.environ.get(MOST_PIXELS, "").strip()
    if not text:
        return
    if not re.fullmatch(r"[1-9]\d{0,11}", text, re.ASCII):
        raise InputError(f"{MOST_PIXELS} {text}: must be a number of pixels, 1 or more")
    Image.MAX_IMAGE_PIXELS = math.ceil(int(text) / 2)  # of which Pillow refuses more than twice as many


def _decode(file: str, preprocessing: Preprocessing, what: str) -> np.ndarray:
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would be waited for
            raise ValueError("is no regular file")
        with Image.open(file, formats=formats()) as opened:
            if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # asked first: turning costs, even by nothing
                ImageOps.exif_transpose(opened, in_place=True)
            return fitted(_with_8_bits(opened).convert("RGB"), preprocessing)
    except Image.DecompressionBombError as error:
        said = re.sub(" pixels, could be .*", " pixels", first_line(error))
        raise InputError(f"{what} {file}: {said}; if you trust the file, set {MOST_PIXELS} to more") from None
    except Exception as error:  # of a broken file, each of Pillow's decoders raises what it likes
        raise InputError(f"{what} {file}: {first_line(error)}") from None


def fitted(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image as uint8 of `preprocessing.shape`: RGB for BGR networks too, which turn the channels themselves.

    With `resize_px`, the pixels are those of torchvision's Resize(resize_px) and CenterCrop; without, those of Resize
    to height and width, whatever the aspect.
    """
    if preprocessing.channels == "grey":
        image = image.convert("L")
    height, width = preprocessing.height_px, preprocessing.width_px
    size = (width, height) if preprocessing.resize_px is None else _short_side(image.size, preprocessing.resize_px)
    if image.size != size:
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    if image.size != (width, height):
        left, top = (_start(have, want) for have, want in zip(image.size, (width, height), strict=True))
        image = image.crop((left, top, left + width, top + height))  # black where it is outside the image
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def fitted_tensors(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`fitted` for images in memory, uint8 [N, 3, H, W]."""
    return torch.from_numpy(
        np.stack([fitted(Image.fromarray(image), preprocessing) for image in images.permute(0, 2, 3, 1).numpy()])
    )


def _short_side(size: tuple[int, int], length: int) -> tuple[int, int]:
    """Width and height with the short side that long, the other rounded down."""
    short, long = min(size), max(size)
    other = int(length * long / short)
    return (length, other) if size[0] <= size[1] else (other, length)


def _start(have: int, want: int) -> int:
    """Where the middle `want` of `have` pixels begin; negative where a border is added, the larger part at the end."""
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Grey with 16 bits scaled to 8, which `convert` would clip; ValueError where there is no saying what white is."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # a PNG has 16 bits at most
        raise ValueError("has 32 bits a pixel, whose range is not known; save it with 8 or 16 bits")
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I") else image


def check_memory(count: int, preprocessing: Preprocessing) -> None:
    """Raise InputError unless the memory holds so many images twice: all of them, and the parts that they are split
    into."""
    need, free = 2 * count * math.prod(preprocessing.shape), free_memory_bytes()
    if free is not None and need > free:
        raise InputError(
            f"--image-size {preprocessing.size_text}: {count:,} images need {need / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free; use fewer images or a smaller size"
        )


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
