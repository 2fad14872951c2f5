"""What the options say of the images that a model is given."""

from dataclasses import replace

import pytest

from qexp.config import DataConfig, load_config
from qexp.errors import InputError
from qexp.models.preprocessing import Preprocessing, preprocessing_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _asked(*words: str, own: Preprocessing | None = None) -> Preprocessing:
    """As `--resize 256 --image-size 224` says; the options of data are told by their names."""
    overrides: dict[str, dict[str, str | list[str]]] = {"data": {}, "preprocess": {}}
    for option, text in zip(words[::2], words[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        values = text.split(",") if name in ("mean", "std") else text
        overrides["data" if name in DataConfig.model_fields else "preprocess"][name] = values
    config = load_config(None, overrides)
    found = preprocessing_of(config.data, config.preprocess, own)
    if own is None:
        assert config.data.size_px == (found.height_px, found.width_px)
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Preprocessing(32, 32)),
        ("--image-size 48x192", Preprocessing(48, 192)),
        ("--preprocess imagenet", Preprocessing(224, 224, 256, "bilinear", "rgb", *IMAGENET)),
        (
            "--preprocess imagenet --crop 288 --interpolation bicubic",
            Preprocessing(288, 288, 256, "bicubic", "rgb", *IMAGENET),
        ),
        ("--crop 20x30 --resize 36", Preprocessing(20, 30, 36)),
        ("--mean 0 --std 1", Preprocessing(32, 32, mean=(0.0,) * 3, std=(1.0,) * 3)),
        (
            "--channels grey --mean 0.5 --std 0.25 --input-range -1,1",
            Preprocessing(32, 32, channels="grey", mean=(0.5,), std=(0.25,), input_range=(-1.0, 1.0)),
        ),
        ("--input-range 0,255 --channels bgr", Preprocessing(32, 32, channels="bgr", input_range=(0.0, 255.0))),
    ],
)
def test_options_become_a_preprocessing(words: str, expected: Preprocessing) -> None:
    assert _asked(*words.split()) == expected


def test_what_is_not_given_is_that_of_the_weights() -> None:
    own = Preprocessing(224, 224, 232, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert _asked(own=own) == own
    assert _asked("--resize", "240", own=own) == Preprocessing(224, 224, 240, "bicubic", mean=own.mean, std=own.std)
    for size, resize in (("32", 33), ("288", 298)):  # the default's size too, where it is given
        found = _asked("--image-size", size, own=own)
        assert found == replace(own, height_px=int(size), width_px=int(size), resize_px=resize)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--crop 224 --image-size 32", "--image-size 32: must be that of --crop, 224"),
        (
            "--preprocess imagenet --image-size 96",
            "--image-size 96: must be that of --crop, 224 of --preprocess imagenet",
        ),
        ("--resize 256", "--resize 256: needs --crop"),
        ("--mean 0.5", "--std: must be given with --mean"),
        ("--std 0.5", "--mean: must be given with --std"),
        ("--mean 0.5,0.5 --std 1,1", "--mean 0.5,0.5: must be one number, or one for each of three channels"),
        ("--channels grey --mean 1,2,3 --std 1", "--mean 1,2,3: must be 1 value for --channels grey"),
        ("--preprocess imagenet --channels grey", "--mean 0.485,0.456,0.406: must be 1 value for --channels grey"),
        ("--mean 0 --std 0", "--std 0: must be greater than 0"),
        ("--mean 0 --std nan", "--std nan: must be a finite number"),
        ("--mean a --std 1", "--mean a: must be a valid number"),
        ("--crop 10x20x30", "--crop 10x20x30: must be pixels"),
        ("--resize 0", "--resize 0: must be greater than or equal to 8"),
        ("--input-range 0,2", "--input-range 0,2: must be 0,1, 0,255 or -1,1"),
        ("--channels rgba", "--channels rgba: must be rgb, bgr or grey"),
        ("--preprocess clip", "--preprocess clip: must be imagenet"),
    ],
)
def test_what_contradicts_itself_is_one_line(words: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        _asked(*words.split())
    assert str(refused.value).startswith(said) and str(refused.value).isprintable()
