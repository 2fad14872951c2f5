"""A data set: its train/validation split, its test images, and seeded, class-stratified samples of them.

Takes digits, CIFAR-10 (both in memory) or an image folder (decoded as needed); feeds training, calibration and
evaluation.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.config import DataConfig, QuantizeConfig
from qexp.data.cifar10 import Read, read_cifar10, tensors_of
from qexp.data.decoding import check_memory, fitted_tensors
from qexp.data.duplicates import Duplicates, count_duplicates
from qexp.data.imagefolder import read_folder
from qexp.data.images import BATCH_SIZE, Images
from qexp.data.labels import BY_FILE, read_class_names, reordered
from qexp.data.listing import UNLABELLED, list_tree
from qexp.errors import InputError
from qexp.foundation.extras import extra
from qexp.models.preprocessing import Preprocessing, preprocessing_of

DEFAULT_CALIBRATION_SAMPLES = 256
DIGITS_TEST_SHARE = 0.2
MAX_NAME_LENGTH = 40
PIXEL_DIGEST_LENGTH = 16  # of digests of pixels and labels
FILE_DIGEST_LENGTH = 20  # of digests of names, sizes and labels of files


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] with labels int64 [N], UNLABELLED where there are none. Those of a folder are decoded
    where they are indexed."""

    images: Tensor | Images
    labels: Tensor

    @cached_property
    def digest(self) -> str:
        """Of pixels and labels, in their order; of images in files, of their names, sizes and labels instead."""
        return self.pixel_digest if isinstance(self.images, Tensor) else _file_digest((), {"": self})

    @cached_property
    def pixel_digest(self) -> str:
        """Of pixels and labels, in their order."""
        digest = hashlib.sha256()
        for batch in _batches(self.images, "comparing images"):
            digest.update(batch.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:PIXEL_DIGEST_LENGTH]

    def has_digest(self, recorded: str) -> bool:
        """Whether `recorded` is the digest of these images; those that earlier versions gave to files cover pixels."""
        return recorded == self.digest or (
            isinstance(self.images, Images) and len(recorded) == PIXEL_DIGEST_LENGTH and recorded == self.pixel_digest
        )

    @cached_property
    def image_digests(self) -> list[bytes]:
        """SHA-256 of the pixels of each image: equal ones belong to equal images."""
        batches = _batches(self.images, "decoding images")
        return [hashlib.sha256(image).digest() for batch in batches for image in batch.contiguous().numpy()]

    @property
    def is_labelled(self) -> bool:
        """Whether there are labels: without, there is agreement and no accuracy."""
        return bool((self.labels != UNLABELLED).all())

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Split":
        """The images at `indices`, in that order."""
        images = self.images.at(indices) if isinstance(self.images, Images) else self.images[indices]
        return Split(images, self.labels[indices])

    def pixels(self) -> Tensor:
        """The images as one tensor; InputError where the memory does not hold so many."""
        return self.images.in_memory() if isinstance(self.images, Images) else self.images


def _batches(images: Tensor | Images, label: str) -> Iterable[Tensor]:
    return images.tracked(label) if isinstance(images, Images) else images.split(BATCH_SIZE)


@dataclass(frozen=True)
class Dataset:
    """What the stages work on. `train` and `validation` are disjoint parts of the training images, empty without any;
    `calibration` are images for that alone.

    `digest` covers classes and labels, and the decoded pixels, or of images in files the names and sizes of the files
    and how they are resized, so that two machines can tell whether they saw the same data. `whole` are the images as
    they were found, by part.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str
    calibration: Split | None = None
    whole: dict[str, Split] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded: what needs each of them costs little."""
        return isinstance(self.test.images, Tensor)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that have images."""
        return tuple(name for name in ("train", "validation", "test") if len(getattr(self, name)))

    @cached_property
    def duplicates(self) -> Duplicates:
        """Equal images in several parts. All images are decoded for it."""
        return count_duplicates(
            *((part.image_digests, part.labels.tolist()) for part in (self.train, self.validation, self.test))
        )

    @property
    def calibration_images(self) -> Split:
        """Those that set the ranges: of a folder of their own, or the training images.

        Raises:
            InputError: there are none.
        """
        found = self.train if self.calibration is None else self.calibration
        if not len(found):
            raise InputError(f"--calibration-dir: must be given: {self.source} has no training images")
        return found

    def has_digest(self, recorded: str) -> bool:
        """Whether `recorded` is the digest of these data; those that earlier versions gave to folders cover pixels."""
        return recorded == self.digest or (
            self.whole is not None and len(recorded) == PIXEL_DIGEST_LENGTH and recorded == self._pixel_digest
        )

    @cached_property
    def _pixel_digest(self) -> str:
        assert self.whole is not None
        return _content_digest(self.classes, self.whole)

    def with_classes(self, count: int) -> "Dataset":
        """These data for a model with so many logits: where nothing else names its classes, numbers do.

        Raises:
            InputError: the data have another number of classes.
        """
        test, numbers = self.test.images, tuple(map(str, range(count)))
        numbered = (
            isinstance(test, Images) and test.listing.key == BY_FILE and self.classes == numbers[: len(self.classes)]
        )
        if numbered or not self.classes:
            return replace(self, classes=numbers)
        if len(self.classes) != count:
            raise InputError(
                f"--data-dir {self.source}: has {len(self.classes)} classes, and the model has {count} logits"
            )
        return self


def load_dataset(
    options: DataConfig, seed: int, preprocessing: Preprocessing | None = None, needs_training: bool = True
) -> Dataset:
    """Read the data set that `options` names, as images of `preprocessing`, and split it with `seed`.

    Args:
        preprocessing: of the model; None: the whole images, resized to the options' size.
        needs_training: whether there must be training images; without them, `train` and `validation` are empty.

    Raises:
        InputError: the files are missing or broken; the message names the file, class or option.
    """
    wanted = preprocessing or preprocessing_of(options)
    if options.dataset == "imagefolder":
        source, classes, parts = _read_imagefolder(options, wanted, needs_training)
        digest = _file_digest(classes, parts)
    else:
        readers = {"digits": _read_digits, "cifar10": read_cifar10}
        source, classes, tensors = readers[options.dataset](options, wanted)
        classes, tensors = _in_wanted_order(options, classes, tensors)
        parts = {part: Split(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test")}
        digest = _content_digest(classes, parts)
    train, validation = _split(parts["train"], options.validation_share, seed)
    whole = parts if options.dataset == "imagefolder" else None
    calibration = _calibration_images(options, wanted)
    return Dataset(dataset_name(options), source, classes, train, validation, parts["test"], digest, calibration, whole)


def _split(full: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Training and validation images; without labels or images there is no validation."""
    if not (len(full) and full.is_labelled):
        return full, full.subset(torch.arange(0))
    held_out = stratified_sample(full.labels, max(1, round(share * len(full))), seed)
    kept = torch.ones(len(full), dtype=torch.bool)
    kept[held_out] = False
    return full.subset(kept.nonzero().flatten()), full.subset(held_out)


