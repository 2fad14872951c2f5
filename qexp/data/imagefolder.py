"""Which images a folder holds, and for what: class folders, a CSV file of labels, or images without labels.

Takes what `--data-dir`, `--labels` and `--classes` name; feeds datasets.py with listings. No image
is decoded.
"""

from dataclasses import dataclass
from pathlib import Path

from qexp.config import DataConfig
from qexp.data.folders import TEST_PARTS, check_data_dir
from qexp.data.labels import read_class_names, read_labels, reordered
from qexp.data.listing import Listing, class_names, has_images, list_classes, list_tree
from qexp.errors import InputError
from qexp.progress import say


@dataclass(frozen=True)
class Folder:
    """What was found. `classes` are in the order of the labels; empty where nothing names them."""

    source: str
    classes: tuple[str, ...]
    train: Listing | None
    test: Listing


@dataclass(frozen=True)
class _Part:
    """Images with their class names, of which there are none where the images have no labels."""

    classes: tuple[str, ...]
    listing: Listing

    def named(self, classes: tuple[str, ...], option: str) -> Listing:
        """With labels among `classes`."""
        if not self.classes or self.classes == classes:
            return self.listing
        return self.listing.labelled(reordered(self.listing.labels, self.classes, classes, option))


def read_folder(options: DataConfig, needs_training: bool) -> Folder:
    """List the images that the options name.

    Args:
        needs_training: whether there must be images to train with, and their classes.

    Raises:
        InputError: a folder or a file is missing or is not what it must be; the message names it.
    """
    check_data_dir(options, needs_training)
    wanted = read_class_names(Path(options.classes)) if options.classes else ()
    root = Path(options.data_dir) if options.data_dir else None
    train = _part(root, "train", needs_training) if root and (root / "train").is_dir() else None
    if options.labels:
        known = wanted or (train.classes if train else ())
        classes, test = read_labels(Path(options.labels), root, known or None)
        option = f"--labels {options.labels}" if not wanted else f"--classes {options.classes}"
        source = str(root or Path(options.labels).parent)
        return Folder(source, classes, train.named(classes, option) if train else None, test)
    assert root is not None  # as check_data_dir says
    tested = _test_part(root)
    if train and train.classes and tested.classes:
        _check_same(root, train.classes, tested)
    classes = wanted or tested.classes or (train.classes if train else ())
    option = f"--classes {options.classes}"
    return Folder(str(root), classes, train.named(classes, option) if train else None, tested.named(classes, option))


def _test_part(root: Path) -> _Part:
    """The test images: of DIR/test or DIR/val, or without these, nor DIR/train, DIR's own."""
    there = [part for part in TEST_PARTS if (root / part).is_dir()]
    if len(there) > 1:
        say(f"--data-dir {root}: the test images are those of {there[0]}/; {there[1]}/ is not used")
    return _part(root, there[0] if there else "", False)


def _part(root: Path, part: str, needs_classes: bool) -> _Part:
    """Class folders, or where there are none, all images in or below a folder, without labels.

    One folder alone is no class, and where images lie beside folders in DIR itself, these are none.
    """
    classes = class_names(root, part)
    if needs_classes and len(classes) < 2:
        raise InputError(f"--data-dir {root}: needs at least 2 class folders in {part}/, found {classes}")
    if len(classes) < 2 or (not part and has_images(root)):
        return _Part((), list_tree(root, part))
    return _Part(tuple(classes), list_classes(root, part, classes))


def _check_same(root: Path, train: tuple[str, ...], test: _Part) -> None:
    """Raise InputError unless train and test have the same classes."""
    part = test.listing.key
    if different := sorted(set(train) ^ set(test.classes)):
        where = "train" if different[0] in train else part
        raise InputError(
            f"--data-dir {root}: train and {part} must have the same classes; {different[0]} is only in {where}"
        )
