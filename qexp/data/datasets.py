"""A data set as uint8 tensors in memory, its train/validation split, and seeded, class-stratified samples of it.

Takes digits, CIFAR-10 or an image folder (imagefolder.py); feeds training, calibration and evaluation.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.config import DataConfig, QuantizeConfig
from qexp.data.duplicates import Duplicates, count_duplicates
from qexp.data.folders import check_data_dir
from qexp.data.imagefolder import cached, check_memory, decode_files, fitted_tensors, list_folder
from qexp.errors import InputError
from qexp.extras import extra
from qexp.models.preprocessing import Preprocessing, preprocessing_of

DEFAULT_CALIBRATION_SAMPLES = 256
DIGITS_TEST_SHARE = 0.2
MAX_NAME_LENGTH = 40
CIFAR10_IMAGES = 50_000, 10_000  # to train with, to test with
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, size, size] with labels int64 [N]."""

    images: Tensor
    labels: Tensor

    @cached_property
    def digest(self) -> str:
        """Of pixels and labels, in their order."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()[:16]

    @cached_property
    def image_digests(self) -> list[bytes]:
        """SHA-256 of the pixels of each image: equal ones belong to equal images."""
        return [hashlib.sha256(image).digest() for image in self.images.contiguous().numpy()]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Split":
        """The images at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """What the stages work on. `train` and `validation` are disjoint parts of the training images; `digest` covers the
    decoded pixels and labels of all of them, so that two machines can tell whether they saw the same data."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that have images."""
        return tuple(name for name in ("train", "validation", "test") if len(getattr(self, name)))

    @cached_property
    def duplicates(self) -> Duplicates:
        """Equal images in several parts."""
        return count_duplicates(
            *((part.image_digests, part.labels.tolist()) for part in (self.train, self.validation, self.test))
        )


def load_dataset(options: DataConfig, seed: int, preprocessing: Preprocessing | None = None) -> Dataset:
    """Read the data set that `options` names, as images of `preprocessing`, and split it with `seed`.

    Args:
        preprocessing: of the model; None: the whole images, resized to the options' size.

    Raises:
        InputError: the files are missing or broken; the message names the file, class or option.
    """
    readers = {"digits": _read_digits, "cifar10": _read_cifar10, "imagefolder": _read_imagefolder}
    source, classes, tensors = readers[options.dataset](options, preprocessing or preprocessing_of(options))
    full = Split(tensors["train_images"], tensors["train_labels"])
    test = Split(tensors["test_images"], tensors["test_labels"])
    held_out = stratified_sample(full.labels, max(1, round(options.validation_share * len(full))), seed)
    kept = torch.ones(len(full), dtype=torch.bool)
    kept[held_out] = False
    train = full.subset(kept.nonzero().flatten())
    return Dataset(
        dataset_name(options), source, classes, train, full.subset(held_out), test, _content_digest(classes, tensors)
    )


