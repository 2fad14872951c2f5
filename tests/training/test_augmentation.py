"""Random crop and flip: every result is a crop of the reflected image, and all of them occur."""

import pytest
import torch
from torch import Tensor, nn

from qexp.training import augmentation
from qexp.training.augmentation import augment


@pytest.fixture(scope="module")
def numbered() -> Tensor:
    """40 images [3, 5, 6], each pixel value once in an image."""
    return (
        torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(i)) for i in range(40)])
        .byte()
        .view(40, 3, 5, 6)
    )


def _crops(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of the reflected image, by torch's own padding."""
    padded = nn.functional.pad(image[None].float(), [padding] * 4, mode="reflect")[0].byte()
    height, width = image.shape[1:]
    return [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]


def test_augmented_image_is_a_crop_of_the_reflected_one(numbered: Tensor) -> None:
    augmented = augment(numbered, 2, False, torch.Generator().manual_seed(0))
    assert augmented.shape == numbered.shape and augmented.dtype == torch.uint8
    places = []
    for image, result in zip(numbered, augmented, strict=True):
        matches = [place for place, crop in enumerate(_crops(image, 2)) if torch.equal(crop, result)]
        assert len(matches) == 1
        places += matches
    assert len(set(places)) > 12  # each image has its own shift, of 25


def test_every_shift_occurs_as_often_as_any_other() -> None:
    image = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5).expand(5000, -1, -1, -1)
    centres = augment(image, 2, False, torch.Generator().manual_seed(0))[:, 0, 2, 2]
    counts = torch.bincount(centres, minlength=25)
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, deviation 14


def test_flipped_image_is_a_mirrored_crop(numbered: Tensor) -> None:
    augmented = augment(numbered, 1, True, torch.Generator().manual_seed(0))
    flips = []
    for image, result in zip(numbered, augmented, strict=True):
        straight = any(torch.equal(crop, result) for crop in _crops(image, 1))
        mirrored = any(torch.equal(crop.flip(2), result) for crop in _crops(image, 1))
        assert straight != mirrored
        flips.append(mirrored)
    assert any(flips) and not all(flips)


def test_half_of_the_images_are_flipped() -> None:
    images = torch.tensor([[1, 2]], dtype=torch.uint8).expand(4000, 3, 1, 2)
    augmented = augment(images, 0, True, torch.Generator().manual_seed(0))
    assert 1900 < (augmented[:, 0, 0, 0] == 2).sum() < 2100
    assert (augmented[:, 0] == augmented[:, 2]).all()  # all channels of an image together


def test_no_padding_and_no_flip_leave_the_images(numbered: Tensor) -> None:
    assert torch.equal(augment(numbered, 0, False, torch.Generator()), numbered)


@pytest.mark.parametrize("padding", [1, 4, 20])
def test_only_pixels_of_the_image_occur(numbered: Tensor, padding: int) -> None:
    augmented = augment(numbered, padding, True, torch.Generator().manual_seed(1))
    for image, result in zip(numbered, augmented, strict=True):
        for channel in range(3):
            assert set(result[channel].flatten().tolist()) <= set(image[channel].flatten().tolist())


def test_reflection_does_not_repeat_the_border() -> None:
    index = torch.arange(-4, 8)
    assert augmentation._reflect(index, 4).tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert augmentation._reflect(index, 1).tolist() == [0] * 12


def test_augmentation_follows_its_generator(numbered: Tensor) -> None:
    first, second, other = (augment(numbered, 2, True, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
