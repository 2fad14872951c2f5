"""Data sets: the stratified draw, the split, digits, and CIFAR-10 from an archive that the test makes."""

import hashlib
import pickle
import tarfile
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.config import DataConfig, QuantizeConfig
from qexp.data.cifar10 import CIFAR10_CLASSES
from qexp.data.datasets import (
    Dataset,
    Split,
    calibration_count,
    calibration_subset,
    dataset_name,
    load_dataset,
    stratified_sample,
)
from qexp.data.decoding import fitted_tensors
from qexp.errors import InputError
from qexp.models.preprocessing import Preprocessing
from qexp.models.vision import torchvision

CIFAR10 = torchvision.datasets.CIFAR10
# Class sizes; the labels are made from them, in class order.
BALANCED, SKEWED, ONE_LARGE = (30,) * 10, (60, 30, 9, 1), (90, *(1,) * 10)


def _labels(sizes: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def _pixels(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize(
    ("count", "seed", "indices"),
    [(5, 0, [1, 8, 10, 13, 17]), (5, 1, [3, 6, 10, 14, 16]), (10, 0, [1, 2, 4, 6, 8, 10, 13, 14, 17, 18])],
)
def test_same_seed_draws_these_images_on_every_machine(count: int, seed: int, indices: list[int]) -> None:
    assert stratified_sample(_labels((12, 6, 2)), count, seed).tolist() == indices


def test_another_seed_draws_others() -> None:
    labels = _labels(BALANCED)
    draws = {tuple(stratified_sample(labels, 30, seed).tolist()) for seed in range(5)}
    assert len(draws) == 5


@pytest.mark.parametrize("sizes", [BALANCED, SKEWED, ONE_LARGE], ids=["balanced", "skewed", "one_large"])
def test_every_class_has_its_share_to_within_one_item(sizes: tuple[int, ...]) -> None:
    labels = _labels(sizes)
    shares = torch.tensor(sizes).double() / len(labels)
    for count in range(1, len(labels) + 1):  # the counts below the number of classes are among them
        drawn = torch.bincount(labels[stratified_sample(labels, count, seed=3)], minlength=len(sizes))
        assert drawn.sum() == count
        assert (drawn - count * shares).abs().max() <= 1, f"{count} of {sizes}: {drawn.tolist()}"


@pytest.mark.parametrize("sizes", [BALANCED, SKEWED, ONE_LARGE], ids=["balanced", "skewed", "one_large"])
def test_a_larger_count_contains_the_smaller(sizes: tuple[int, ...]) -> None:
    labels = _labels(sizes)
    smaller: set[int] = set()
    for count in range(1, len(labels) + 1):
        drawn = stratified_sample(labels, count, seed=5).tolist()
        assert drawn == sorted(set(drawn)) and len(drawn) == count
        assert smaller < set(drawn)
        smaller = set(drawn)


def test_the_draw_does_not_depend_on_the_order_of_classes() -> None:
    labels = torch.arange(300) % 10
    drawn = stratified_sample(labels, 100, seed=0)
    assert torch.bincount(labels[drawn]).tolist() == [10] * 10


def test_drawing_more_than_there_are() -> None:
    with pytest.raises(InputError, match=r"cannot draw 21 images: there are 20; allowed: 1 to 20"):
        stratified_sample(_labels((12, 6, 2)), 21, 0)


def test_digits(digits: Dataset) -> None:
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1294, 144, 359]  # 1797 together
    for part in parts:
        assert part.images.shape == (len(part), 3, 16, 16)
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.images.min() == 0 and part.images.max() == 255
        assert (part.images[:, 0] == part.images[:, 1]).all() and (part.images[:, 0] == part.images[:, 2]).all()
        assert set(part.labels.tolist()) == set(range(10))
    assert digits.classes == tuple("0123456789")
    assert digits.name == "digits"


def test_the_three_parts_share_no_image(digits: Dataset) -> None:
    train, validation, test = (_pixels(part) for part in (digits.train, digits.validation, digits.test))
    assert len(train) == 1294 and len(validation) == 144 and len(test) == 359  # no two images of digits are equal
    assert not train & validation and not train & test and not validation & test


def test_seed_moves_the_split_and_leaves_the_test_images(digits: Dataset) -> None:
    other = load_dataset(DataConfig(image_size=16), seed=1)
    assert torch.equal(other.test.images, digits.test.images) and torch.equal(other.test.labels, digits.test.labels)
    assert _pixels(other.validation) != _pixels(digits.validation)
    assert _pixels(other.train) | _pixels(other.validation) == _pixels(digits.train) | _pixels(digits.validation)
    assert Counter(other.train.labels.tolist() + other.validation.labels.tolist()) == Counter(
        digits.train.labels.tolist() + digits.validation.labels.tolist()
    )
    assert other.digest == digits.digest  # of all images, whatever the split


def test_digest_follows_the_pixels(digits: Dataset) -> None:
    smaller = load_dataset(DataConfig(image_size=8), seed=0)
    assert smaller.train.images.shape == (1294, 3, 8, 8)
    assert smaller.digest != digits.digest
    assert len(digits.digest) == 16


def test_validation_share_sets_the_number_of_validation_images(digits: Dataset) -> None:
    larger = load_dataset(DataConfig(validation_share=0.25, image_size=16), seed=0)
    assert len(larger.validation) == round(0.25 * (1294 + 144))
    assert _pixels(digits.validation) < _pixels(larger.validation)


def test_calibration_subset_is_the_same_for_the_same_seed(digits: Dataset) -> None:
    subset, digest = calibration_subset(digits.train, 64, seed=0)
    again, same = calibration_subset(digits.train, 64, seed=0)
    _, other = calibration_subset(digits.train, 64, seed=1)
    assert torch.equal(subset.images, again.images) and digest == same != other
    assert _pixels(subset) <= _pixels(digits.train)
    counts = torch.bincount(subset.labels, minlength=10)
    assert counts.min() >= 6 and counts.max() <= 7


def test_calibration_digest_is_that_of_the_indices_in_their_order() -> None:
    images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    subset, digest = calibration_subset(Split(images, _labels((12, 6, 2))), 5, seed=0)
    indices = np.array([10, 1, 8, 13, 17], dtype="<i8")
    assert subset.images[:, 0, 0, 0].tolist() == indices.tolist()
    assert digest == hashlib.sha256(indices.tobytes()).hexdigest()[:16]


def test_more_calibration_images_contain_the_fewer(digits: Dataset) -> None:
    drawn = [_pixels(calibration_subset(digits.train, count, seed=4)[0]) for count in (8, 64, 256, 1294)]
    assert drawn[0] < drawn[1] < drawn[2] < drawn[3] == _pixels(digits.train)


def test_calibration_images_come_in_no_order_of_classes() -> None:
    """Each batch has the mean class of all, to within chance."""
    labels = _labels((100,) * 10)
    subset, _ = calibration_subset(Split(torch.zeros(1000, 3, 1, 1, dtype=torch.uint8), labels), 512, seed=0)
    means = torch.stack([batch.double().mean() for batch in subset.labels.split(64)])
    assert (means - 4.5).abs().max() < 4 * 2.87 / 8  # four standard errors of 64 labels


def test_more_calibration_images_than_training_images(digits: Dataset) -> None:
    with pytest.raises(InputError, match=r"--calibration-samples 1295: must be at most 1294"):
        calibration_count(QuantizeConfig(calibration_samples=1295), digits.train)


def test_calibration_count_is_256_or_all_there_are(digits: Dataset) -> None:
    assert calibration_count(QuantizeConfig(), digits.train) == 256
    assert calibration_count(QuantizeConfig(), digits.train.subset(torch.arange(100))) == 100
    assert calibration_count(QuantizeConfig(calibration_samples=7), digits.train) == 7


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "digits"),
        ({"dataset": "cifar10", "data_dir": "elsewhere"}, "cifar10"),
        ({"dataset": "imagefolder", "data_dir": "/data/My Pets:v2/"}, "my-pets-v2"),
        ({"dataset": "imagefolder", "data_dir": "/data/" + "long" * 20}, "long" * 10),
        ({"dataset": "imagefolder", "data_dir": "/data/---"}, "images"),
    ],
)
def test_dataset_name_fits_into_a_model_name(options: dict[str, str], name: str) -> None:
    assert dataset_name(DataConfig(**options)) == name


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tmp_path` with cifar-10-batches-py as in the original archive, four images a batch instead of 10,000."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.RandomState(0)
    sums = {}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": random.randint(0, 256, (4, 3072), dtype=np.uint8), "labels": random.randint(0, 10, 4).tolist()}
        sums[name] = _write_pickle(folder / name, batch)
    meta_sum = _write_pickle(folder / "batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in list(sums)[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta_sum})
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    return tmp_path


def _write_pickle(file: Path, value: object) -> str:
    file.write_bytes(pickle.dumps(value))
    return hashlib.md5(file.read_bytes()).hexdigest()


def _no_network(*arguments: object, **options: object) -> None:
    raise URLError("no route to host")


def _batch(root: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one batch file; it holds all of red, then green, then blue, each row by row."""
    batch = pickle.loads((root / "cifar-10-batches-py" / name).read_bytes())
    return torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch["labels"])


def test_cifar10_pixels_and_labels_are_those_of_the_archive(cifar_root: Path) -> None:
    dataset = load_dataset(DataConfig(dataset="cifar10", data_dir=str(cifar_root), validation_share=0.1), seed=0)
    images, labels = _batch(cifar_root, "test_batch")
    assert torch.equal(dataset.test.images, images) and torch.equal(dataset.test.labels, labels)
    assert (len(dataset.train), len(dataset.validation)) == (18, 2)
    expected = {}
    for number in range(1, 6):
        images, labels = _batch(cifar_root, f"data_batch_{number}")
        expected |= {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for part in (dataset.train, dataset.validation):
        assert part.labels.tolist() == [expected[image.numpy().tobytes()] for image in part.images]
    assert dataset.classes == CIFAR10_CLASSES
    assert (dataset.name, dataset.source) == ("cifar10", str(cifar_root.resolve()))


def test_cifar10_is_resized(cifar_root: Path) -> None:
    dataset = load_dataset(DataConfig(dataset="cifar10", data_dir=str(cifar_root), image_size=16), seed=0)
    assert dataset.test.images.shape == (4, 3, 16, 16)
    mean = _batch(cifar_root, "test_batch")[0].double().mean()
    assert abs(dataset.test.images.double().mean() - mean) < 3


def test_sets_in_memory_are_resized_and_cropped_too(cifar_root: Path) -> None:
    wanted = Preprocessing(24, 20, resize_px=28, interpolation="bicubic", channels="grey")
    images, _ = _batch(cifar_root, "test_batch")
    found = load_dataset(DataConfig(dataset="cifar10", data_dir=str(cifar_root)), 0, wanted).test.images
    assert found.shape == (4, 1, 24, 20) and torch.equal(found, fitted_tensors(images, wanted))
    assert load_dataset(DataConfig(dataset="digits"), 0, wanted).test.images.shape == (359, 1, 24, 20)


def test_second_read_of_cifar10_comes_from_the_cache(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = DataConfig(dataset="cifar10", data_dir=str(cifar_root))
    first = load_dataset(options, seed=0)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", _no_network)
    second = load_dataset(options, seed=0)
    assert torch.equal(first.train.images, second.train.images)
    assert first.digest == second.digest


def test_cifar10_archive_beside_the_folder_is_unpacked(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _batch(cifar_root, "test_batch")[0]
    other = cifar_root / "other"
    other.mkdir()
    archive = other / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(cifar_root / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    dataset = load_dataset(DataConfig(dataset="cifar10", data_dir=str(other)), seed=0)
    assert torch.equal(dataset.test.images, expected)


def test_cifar10_without_network_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    root = tmp_path / "empty"
    with pytest.raises(InputError) as refused:
        load_dataset(DataConfig(dataset="cifar10", data_dir=str(root)), seed=0)
    message = str(refused.value)
    ways_out = ["cifar-10-python.tar.gz", "--dataset imagefolder --data-dir DIR", "--dataset digits"]
    assert [word for word in ["--dataset cifar10", str(root), "no route", *ways_out] if word not in message] == []
    assert "\n" not in message


def test_a_damaged_cifar10_batch_is_refused(cifar_root: Path) -> None:
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut off")
    with pytest.raises(InputError, match="--dataset cifar10"):
        load_dataset(DataConfig(dataset="cifar10", data_dir=str(cifar_root)), seed=0)