def dataset_name(options: DataConfig) -> str:
    """The data set's part of experiment and model names; a folder gives its own, without / and :."""
    if options.dataset != "imagefolder":
        return options.dataset
    name = Path(options.data_dir or "").resolve().name.lower()
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")[:MAX_NAME_LENGTH] or "images"


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices, ascending, of `count` items that hold each class in its share, to within one item.

    The same seed gives the same indices on every machine: the generator is numpy's RandomState, whose streams are
    frozen (NEP 19). A larger count with the same seed contains the smaller one.

    Raises:
        InputError: `count` is larger than the number of labels.
    """
    if count > len(labels):
        raise InputError(f"cannot draw {count} images: there are {len(labels)}; allowed: 1 to {len(labels)}")
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    shuffled = labels.numpy()[order]
    members = [order[shuffled == label] for label in random.permutation(np.unique(shuffled))]
    shares = _apportion(np.array([len(of_class) for of_class in members]), count)
    chosen = np.concatenate([of_class[:share] for of_class, share in zip(members, shares, strict=True)])
    return torch.from_numpy(np.sort(chosen))


def _apportion(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many of `count` items each class gives: its share rounded down or up, and never fewer for a larger count.

    One item at a time, to the class with the most items for each it would have given, unless that class would exceed
    its share rounded up (quota method: Balinski and Young, American Mathematical Monthly 82, 1975). Ties: the first.
    """
    given = np.zeros(len(sizes), dtype=np.int64)
    for total in range(1, count + 1):
        may_give = given < -(-sizes * total // sizes.sum())
        given[np.argmax(np.where(may_give, sizes / (given + 1), -1.0))] += 1
    return given


def calibration_count(options: QuantizeConfig, train: Split) -> int:
    """How many images `calibration_samples` stands for.

    Raises:
        InputError: there are fewer training images than asked for.
    """
    count = options.calibration_samples or min(DEFAULT_CALIBRATION_SAMPLES, len(train))
    if count > len(train):
        raise InputError(f"--calibration-samples {count}: must be at most {len(train)}, the number of training images")
    return count


def calibration_subset(train: Split, count: int, seed: int) -> tuple[Split, str]:
    """`count` un-augmented training images, class-stratified, and the digest of their indices in `train`, in order.

    Their order is random, by the same seed, so that each batch of a calibration holds all classes: files come class
    by class.

    Raises:
        InputError: there are fewer training images than `count`.
    """
    drawn = stratified_sample(train.labels, count, seed)
    indices = drawn[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    return train.subset(indices), hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def _content_digest(classes: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()[:16]


Read = tuple[str, tuple[str, ...], dict[str, Tensor]]  # source, class names, the four tensors


def _read_digits(options: DataConfig, wanted: Preprocessing) -> Read:
    """scikit-learn's copy of the UCI optical digits: 8x8 scans with 17 grey levels, here enlarged (bilinear) to RGB."""
    with extra("digits", "--dataset digits"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    check_memory(len(digits.images), wanted)
    grey = torch.from_numpy(digits.images / 16.0)[:, None]
    if not wanted.is_plain:
        scans = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        images = fitted_tensors(scans, wanted)
    else:
        size = wanted.height_px, wanted.width_px
        enlarged = torch.nn.functional.interpolate(grey, size=size, mode="bilinear", align_corners=False)
        images = (enlarged * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    # The set has no test part of its own: one fifth, the same for every seed.
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[stratified_sample(labels, round(DIGITS_TEST_SHARE * len(labels)), seed=0)] = True
    classes = tuple(str(name) for name in digits.target_names)
    return (
        "sklearn.datasets.load_digits",
        classes,
        _tensors(images[~test], labels[~test], images[test], labels[test]),
    )


def _read_cifar10(options: DataConfig, wanted: Preprocessing) -> Read:
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
    return _tensors(parts[0], labels[0], parts[1], labels[1])


def _read_imagefolder(options: DataConfig, wanted: Preprocessing) -> Read:
    check_data_dir(options)
    root = Path(options.data_dir or "")
    classes, files = list_folder(root)
    flat = {part: [file for of_class in per_class for file in of_class] for part, per_class in files.items()}

    def read() -> dict[str, Tensor]:
        images = decode_files(flat["train"] + flat["test"], wanted)
        first = len(flat["train"])
        return _tensors(images[:first], labels["train"], images[first:].clone(), labels["test"])

    def fits(found: dict[str, Tensor]) -> bool:
        counts = {f"{part}_labels": len(flat[part]) for part in labels}
        return _fit(found, wanted, counts) and all(
            torch.equal(found[f"{part}_labels"], of_part) for part, of_part in labels.items()
        )

    labels = {part: torch.repeat_interleave(torch.tensor([len(c) for c in files[part]])) for part in files}
    tensors = cached(root, flat["train"] + flat["test"], wanted, read, fits)
    return str(root), classes, tensors


def _fit(found: dict[str, Tensor], preprocessing: Preprocessing, counts: dict[str, int]) -> bool:
    """Whether a cache holds the tensors that `_tensors` names, of their types and shapes; `counts` are of labels."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if len(counts) < 2:
        return False
    for name, count in counts.items():
        expected[name] = torch.int64, (count,)
        expected[name.replace("labels", "images")] = torch.uint8, (count, *preprocessing.shape)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == expected


def _tensors(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> dict[str, Tensor]:
    """The four tensors of a data set by name, as they are cached and digested."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return dict(zip(names, (train_images, train_labels, test_images, test_labels), strict=True))
