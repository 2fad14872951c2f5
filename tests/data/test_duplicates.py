"""Equal images in several parts of a data set."""

import time

import pytest
import torch
from torch import Tensor

from qexp.data.datasets import Dataset, Split
from qexp.data.duplicates import Duplicates


def _dataset(train: Split, validation: Split, test: Split) -> Dataset:
    return Dataset("made", "here", ("a", "b"), train, validation, test, "0" * 16)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_parts_without_equal_images(digits: Dataset) -> None:
    assert digits.duplicates == Duplicates(0, 0, 0, 0, 0)
    assert digits.duplicates.warning(359) is None


def test_equal_images_are_counted_once_an_image(images: Tensor) -> None:
    labels = torch.zeros(30, dtype=torch.long)
    train = Split(torch.cat([images[:10], images[:2]]), labels[:12])
    validation = Split(torch.cat([images[10:14], images[5:6]]), labels[:5])
    # One of training, twice; one of validation; one of both; two that are nowhere else.
    test = Split(images[[0, 0, 11, 5, 20, 21]], torch.tensor([0, 0, 0, 1, 0, 0]))
    found = _dataset(train, validation, test).duplicates
    assert found == Duplicates(
        test_in_training=3, test_in_validation=2, test_images_seen=4, validation_in_training=1, labelled_twice=1
    )
    assert str(found.warning(6)).startswith("4 of 6 test images equal a training or validation image")


def test_one_pixel_makes_another_image(images: Tensor) -> None:
    test = images[:10].clone()
    test[3, 2, 7, 7] ^= 1
    parts = (Split(part, torch.zeros(len(part), dtype=torch.long)) for part in (images[:10], images[10:20], test))
    assert _dataset(*parts).duplicates.test_in_training == 9


def test_many_images_take_little_time() -> None:
    images = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8)
    started = time.process_time()
    assert len(set(Split(images, torch.zeros(20_000)).image_digests)) == 20_000
    assert time.process_time() - started < 2  # 0.1 s on a CPU that has instructions for SHA-256
