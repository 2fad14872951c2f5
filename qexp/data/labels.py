"""The classes of images where folders do not say them: a CSV file of file and label, a file of class names.

Feeds imagefolder.py. Each file is read once, and is what it should be or one line that names it.
"""

import csv
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qexp.data.listing import Listing, file_facts, make_listing
from qexp.errors import InputError, first_line

BY_FILE = "labels"  # what the listing of a CSV file's images is called
MOST_BYTES = 2**30  # of a CSV file
MOST_CLASSES = 100_000  # where labels are numbers
FILE_WORDS = {"file", "filename", "file_name", "filepath", "path", "image", "image_path", "img", "name"}
LABEL_WORDS = {"label", "class", "class_name", "classname", "target", "category", "y"}


def read_class_names(file: Path) -> tuple[str, ...]:
    """Names in the order of a model's logits: one a line, or a JSON list.

    Raises:
        InputError: the file is neither, or has an empty name.
    """
    option = f"--classes {file}"
    text = _read_text(file, option).strip()
    names: object = [line.strip() for line in text.splitlines()]
    if text.startswith(("[", "{")):
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{option}: must be one name a line, or a JSON list ({first_line(error)})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{option}: must be one name a line, or a JSON list of texts")
    if not names:
        raise InputError(f"{option}: has no name in it")
    for number, name in enumerate(names, start=1):
        if not (name.strip() and name.isprintable()):
            raise InputError(f"{option}: name {number} must be text that can be printed, and not empty")
    return tuple(names)


def places(names: Sequence[str], classes: Sequence[str], option: str) -> list[int]:
    """The place of each name among `classes`.

    Raises:
        InputError: one is not there, or is there twice.
    """
    counts, place = Counter(classes), {name: number for number, name in enumerate(classes)}
    for name in names:
        if counts[name] != 1:
            why = f"is there {counts[name]} times" if counts[name] else f"is not among {_some(classes)}"
            raise InputError(f"{option}: class {name} {why}")
    return [place[name] for name in names]


def _some(names: Sequence[str]) -> str:
    """The first names and how many there are."""
    return ", ".join(names[:3]) + (f", … ({len(names)} classes)" if len(names) > 3 else "")


def read_labels(file: Path, data_dir: Path | None, classes: Sequence[str] | None) -> tuple[tuple[str, ...], Listing]:
    """The classes, and the files that a CSV file names with their labels.

    Args:
        data_dir: what names are relative to, unless they are to the folder of the CSV file.
        classes: names in the order of the logits; None: all names in the file, by the alphabet, or numbers as they are.

    Raises:
        InputError: it is no such file, names a file that is not there or no image, or a class that is unknown.
    """
    option = f"--labels {file}"
    rows = _rows(file, option)
    folders = [folder for folder in (data_dir, file.parent) if folder is not None]
    first_line_number, first_name, _ = rows[0]
    root = next((one for one in folders if os.path.lexists(one / first_name)), None)
    if root is None:
        where = " or ".join(map(str, dict.fromkeys(folders)))
        hint = "; a header has the words file and label" if first_line_number == 1 else ""
        raise InputError(f"{option}: line {first_line_number}: no file {first_name} in {where}{hint}")
    names, labels = _numbered([label for _, _, label in rows], classes, option)
    seen, files = set[str](), []
    for (line, name, _), label in zip(rows, labels, strict=True):
        facts = file_facts(str(root / name), f"{option}: line {line}")
        if facts is None:
            raise InputError(f"{option}: line {line}: {name} is no image")
        if name in seen:
            raise InputError(f"{option}: line {line}: {name} is there twice")
        seen.add(name)
        files.append(((name, *facts), label))
    return names, make_listing(root, BY_FILE, files)


def _rows(file: Path, option: str) -> list[tuple[int, str, str]]:
    """Line, file and label of each row that is not empty; a header says which columns these are."""
    text = _read_text(file, option)
    start = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((one for one in (",", ";", "\t") if one in start), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise InputError(f"{option}: not a CSV file ({first_line(error)})") from None
    header = _header(cells[0][1]) if cells else None
    found, rows = header or (0, 1), cells[1:] if header else cells
    if not rows:
        raise InputError(f"{option}: has no row of file and label")
    for line, row in rows:
        right = len(row) == len(cells[0][1]) if header else len(row) == 2
        if not (right and all(row[column] and row[column].isprintable() for column in found)):
            raise InputError(f"{option}: line {line}: must be a file and its label")
    return [(line, row[found[0]], row[found[1]]) for line, row in rows]


def _header(cells: list[str]) -> tuple[int, int] | None:
    """The columns of file and label, where these words are there; None of a row that is no header."""
    words = [cell.lower() for cell in cells]
    file, label = (
        next((number for number, word in enumerate(words) if word in known), None)
        for known in (FILE_WORDS, LABEL_WORDS)
    )
    return None if file is None or label is None else (file, label)


def _numbered(labels: list[str], classes: Sequence[str] | None, option: str) -> tuple[tuple[str, ...], list[int]]:
    """Class names and the place of each label; where all labels are numbers, and not names of `classes`, these."""
    given = sorted(set(labels))
    named = classes is not None and set(given) <= set(classes)
    if not named and all(label.isdecimal() and label.isascii() for label in given):
        most = MOST_CLASSES if classes is None else len(classes)
        numbers = [int(label[:10]) for label in labels]
        if max(numbers) >= most:
            raise InputError(f"{option}: label {max(numbers)}: must be 0 to {most - 1}, the number of a class")
        return tuple(map(str, range(max(numbers) + 1))) if classes is None else tuple(classes), numbers
    names = tuple(given) if classes is None else tuple(classes)
    place = dict(zip(given, places(given, names, option), strict=True))
    return names, [place[label] for label in labels]


def _read_text(file: Path, option: str) -> str:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise InputError(f"{option}: is no regular file")
        if status.st_size > MOST_BYTES:
            raise InputError(f"{option}: is larger than {MOST_BYTES / 1e9:.1f} GB")
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{option}: cannot be read ({error.strerror})") from None


def reordered(labels: Tensor, names: Sequence[str], classes: Sequence[str], option: str) -> Tensor:
    """Labels among `names` as labels among `classes`.

    Raises:
        InputError: the counts differ, or a name is not among `classes`.
    """
    if len(names) != len(classes):
        raise InputError(
            f"{option}: has {len(classes)} classes, and the data have {len(names)}: {_some(classes)}; {_some(names)}"
        )
    return torch.tensor(places(names, classes, option))[labels]
