"""How an image becomes the input of a classifier: size, crop, colours, and the scale of its values.

It belongs to the model and is registered with it. `data/` makes the pixels that it asks for; the arithmetic on their
values is the model's first layer, so that every model takes the same images: RGB or grey, float in [0, 1].
"""

from dataclasses import dataclass
from typing import Literal

from qexp.config import DataConfig

Shape = tuple[int, int, int]  # of one image: channels, height and width in pixels
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Channels = Literal["rgb", "bgr", "grey"]


@dataclass(frozen=True)
class Preprocessing:
    """The image that a classifier is given.

    `resize_px` is the length of the short side before the middle is cropped; None: the whole image is resized to
    `height_px` and `width_px`, whatever its aspect. `channels` is the order in which the network expects colours. It
    sees (v - mean) / std of each channel, in its own order, with v a value on the scale `input_range`, which black and
    white have; without `mean` and `std`, those of the training images are taken.
    """

    height_px: int
    width_px: int
    resize_px: int | None = None
    interpolation: Interpolation = "bilinear"
    channels: Channels = "rgb"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_range: tuple[float, float] = (0.0, 1.0)

    @property
    def shape(self) -> Shape:
        """Of an image in [0, 1] that a registered model takes."""
        return 1 if self.channels == "grey" else 3, self.height_px, self.width_px

    @property
    def size_text(self) -> str:
        """Height and width as the options take them: 224, or 48x192."""
        return size_text(self.height_px, self.width_px)

    @property
    def is_plain(self) -> bool:
        """Whether the whole image is resized bilinearly and keeps its colours."""
        return self.geometry_text == f"{self.size_text}px"

    @property
    def geometry_text(self) -> str:
        """What decides on the pixels: two preprocessings with the same text get the same images from `data/`."""
        resize = f"r{self.resize_px}-" if self.resize_px else ""
        interpolation = f"{self.interpolation}-" if self.interpolation != "bilinear" else ""
        return f"{resize}{interpolation}{'grey-' if self.channels == 'grey' else ''}{self.size_text}px"


def squashed(size_px: int) -> Preprocessing:
    """The whole image, resized to a square."""
    return Preprocessing(size_px, size_px)


def size_text(height_px: int, width_px: int) -> str:
    """224 for a square, 48x192 for height and width."""
    return str(height_px) if height_px == width_px else f"{height_px}x{width_px}"


def preprocessing_of(options: DataConfig) -> Preprocessing:
    """What the options ask for."""
    return Preprocessing(*options.size_px)