def _read_imagefolder(
    options: DataConfig, wanted: Preprocessing, needs_training: bool
) -> tuple[str, tuple[str, ...], dict[str, Split]]:
    found = read_folder(options, needs_training)
    test = Split(Images(found.test, wanted), found.test.labels)
    nothing = test.subset(torch.arange(0))
    train = Split(Images(found.train, wanted), found.train.labels) if found.train else nothing
    return found.source, found.classes, {"train": train, "test": test}


def _calibration_images(options: DataConfig, wanted: Preprocessing) -> Split | None:
    if options.calibration_dir is None:
        return None
    listing = list_tree(Path(options.calibration_dir), option="--calibration-dir")
    return Split(Images(listing, wanted), listing.labels)


def _in_wanted_order(
    options: DataConfig, classes: tuple[str, ...], tensors: dict[str, Tensor]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Classes and labels in the order that a file of classes gives."""
    if options.classes is None:
        return classes, tensors
    given, option = read_class_names(Path(options.classes)), f"--classes {options.classes}"
    labels = {name: reordered(tensors[name], classes, given, option) for name in ("train_labels", "test_labels")}
    return given, tensors | labels


def dataset_name(options: DataConfig) -> str:
    """The data set's part of experiment and model names; a folder gives its own, without / and :."""
    if options.dataset != "imagefolder":
        return options.dataset
    folder = options.data_dir or Path(options.labels or "").parent
    name = Path(folder).resolve().name.lower()
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


def calibration_count(options: QuantizeConfig, images: Split) -> int:
    """How many of these images `calibration_samples` stands for.

    Raises:
        InputError: there are fewer than asked for.
    """
    count = options.calibration_samples or min(DEFAULT_CALIBRATION_SAMPLES, len(images))
    if count > len(images):
        kind = "training images" if images.is_labelled else "images to calibrate with"
        raise InputError(f"--calibration-samples {count}: must be at most {len(images)}, the number of {kind}")
    return count


def calibration_subset(train: Split, count: int, seed: int) -> tuple[Split, str]:
    """`count` un-augmented training images in memory, class-stratified, and the digest of their indices in `train`, in
    order. Only these are decoded.

    Their order is random, by the same seed, so that each batch of a calibration holds all classes: files come class
    by class.

    Raises:
        InputError: there are fewer training images than `count`.
    """
    drawn = stratified_sample(train.labels, count, seed)
    indices = drawn[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    subset, digest = train.subset(indices), hashlib.sha256(indices.numpy().astype("<i8").tobytes())
    return Split(subset.pixels(), subset.labels), digest.hexdigest()[:16]


def _content_digest(classes: tuple[str, ...], parts: dict[str, Split]) -> str:
    """Of class names, pixels and labels."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for name in sorted(parts):
        for batch in _batches(parts[name].images, "comparing images"):
            digest.update(batch.contiguous().numpy().data)
        digest.update(parts[name].labels.numpy().data)
    return digest.hexdigest()[:PIXEL_DIGEST_LENGTH]


def _file_digest(classes: tuple[str, ...], parts: dict[str, Split]) -> str:
    """Of class names, names, sizes and labels of files, and of how their images are resized."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for name in sorted(parts):
        images = parts[name].images
        assert isinstance(images, Images)
        digest.update(f"{name}\0{images.preprocessing.geometry_text}\0{images.digest}\n".encode())
    return digest.hexdigest()[:FILE_DIGEST_LENGTH]


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
    return "sklearn.datasets.load_digits", classes, tensors_of(images[~test], labels[~test], images[test], labels[test])
