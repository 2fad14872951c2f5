"""Image files found below folders, with their sizes, times and labels; packed, since there may be millions of them.

Takes folders that anybody made: `DIR/<class>/*`, or a tree without classes. Feeds imagefolder.py.
"""

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qexp.data.decoding import formats, suffixes
from qexp.errors import InputError
from qexp.progress import say

UNLABELLED = -1  # label of an image without one
Found = tuple[str, int, int]  # a file's name, its size in bytes, and its time in ns


class Names(Sequence[str]):
    """Names in one piece of memory: a million of 30 letters take 38 MB."""

    def __init__(self, names: Iterable[str]) -> None:
        ends, parts = array("q", [0]), bytearray()
        for name in names:
            parts += os.fsencode(name)
            ends.append(len(parts))
        self._ends, self._parts = ends, bytes(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return os.fsdecode(self._parts[self._ends[row] : self._ends[row + 1]])


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files by their names below `root`, with size, time, and label: int64 [N], UNLABELLED where there is none.

    `key` is a word for what they are of all files below `root`.
    """

    root: str
    key: str
    names: Names
    sizes: np.ndarray
    times_ns: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """The file of a row."""
        return os.path.join(self.root, self.names[row])

    def labelled(self, labels: Tensor) -> "Listing":
        """The same files with other labels."""
        return Listing(self.root, self.key, self.names, self.sizes, self.times_ns, labels)

    @property
    def fingerprint(self) -> str:
        """A digest of names, sizes and times: another one where a file was changed."""
        facts = (f"{self.names[row]}\0{self.sizes[row]}\0{self.times_ns[row]}\n" for row in range(len(self)))
        return _sha256(facts)[:16]

    def digest(self, rows: Sequence[int]) -> str:
        """SHA-256 of names, sizes and labels of these rows, in their order: the same on every machine."""
        labels = self.labels.tolist()
        return _sha256(f"{self.names[row]}\0{self.sizes[row]}\0{labels[row]}\n" for row in rows)


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def make_listing(root: Path | str, key: str, files: Iterable[tuple[Found, int]]) -> Listing:
    """Of names below `root` with sizes and times, and labels."""
    sizes, times, labels = array("q"), array("q"), array("q")

    def names() -> Iterator[str]:
        for (name, size, time_ns), label in files:
            sizes.append(size)
            times.append(time_ns)
            labels.append(label)
            yield name

    packed = Names(names())
    found = (np.array(values, dtype=np.int64) for values in (sizes, times, labels))
    size_array, time_array, label_array = found
    return Listing(str(root), key, packed, size_array, time_array, torch.from_numpy(label_array))


def list_classes(root: Path, part: str, names: Sequence[str]) -> Listing:
    """The images in the class folders `names` of `root/part`, in order of class and name; labels are places of classes.

    Raises:
        InputError: a class is empty, or a file cannot be looked at.
    """

    def files() -> Iterator[tuple[Found, int]]:
        for label, name in enumerate(names):
            folder, below = root / part / name, os.path.join(part, name)
            images, skipped = _images_below(folder, "--data-dir")
            _say_skipped(f"class {name}", folder, skipped)
            if not images:
                raise InputError(f"--data-dir: class {name} is empty: no image in {folder}")
            yield from (((f"{below}/{file}", size, time_ns), label) for file, size, time_ns in images)

    return make_listing(root, part or "all", files())


def list_tree(root: Path, part: str = "", option: str = "--data-dir") -> Listing:
    """All images in or below `root/part`, without labels, in order of name.

    Raises:
        InputError: there are none, or a file cannot be looked at.
    """
    images, skipped = _images_below(root / part, option)
    _say_skipped(option, root / part, skipped)
    if not images:
        raise InputError(f"{option}: no image in {root / part} or below")
    files = ((os.path.join(part, name), size, time_ns) for name, size, time_ns in images)
    return make_listing(root, part or "all", ((found, UNLABELLED) for found in files))


def _say_skipped(what: str, folder: Path, skipped: Counter[str]) -> None:
    if skipped:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(skipped.items()))
        count = skipped.total()
        if count == 1:
            say(f"{what}: 1 file of {folder} is no image, and is skipped: {kinds}")
        else:
            say(f"{what}: {count} files of {folder} are no images, and are skipped: {kinds}")


def class_names(root: Path, part: str = "") -> list[str]:
    """The names of the folders in `root/part`, by the alphabet; hidden ones are none.

    Raises:
        InputError: one cannot be looked at, or its name is not UTF-8.
    """
    entries = _entries(root / part)
    names = sorted(entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith("."))
    for name in names:
        if not _is_text(name):
            shown = os.fsencode(name).decode(errors="backslashreplace")
            where = os.path.join(part, shown)
            raise InputError(f"--data-dir {root}: the name of class folder {where} is not UTF-8; rename it")
    return names


def has_images(folder: Path) -> bool:
    """Whether there are images in a folder itself."""
    return any(
        not (entry.name.startswith(".") or _is_folder(entry)) and file_facts(entry.path, "--data-dir") is not None
        for entry in _entries(folder)
    )


def _entries(folder: Path) -> "Iterator[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise InputError(f"--data-dir: {folder}: cannot be read ({error.strerror})") from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise InputError(f"--data-dir: {entry.path}: cannot be read ({error.strerror})") from None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images_below(folder: Path, option: str) -> tuple[list[Found], Counter[str]]:
    """Image files below a folder, in order of name, sub-folders and links to folders included; and, by suffix, how many
    other files there are."""
    found, entered, skipped = list[Found](), set[tuple[int, int]](), Counter[str]()
    start = len(os.path.join(folder, ""))
    for top, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in entered:  # by a link that leads back, or two to one folder
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk goes into what is left here
        for name in names:
            if name.startswith("."):
                continue
            file = os.path.join(top, name)
            if (facts := file_facts(file, option)) is None:
                skipped[os.path.splitext(name)[1] or "no suffix"] += 1
            else:
                found.append((file[start:], *facts))
    return sorted(found), skipped


def file_facts(file: str, option: str) -> tuple[int, int] | None:
    """Size in bytes and time in ns of an image file; None of what is no image by its suffix or, without one, by its
    first bytes.

    Raises:
        InputError: it is named as an image, and is no file or cannot be looked at.
    """
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in suffixes() and suffix:
        return None
    try:
        status = os.stat(file)
    except OSError as error:  # a link that leads nowhere
        raise InputError(f"{option}: cannot read {file}: {error.strerror}") from None
    facts = status.st_size, status.st_mtime_ns
    if not stat.S_ISREG(status.st_mode):
        if suffix:
            raise InputError(f"{option}: {file}: is no regular file")
        return None
    if suffix:
        return facts
    try:
        with Image.open(file, formats=formats()):
            return facts
    except Image.DecompressionBombError:  # decoding says so
        return facts
    except Exception:  # of what is no image, each of Pillow's decoders raises what it likes
        return None
