"""Images that are decoded as needed: they stand for one tensor, decode what is asked for, and keep it on disk."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qexp.config import DataConfig
from qexp.data import images as module
from qexp.data.datasets import Dataset, Split, _content_digest, calibration_subset, load_dataset
from qexp.data.images import Images
from qexp.data.listing import Names
from qexp.errors import InputError
from qexp.measurement.accuracy import predict_logits
from qexp.models.classifier import channel_statistics
from qexp.models.preprocessing import Preprocessing

COUNT = {"train": 24, "test": 6}  # of each of two classes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Noise of 8 x 8 pixels."""
    random = np.random.RandomState(0)
    for part, count in COUNT.items():
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{number:02}.bmp")
    return tmp_path / "pets"


def _load(root: Path, size: int = 8, share: float = 0.25) -> Dataset:
    options = DataConfig(dataset="imagefolder", data_dir=str(root), image_size=size, validation_share=share)
    return load_dataset(options, seed=0)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were decoded, in order."""
    files, before = list[str](), module.decoded

    def counted(given: list[str], *more: Any) -> Iterator[np.ndarray]:
        files.extend(given)
        return before(given, *more)

    monkeypatch.setattr(module, "decoded", counted)
    return files


def _caches(root: Path) -> list[str]:
    return sorted(file.name for file in root.glob(".qexp-cache-*"))


def test_an_index_gives_what_a_tensor_of_all_images_would(root: Path) -> None:
    images, whole = _load(root).train.images, _load(root).train.pixels()
    assert isinstance(images, Images) and isinstance(whole, Tensor)
    assert images.shape == whole.shape == (36, 3, 8, 8) and images.dtype == whole.dtype
    mask = torch.arange(36) % 5 == 0
    for key in (slice(3, 30, 4), slice(0, 0), torch.tensor([35, 2, 2, 7]), torch.tensor([], dtype=torch.long), mask, 4):
        assert torch.equal(images[key], whole[key])
    assert torch.equal(images[2:9, 1, :, 3], whole[2:9, 1, :, 3]) and torch.equal(images[5, 1:], whole[5, 1:])
    assert all(map(torch.equal, images.split(7), whole.split(7))) and len(list(images.split(7))) == 6
    assert all(map(torch.equal, images, whole))
    chosen = torch.tensor([30, 1, 12])
    assert torch.equal(images.at(chosen).at(torch.tensor([2, 0]))[:], whole[[12, 30]])


def test_all_that_takes_images_takes_these(root: Path) -> None:
    lazy = _load(root).train
    held = Split(lazy.pixels(), lazy.labels)
    assert lazy.image_digests == held.image_digests and lazy.pixel_digest == held.digest
    assert all(map(torch.equal, channel_statistics(lazy.images), channel_statistics(held.images)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    for size in (None, 5):
        assert torch.equal(predict_logits(model, lazy.images, size), predict_logits(model, held.images, size))


def test_only_what_is_asked_for_is_decoded(root: Path, decoded: list[str]) -> None:
    """All other files are no images, which nobody notices."""
    subset, _ = calibration_subset(_load(root).train, 6, seed=1)
    assert len(decoded) == len(set(decoded)) == 6 and isinstance(subset.images, Tensor)
    for file in root.rglob("*.bmp"):
        if str(file) not in decoded:
            status = file.stat()
            file.write_bytes(bytes(status.st_size))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again, _ = calibration_subset(_load(root).train, 6, seed=1)
    assert torch.equal(again.images, subset.images) and len(decoded) == 6  # from the cache
    with pytest.raises(InputError, match=r"^--data-dir: broken image .*\.bmp: "):
        _load(root).test.pixels()


def test_a_second_pass_decodes_nothing(root: Path, decoded: list[str]) -> None:
    first = _load(root)
    kept = {name: getattr(first, name).pixels() for name in first.parts}
    assert len(decoded) == 60 and len(_caches(root)) == 2
    second = _load(root, share=0.4)  # other rows of the same file
    assert torch.equal(second.test.pixels(), kept["test"]) and len(second.train.pixels()) == 29
    assert len(decoded) == 60 and first.digest == second.digest


def test_the_cache_has_holes_where_nothing_was_decoded(root: Path) -> None:
    last = _load(root, size=128).train.images[35]
    (file,) = root.glob(".qexp-cache-train-*")
    assert 512 * file.stat().st_blocks < 2 * last.nbytes < file.stat().st_size


def test_a_changed_file_is_decoded_again(root: Path) -> None:
    """The file keeps its name and size: the time alone tells that it changed."""
    before, caches, file = _load(root).test.pixels(), _caches(root), root / "test" / "cat" / "00.bmp"
    Image.new("RGB", (8, 8), (250, 0, 0)).save(file)
    os.utime(file, ns=(1, 1))
    after = _load(root).test.pixels()
    assert after[0, :, 0, 0].tolist() == [250, 0, 0] and torch.equal(after[1:], before[1:])
    assert len(_caches(root)) == len(caches) == 1 and _caches(root) != caches


def test_each_preprocessing_has_a_cache_of_its_own(root: Path, decoded: list[str]) -> None:
    options = DataConfig(dataset="imagefolder", data_dir=str(root))
    wanted = [Preprocessing(8, 8), Preprocessing(8, 8, 12), Preprocessing(8, 8, channels="grey"), Preprocessing(8, 6)]
    wanted += [Preprocessing(9, 9, interpolation="nearest")]
    first = [load_dataset(options, 0, one).test.pixels() for one in wanted]
    assert len(_caches(root)) == 5 and len(decoded) == 5 * 12
    again = [load_dataset(options, 0, one).test.pixels() for one in wanted]
    assert all(map(torch.equal, again, first))
    turned = load_dataset(options, 0, Preprocessing(8, 8, channels="bgr", mean=(0.5,) * 3, std=(1.0,) * 3))
    assert torch.equal(turned.test.pixels(), first[0]) and len(decoded) == 5 * 12


@pytest.mark.parametrize(
    ("damage", "again"), [("emptied", 12), ("cut off", 8), ("a bit", 1), ("zeros", 12), ("a folder", 12)]
)
def test_a_damaged_cache_costs_decoding_alone(root: Path, damage: str, again: int, decoded: list[str]) -> None:
    before = _load(root).test.pixels()
    (file,) = root.glob(".qexp-cache-test-*")
    whole = bytearray(file.read_bytes())
    whole[500] ^= 1
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    elif damage == "cut off":
        os.truncate(file, 4 * (4 + 192) + 100)
    else:
        file.write_bytes({"emptied": b"", "a bit": whole, "zeros": bytes(len(whole))}[damage])
    decoded.clear()
    # A row whose pixels still lie in the memory that the read was given counts as read: they are right.
    assert torch.equal(_load(root).test.pixels(), before) and again - 1 <= len(decoded) <= again
    assert torch.equal(_load(root).test.pixels(), before)


@pytest.mark.parametrize("problem", ["read-only", "full"])
def test_without_room_each_pass_decodes_and_it_is_said_once(
    root: Path, problem: str, decoded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(30, "Read-only file system", path)

    if problem == "full":
        usage = shutil.disk_usage(root)._replace(free=10**9 - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    else:
        monkeypatch.setattr(module, "_open_or_make", refuse)
    images = _load(root).test.images
    assert torch.equal(torch.cat([*images.split(4)]), torch.cat([*images.split(5)]))
    assert len(decoded) == 24 and _caches(root) == []
    said = "no cache of the decoded images in .*, each pass decodes them again"
    assert len(re.findall(said, capsys.readouterr().err)) == 1


def _fill(root: Path, kill_at: int = 0) -> None:
    """Decode the test images; kill this process in the middle of its `kill_at`-th write."""
    calls, write = list[int](), os.pwritev

    def writing(file: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) == kill_at:
            write(file, [buffers[0], buffers[1][:100]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, buffers, offset)

    os.pwritev = writing  # type: ignore[assignment]
    for _ in _load(root).test.images.split(4):
        pass


def test_a_killed_process_leaves_what_counts_and_others_fill_the_rest(root: Path, decoded: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_fill, args=(root, 2))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    expected = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(root.glob("test/*/*.bmp"))])
    expected = expected.permute(0, 3, 1, 2)
    assert torch.equal(_load(root).test.pixels(), expected) and 7 <= len(decoded) <= 12 - 4
    for file in root.glob(".qexp-cache-*"):
        file.unlink()
    both = [context.Process(target=_fill, args=(root,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert torch.equal(_load(root).test.pixels(), expected) and 7 <= len(decoded) <= 12 - 4


def test_the_next_batch_is_decoded_while_the_model_computes(root: Path, decoded: list[str]) -> None:
    batches = _load(root).test.images.split(3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(decoded) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(decoded) == 6


def test_the_digest_is_that_of_names_sizes_and_labels(root: Path, decoded: list[str], tmp_path: Path) -> None:
    first = _load(root)
    shutil.copytree(root, tmp_path / "elsewhere" / "pets")
    moved = _load(tmp_path / "elsewhere" / "pets")
    assert moved.digest == first.digest and moved.test.digest == first.test.digest and not decoded
    assert first.has_digest(moved.digest) and not first.has_digest("0" * 20)
    assert _load(root, size=16).digest != first.digest
    (root / "train" / "cat" / "00.bmp").rename(root / "train" / "cat" / "z.bmp")
    assert _load(root).digest != first.digest
    (root / "train" / "cat" / "z.bmp").rename(root / "train" / "dog" / "z.bmp")
    assert _load(root).digest != first.digest


def test_digests_of_earlier_versions_cover_pixels(root: Path) -> None:
    dataset = _load(root)
    assert dataset.whole is not None
    parts = {name: Split(split.pixels(), split.labels) for name, split in dataset.whole.items()}
    old = _content_digest(dataset.classes, parts)
    assert len(old) == 16 and dataset.has_digest(old) and not dataset.has_digest(old[::-1])
    assert dataset.train.has_digest(dataset.train.pixel_digest) and not dataset.test.has_digest("0" * 16)


def test_names_take_little_memory() -> None:
    names = Names(f"class {number % 7}/{number:012}.jpeg" for number in range(20_000))
    assert len(names) == 20_000 and names[1:3] == ["class 1/000000000001.jpeg", "class 2/000000000002.jpeg"]
    assert sum(map(sys.getsizeof, (names._parts, names._ends))) < 40 * 20_000
    odd = ["caf\udce9", "日本", ""]
    assert list(Names(odd)) == odd
