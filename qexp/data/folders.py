"""Whether the folders and files of a data set are there; without torch, so that a wrong one is refused at once."""

from pathlib import Path

from qexp.config import DataConfig
from qexp.errors import InputError
from qexp.foundation.environment import looked_in

TEST_PARTS = ("test", "val")  # of which the first that is there holds the test images
EXPECTED = "expected DIR/train/<class>/… and DIR/test/<class>/… (or DIR/val/<class>/…)"


def check_data_dir(options: DataConfig, needs_training: bool = True) -> None:
    """Raise InputError unless the folders and files of the data are given where they must be, and are there.

    Args:
        needs_training: whether an image folder must have images to train with.
    """
    check_places(options)
    if options.dataset != "imagefolder":
        return
    if options.data_dir is None:
        if options.labels and not needs_training:
            return
        need = "a folder with train/ and test/ in it" if needs_training else "a folder with test/ or images in it"
        raise InputError(f"--data-dir: must be given with --dataset imagefolder: {need}")
    root = Path(options.data_dir)
    has_train = is_folder(root / "train", "--data-dir")
    if needs_training and not has_train:
        raise InputError(f"--data-dir {root}: no folder {root / 'train'}; {EXPECTED}")
    if has_train and not options.labels and not any(is_folder(root / part, "--data-dir") for part in TEST_PARTS):
        raise InputError(f"--data-dir {root}: no folder {root / 'test'}; {EXPECTED}")


def check_places(options: DataConfig) -> None:
    """Raise InputError where a folder or a file that is given is not there."""
    if options.data_dir is not None and not is_folder(options.data_dir, "--data-dir"):
        wanted = EXPECTED if options.dataset == "imagefolder" else "make it first, or leave the option out"
        raise InputError(f"--data-dir {options.data_dir}: no such folder{looked_in(options.data_dir)}; {wanted}")
    if (folder := options.calibration_dir) is not None and not is_folder(folder, "--calibration-dir"):
        raise InputError(f"--calibration-dir {folder}: no such folder{looked_in(folder)}")
    for option, file in (("--labels", options.labels), ("--classes", options.classes)):
        if file is not None and not is_file(file, option):
            raise InputError(f"{option} {file}: no such file{looked_in(file)}")
    if options.labels and options.dataset != "imagefolder":
        raise InputError(f"--labels {options.labels}: needs --dataset imagefolder")


def is_folder(path: Path | str, option: str) -> bool:
    """Whether there is such a folder; InputError where that cannot be said: a folder above may not be looked into, or
    the name is too long."""
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be looked at ({error.strerror})") from None


def is_file(path: Path | str, option: str) -> bool:
    """Whether there is such a regular file; InputError where that cannot be said."""
    try:
        return Path(path).is_file()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be looked at ({error.strerror})") from None
