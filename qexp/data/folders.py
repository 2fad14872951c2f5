"""Whether the folder of a data set is there; without torch, so that a wrong one is refused at once."""

from pathlib import Path

from qexp.config import DataConfig
from qexp.environment import looked_in
from qexp.errors import InputError

EXPECTED = "expected DIR/train/<class>/… and DIR/test/<class>/…"


def check_data_dir(options: DataConfig) -> None:
    """Raise InputError unless `data_dir` is given where it must be, and is a folder that has the parts it must have."""
    if options.data_dir is None:
        if options.dataset == "imagefolder":
            need = "must be given with --dataset imagefolder: a folder with train/ and test/ in it"
            raise InputError(f"--data-dir: {need}")
        return
    root = Path(options.data_dir)
    if not is_folder(root, "--data-dir"):
        wanted = EXPECTED if options.dataset == "imagefolder" else "make it first, or leave the option out"
        raise InputError(f"--data-dir {root}: no such folder{looked_in(root)}; {wanted}")
    if options.dataset == "imagefolder":
        for part in ("train", "test"):
            if not is_folder(root / part, "--data-dir"):
                raise InputError(f"--data-dir {root}: no folder {root / part}; {EXPECTED}")


def is_folder(path: Path | str, option: str) -> bool:
    """Whether there is such a folder; InputError where that cannot be said: a folder above may not be looked into, or
    the name is too long."""
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be looked at ({error.strerror})") from None
