"""Whether the folder of a data set is there; without torch, so that a wrong one is refused at once."""

from pathlib import Path

from qexp.config import DataConfig
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
    if not root.is_dir():
        wanted = EXPECTED if options.dataset == "imagefolder" else "make it first, or leave the option out"
        raise InputError(f"--data-dir {root}: no such folder; {wanted}")
    if options.dataset == "imagefolder":
        for part in ("train", "test"):
            if not (root / part).is_dir():
                raise InputError(f"--data-dir {root}: no folder {root / part}; {EXPECTED}")
