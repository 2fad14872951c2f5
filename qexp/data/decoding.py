"""Image files of any kind to uint8 pixels, resized and cropped as a model's preprocessing asks.

Whatever is in a file, the answer is pixels or one line that names it. Feeds images.py and `qexp predict`.
"""

import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.measurement.host import free_memory_bytes, read_cpus
from qexp.models.preprocessing import Preprocessing
from qexp.progress import track

warnings.filterwarnings("ignore", "Palette images with Transparency")  # which is dropped, as intended
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from half the limit on
MOST_PIXELS = "QEXP_MAX_IMAGE_PIXELS"  # environment variable; without it, Pillow's 178,956,970
# What Pillow opens only with the help of another program, or names without decoding.
NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
DECODER = 2  # version of the decoding below, in the names of caches: 2 honours EXIF orientations
BROKEN = "--data-dir: broken image"


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


def decode_files(files: Sequence[str], preprocessing: Preprocessing, what: str = BROKEN) -> Tensor:
    """Decode to uint8 [N, *preprocessing.shape], as `fitted` brings each image to that shape.

    Raises:
        InputError: a file is no image or is cut off (the message begins with `what` and names it), or the memory does
            not hold so many images.
    """
    check_memory(len(files), preprocessing)
    images = np.empty((len(files), *preprocessing.shape), dtype=np.uint8)
    for row, image in enumerate(track(decoded(files, preprocessing, what), "decoding images", len(files))):
        images[row] = image
    return torch.from_numpy(images)


def decoded(files: Sequence[str], preprocessing: Preprocessing, what: str = BROKEN) -> Iterator[np.ndarray]:
    """The pixels of each file, uint8 of `preprocessing.shape`, in their order, decoded by several threads.

    Raises:
        InputError: as `decode_files`.
    """
    _allow_pixels()
    threads = read_cpus().most_busy  # PIL lets go of the interpreter lock while it decodes
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(partial(_decode, preprocessing=preprocessing, what=what), files)


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
