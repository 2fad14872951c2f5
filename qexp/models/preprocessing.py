"""How an image becomes the input of a classifier: size, crop, colours, and the scale of its values.

It belongs to the model and is registered with it. `data/` makes the pixels that it asks for; the arithmetic on their
values is the model's first layer, so that every model takes the same images: RGB or grey, float in [0, 1].
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from qexp.config import DataConfig, PreprocessConfig
from qexp.errors import InputError

NOTHING_GIVEN = PreprocessConfig()
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
    def changes_values(self) -> bool:
        """Whether values in [0, 1], in the order RGB, are not what the network expects."""
        return self.mean is not None or self.input_range != (0.0, 1.0) or self.channels == "bgr"

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


def preprocessing_of(
    data: DataConfig, options: PreprocessConfig = NOTHING_GIVEN, own: Preprocessing | None = None
) -> Preprocessing:
    """What the options ask for.

    Args:
        data: has the size of the input, unless `options` has a crop. A size that nobody gave asks for nothing.
        own: of the model's weights: it holds where an option is not given. For another size, its resize changes in
            proportion.

    Raises:
        InputError: options contradict each other, or mean and standard deviation are not given together, one for each
            channel.
    """
    given = options.completed()
    asked: dict[str, Any] = {
        "resize_px": given.resize, "interpolation": given.interpolation, "channels": given.channels,
    }  # fmt: skip
    size = data.size_px if own is None or not data.has_default_size else (own.height_px, own.width_px)
    if given.crop_px is not None:
        if not data.has_default_size and data.size_px != given.crop_px:
            raise InputError(f"--image-size {data.image_size}: must be that of --crop, {given.crop}")
        size = given.crop_px
    elif own is None and given.resize is not None and data.has_default_size:
        raise InputError(f"--resize {given.resize}: needs --crop, the size of the middle that the model is given")
    if given.input_range is not None:
        low, high = given.input_range.split(",")
        asked["input_range"] = float(low), float(high)
    if own and own.resize_px and given.resize is None:
        asked["resize_px"] = own.resize_px * min(size) // min(own.height_px, own.width_px)
    found = replace(
        own or Preprocessing(*size),
        height_px=size[0],
        width_px=size[1],
        **{name: value for name, value in asked.items() if value is not None},
    )
    if given.mean is None and given.std is None:
        return found
    mean, std = (_one_a_channel(name, getattr(given, name), found) for name in ("mean", "std"))
    return replace(found, mean=mean, std=std)


def as_options(found: Preprocessing) -> dict[str, Any]:
    """The options of section `preprocess` that ask for this one whatever else is known of a model."""
    values: dict[str, Any] = {
        "resize": found.resize_px, "interpolation": found.interpolation, "channels": found.channels,
        "crop": found.size_text, "input_range": ",".join(f"{value:g}" for value in found.input_range),
    }  # fmt: skip
    values |= {name: list(given) for name in ("mean", "std") if (given := getattr(found, name))}
    return values


def _one_a_channel(name: str, values: list[float] | None, preprocessing: Preprocessing) -> tuple[float, ...]:
    """The values of `mean` or `std`; one alone stands for all channels."""
    other, channels = {"mean": "std", "std": "mean"}[name], preprocessing.shape[0]
    if values is None:
        raise InputError(f"--{name}: must be given with --{other}")
    if len(values) not in (1, channels):
        shown, allowed = ",".join(f"{value:g}" for value in values), "1 value" if channels == 1 else "1 or 3 values"
        raise InputError(f"--{name} {shown}: must be {allowed} for --channels {preprocessing.channels}")
    return tuple(values) if len(values) == channels else tuple(values) * channels
