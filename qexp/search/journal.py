"""The journal file of a study, as a kill, a full disk or a power cut leaves it: what is damaged is set aside.

storage.py calls `mend_journal` before Optuna opens the file. A line is one operation. Operations number the trials that
they make by their order, so nothing after a damaged line can be used.
"""

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qexp.errors import InputError
from qexp.progress import say

ALLOWED = "must be the journal file of a study, and is none; remove it, or give --study another name"
BEGINNING = b'{"op_code":'  # of each line
LONGEST_LINE = 2**26  # bytes; the longest ones say which images of a split an int8 model got right


class _Operation(BaseModel):
    """What each operation has, beside what it is about."""

    model_config = ConfigDict(strict=True)
    op_code: int = Field(ge=0)
    worker_id: str


def mend_journal(file: Path) -> None:
    """Cut off what follows the last whole line before a damaged one, and say so; it is kept in `FILE.damaged`.

    Nobody else may be at work in the file.

    Raises:
        InputError: the file is no journal.
        OSError: it cannot be read or written; it is as it was.
    """
    if not file.exists():
        return
    if not file.is_file():
        raise InputError(f"{file}: {ALLOWED}")
    with file.open("rb") as opened:
        lines, end = 0, 0
        while line := opened.readline(LONGEST_LINE):
            if not _is_operation(line):
                break
            lines, end = lines + 1, opened.tell()
        else:
            return
        begins = line[: len(BEGINNING)]
        if lines == 0 and begins.strip(b"\0") and not BEGINNING.startswith(begins):
            raise InputError(f"{file}: {ALLOWED}")
        opened.seek(end)
        rest = file.with_name(f"{file.name}.damaged")
        with rest.open("ab") as kept:
            shutil.copyfileobj(opened, kept)
            kept.flush()
            os.fsync(kept.fileno())
    with file.open("r+b") as opened:
        opened.truncate(end)
        os.fsync(opened.fileno())
    say(f"{file}: line {lines + 1} is damaged; resuming with the lines before it ({rest} keeps the others)")


def _is_operation(line: bytes) -> bool:
    try:
        _Operation.model_validate_json(line)
    except ValidationError:
        return False
    return line.endswith(b"\n")  # which is written last
