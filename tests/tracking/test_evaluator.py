"""What MLflow's evaluation may give as images and labels: read exactly, or refused by one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from qexp.errors import InputError
from qexp.models.preprocessing import Preprocessing
from qexp.tracking.evaluator import _images_of, _labels_of

SMALL = Preprocessing(height_px=4, width_px=5)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), dtype=np.uint8)
PIXELS[0, 0, 0, :2] = 0, 255
FLAT = PIXELS.reshape(3, -1)
COLUMN = pd.DataFrame({"image": list(PIXELS)})


@pytest.mark.parametrize(
    "rows",
    [
        FLAT,
        FLAT.astype(np.int64),
        pd.DataFrame(FLAT),
        pd.DataFrame({"image": list(PIXELS)}),
        pd.DataFrame({0: list(FLAT)}),
    ],
)
def test_whole_pixels_are_taken_as_they_are(rows: Any) -> None:
    found = _images_of(rows, SMALL)
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), PIXELS)


@pytest.mark.parametrize("rows", [FLAT / 255, pd.DataFrame({"image": list((PIXELS / 255).astype(np.float32))})])
def test_float_pixels_are_taken_as_they_are(rows: Any) -> None:
    found = _images_of(rows, SMALL)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), (PIXELS / 255).astype(np.float32))


def test_files_are_decoded_as_the_version_takes_them(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, PIXELS, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    for names in (files, [str(file) for file in files]):
        assert np.array_equal(_images_of(pd.DataFrame({"file": names}), SMALL).numpy(), PIXELS)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (FLAT[:0], "has no rows"),
        (FLAT[:, :-1], r"must be \[N, 60\], rows of images \[3, 4, 5\], and is \[3, 59\]"),
        (FLAT.astype(np.float32), r"pixels must be float in \[0, 1\], and are from 0 to 255"),
        (FLAT.astype(np.int64) - 1, "pixels must be whole numbers from 0 to 255, and are from -1"),
        (np.full((1, 60), np.nan), r"pixels must be float in \[0, 1\], and are from nan to nan"),
        (np.full((1, 60), "a"), "pixels must be numbers, and are <U1"),
        (pd.DataFrame({"image": list(PIXELS.transpose(0, 2, 3, 1))}), r"must be \[3, 4, 5\], and one is \[4, 5, 3\]"),
        (pd.DataFrame({"file": [b"\x89PNG"]}), "one is of type bytes"),
        (pd.DataFrame({"file": ["a.png", PIXELS[0]]}), "one is of type str"),
        (pd.DataFrame(FLAT[:, :59]), r"and has 0, 1, 2, … \(59 columns\)"),
        (pd.DataFrame({"file": ["a"], "id": [1]}), "and has file, id$"),
    ],
)
def test_other_images_are_refused_by_one_line(rows: Any, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        _images_of(rows, SMALL)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("given", [["b", "a"], [1, 0], [1.0, 0.0], np.array([1, 0], np.uint8), pd.Series(["b", "a"])])
def test_labels_are_names_or_numbers(given: Any) -> None:
    assert _labels_of(given, ("a", "b")).tolist() == [1, 0]


@pytest.mark.parametrize("given", [["c"], [2], [-1], [0.5], [float("nan")], [None]])
def test_other_labels_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="is neither a class nor its number, 0 to 1"):
        _labels_of(given, ("a", "b"))
