"""The images of a folder as if they were one tensor: decoded when asked for, and kept in a file beside the data.

Takes a listing of image files; feeds whoever takes batches: training, calibration, evaluation. Whatever the number of
images, memory holds the batches that are in use.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.data.decoding import DECODER, check_memory, decoded
from qexp.data.listing import Listing
from qexp.models.preprocessing import Preprocessing
from qexp.progress import say, track

BATCH_SIZE = 256  # of a pass over all images
KEPT_FREE_BYTES = 10**9  # of a disk, for others
CHECKSUM_BYTES = 4
_not_written = set[Path]()  # folders of which it was said that they get no cache
ROWS_A_CALL = 256  # buffers of one system call: at most 1,024, two a row
Transfer = Callable[[int, Sequence[memoryview], int], int]  # os.preadv or os.pwritev


class Images:
    """Images of a listing, uint8 [N, C, H, W], in memory only where they are indexed.

    A slice, a tensor of indices, a mask or a number gives a tensor, as with a tensor of all images; `split` gives
    batches. What is decoded is kept in a file, if there is room.
    """

    dtype = torch.uint8

    def __init__(self, listing: Listing, preprocessing: Preprocessing) -> None:
        self.listing, self.preprocessing = listing, preprocessing
        self.rows = np.arange(len(listing))
        self._cache = _Cache(listing, preprocessing)

    def at(self, indices: Tensor) -> "Images":
        """The images at these indices, in that order, not decoded yet."""
        chosen = copy(self)
        chosen.rows = self.rows[indices.numpy()]
        return chosen

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.preprocessing.shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> Tensor:
        """The pixels.

        Raises:
            InputError: a file is no image, or is gone since it was listed; the message names it.
        """
        if isinstance(key, tuple):
            first, *rest = key
            return self[first][tuple(rest)] if isinstance(first, int) else self[first][(slice(None), *rest)]
        if isinstance(key, int):
            return self._decoded(self.rows[[key]])[0]
        return self._decoded(self.rows[key.cpu().numpy() if isinstance(key, Tensor) else key])

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.split(BATCH_SIZE):
            yield from batch

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """Batches in order. The next one is read or decoded while the caller works with this one."""
        parts = [self.rows[start : start + batch_size] for start in range(0, len(self), batch_size)]
        with ThreadPoolExecutor(1) as reader:
            upcoming = [reader.submit(self._decoded, part) for part in parts[:1]]
            for following in [*parts[1:], None]:
                if not upcoming:
                    return
                batch = upcoming.pop().result()
                if following is not None:
                    upcoming.append(reader.submit(self._decoded, following))
                yield batch

    @property
    def digest(self) -> str:
        """Of names, sizes and labels of the files, in the order of the images."""
        return self.listing.digest(self.rows.tolist())

    def tracked(self, label: str) -> Iterator[Tensor]:
        """Batches of a pass over all images, shown as `label`."""
        yield from track(self.split(BATCH_SIZE), label, -(-len(self) // BATCH_SIZE))

    def in_memory(self) -> Tensor:
        """All of them.

        Raises:
            InputError: the memory does not hold so many images, or as for an index.
        """
        check_memory(len(self), self.preprocessing)
        return self[:]

    def _decoded(self, rows: np.ndarray) -> Tensor:
        images = np.empty((len(rows), *self.preprocessing.shape), dtype=np.uint8)
        missing = np.flatnonzero(~self._cache.read(rows, images))
        files = [self.listing.path(row) for row in rows[missing]]
        for place, image in zip(missing, decoded(files, self.preprocessing) if files else (), strict=True):
            images[place] = image
        self._cache.write(rows[missing], images[missing] if len(missing) < len(rows) else images)
        return torch.from_numpy(images)


class _Cache:
    """Decoded images in a file beside the data: a row an image, its checksum before its pixels.

    Rows that nobody has written are holes, which take no room on the disk. A row counts where its checksum is that of
    its pixels: so a process that is killed, a full disk or a damaged file costs the decoding of some images again, and
    several processes may write at once.
    """

    def __init__(self, listing: Listing, preprocessing: Preprocessing) -> None:
        self._kind = f".qexp-cache-{listing.key}-{preprocessing.geometry_text}-"
        self._root = Path(listing.root)
        self._file = self._root / f"{self._kind}{DECODER}-{listing.fingerprint}.images"
        self._old = f".qexp-cache-{preprocessing.geometry_text}-*.safetensors"  # of earlier versions, never read again
        self._stride = CHECKSUM_BYTES + int(np.prod(preprocessing.shape))
        self._writes = True

    def read(self, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Fill the images whose rows are here; bool [N] says which these are."""
        found = np.zeros(len(rows), dtype=bool)
        with suppress(OSError), open(self._file, "rb", buffering=0) as opened:
            for start, stop in _runs(rows):
                sums = np.zeros(stop - start, dtype="<u4")
                self._transfer(os.preadv, opened.fileno(), rows[start], sums, images[start:stop])
                found[start:stop] = sums == [_checksum(image) for image in images[start:stop]]
        return found

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Keep these images; where that cannot be done, it is said once."""
        if not self._writes or not len(rows):
            return
        try:
            if not self._file.exists():
                self._remove_stale()
            if shutil.disk_usage(self._root).free < images.nbytes + KEPT_FREE_BYTES:
                raise OSError(f"less than {KEPT_FREE_BYTES / 1e9:g} GB of the disk would stay free")
            with open(self._file, "r+b", buffering=0, opener=_open_or_make) as opened:
                for start, stop in _runs(rows):
                    sums = np.array([_checksum(image) for image in images[start:stop]], dtype="<u4")
                    self._transfer(os.pwritev, opened.fileno(), rows[start], sums, images[start:stop])
        except OSError as error:
            self._writes = False
            if self._root not in _not_written:
                _not_written.add(self._root)
                say(f"no cache of the decoded images in {self._root}, each pass decodes them again: {error}")

    def _transfer(self, call: Transfer, file: int, row: int, sums: np.ndarray, images: np.ndarray) -> None:
        """Checksums and pixels of rows that follow one another, in one system call."""
        pairs = zip(sums.view(np.uint8).reshape(-1, CHECKSUM_BYTES), images, strict=True)
        call(file, [part.data.cast("B") for pair in pairs for part in pair], int(row) * self._stride)

    def _remove_stale(self) -> None:
        """The files of images that have changed since, and those that earlier versions have written."""
        for pattern in (f"{self._kind}*.images", self._old):
            for stale in self._root.glob(pattern):
                with suppress(OSError):
                    stale.unlink()


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _checksum(image: np.ndarray) -> int:
    """Of the pixels of an image; never that of a hole."""
    return zlib.crc32(image.data) or 1


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """From where to where rows follow one another, at most ROWS_A_CALL."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        for first in range(start, stop, ROWS_A_CALL):
            yield int(first), int(min(first + ROWS_A_CALL, stop))
