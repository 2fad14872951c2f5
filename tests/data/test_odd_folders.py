"""Folders of images as people have them: links, pipes, odd names, photographs on their side, damaged caches."""

import contextlib
import io
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from strategies import SEEDED, nasty_texts
from torch import Tensor

from qexp.config import DataConfig
from qexp.data import decoding
from qexp.data.datasets import Dataset, load_dataset
from qexp.data.decoding import decode_files
from qexp.data.imagefolder import read_folder
from qexp.errors import InputError
from qexp.foundation.text import printable
from qexp.measurement.host import free_memory_bytes
from qexp.models.preprocessing import squashed

ORIENTATION = 0x0112  # of EXIF's tags


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for part, count in (("train", 4), ("test", 2)):
        for red, name in ((200, "cat"), (10, "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (red, number, 30)).save(root / part / name / f"{number}.png")
    return root


def _load(root: Path) -> Dataset:
    options = DataConfig(dataset="imagefolder", data_dir=str(root), image_size=8, validation_share=0.25)
    return load_dataset(options, seed=0)


def _decoded(dataset: Dataset) -> dict[str, Tensor]:
    return {part: getattr(dataset, part).pixels() for part in ("train", "validation", "test")}


def _refusal(root: Path) -> str:
    with pytest.raises(InputError) as refused:
        _decoded(_load(root))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def _count(root: Path) -> int:
    found = read_folder(DataConfig(dataset="imagefolder", data_dir=str(root)), needs_training=True)
    return len(found.train or ()) + len(found.test)


def test_linked_folders_are_followed_once(pets: Path, tmp_path: Path) -> None:
    more = tmp_path / "elsewhere"
    more.mkdir()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(more / "far.png")
    (pets / "train" / "cat" / "linked").symlink_to(more, target_is_directory=True)
    (more / "again").symlink_to(more, target_is_directory=True)  # a circle
    (pets / "train" / "cat" / "twice").symlink_to(more, target_is_directory=True)
    assert _count(pets) == 12 + 1


def test_a_class_that_links_to_itself_is_named(pets: Path) -> None:
    (pets / "train" / "loop").symlink_to("loop")
    assert "train/loop: cannot be read" in _refusal(pets)


def test_a_class_whose_name_is_not_utf8_is_named(pets: Path) -> None:
    for part in ("train", "test"):
        os.mkdir(os.fsencode(pets / part) + b"/caf\xe9")
    assert r"class folder train/caf\xe9 is not UTF-8" in _refusal(pets)


@pytest.mark.parametrize("name", ["p.png", "p.jpeg"])
def test_a_pipe_is_refused_and_not_waited_for(pets: Path, name: str) -> None:
    os.mkfifo(pets / "train" / "cat" / name)
    assert f"{name}: is no regular file" in _refusal(pets)


def test_a_pipe_given_to_predict_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.jpg")
    problems: list[str] = []

    def decode() -> None:
        try:
            decode_files([str(tmp_path / "photo.jpg")], squashed(8))
        except InputError as error:
            problems.append(str(error))

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    thread.join(10)
    assert problems and "is no regular file" in problems[0]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".webp", ".tga", ""])
def test_what_pillow_decodes_is_read(pets: Path, suffix: str) -> None:
    kind = {".avif": "avif", ".webp": "webp", ".tga": "tga"}.get(suffix, "jpeg")
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(pets / "train" / "cat" / f"extra{suffix}", kind)
    assert _count(pets) == 12 + 1 and len(_load(pets).train) + len(_load(pets).validation) == 8 + 1


NAMES = (nasty_texts(max_size=12) | st.sampled_from(["cat", "dog", "a.png", "b.jpg"])).filter(
    lambda name: name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(_as_bytes(name)) < 200
)
KINDS = st.sampled_from(["image", "image", "image", "text", "empty", "cut off", "folder", "loop", "pipe", "nowhere"])
WHOLE = [(part, name, number) for part in ("train", "test") for name in ("cat", "dog") for number in range(4)]
TREES = st.lists(st.tuples(st.sampled_from(["train", "test"]), NAMES, NAMES, KINDS), max_size=8)


def _as_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape") if "\ud800" not in name else b"\xed\xa0\x80"


def _make(file: bytes, kind: str, image: bytes) -> None:
    if kind in ("image", "text", "empty", "cut off"):
        Path(os.fsdecode(file)).write_bytes({"image": image, "text": b"no image", "empty": b""}.get(kind, image[:40]))
    elif kind == "folder":
        os.mkdir(file)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        os.symlink(os.path.basename(file) if kind == "loop" else b"nowhere", file)


@settings(SEEDED, max_examples=60)
@given(TREES, st.booleans())
def test_any_tree_of_files_is_a_data_set_or_one_line(tree: list[tuple[str, str, str, str]], more: bool) -> None:
    """`more`: beside what makes a whole data set."""
    if more:
        tree = [*((part, name, f"{n}.png", "image") for part, name, n in WHOLE), *tree]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (7, 8, 9)).save(buffer, "png")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pictures"
        for part, first, second, kind in tree:
            place = os.fsencode(root / part)
            with contextlib.suppress(OSError):  # what is in the way of another
                os.makedirs(os.path.join(place, _as_bytes(first)), exist_ok=True)
                _make(os.path.join(place, _as_bytes(first), _as_bytes(second)), kind, buffer.getvalue())
        try:
            dataset = _load(root)
            assert len(dataset.classes) >= 2 and len(dataset.test) >= 1
            assert {name for name, pixels in _decoded(dataset).items() if len(pixels)} == set(dataset.parts)
        except InputError as error:
            line = printable(str(error))
            assert "--data-dir" in line or "--validation-share" in line, line


def test_what_is_skipped_is_counted_and_said(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("notes.txt", "more.txt", "README", "Thumbs.db"):
        (pets / "train" / "dog" / name).write_text("no image")
    assert _count(pets) == 12
    said = capsys.readouterr().err
    assert "class dog: 4 files" in said and "1 with .db, 2 with .txt, 1 with no suffix" in said
    (pets / "test" / "cat" / "notes.txt").write_text("no image")
    _count(pets)
    folder = pets / "test" / "cat"
    assert f"class cat: 1 file of {folder} is no image, and is skipped: 1 with .txt" in capsys.readouterr().err


def test_no_other_program_is_started_to_decode(pets: Path) -> None:
    """PostScript would be given to Ghostscript."""
    (pets / "train" / "cat" / "bad.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    assert "bad.png: cannot identify image file" in _refusal(pets) and ".eps" not in decoding.suffixes()


@pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int, turned: int) -> None:
    """Orientation 6 means: turn by 90 degrees clockwise to show it."""
    upright = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = torch.rot90(upright, -turned, (0, 1))
    Image.fromarray(stored.numpy()).save(tmp_path / "side.png", exif=exif)
    assert torch.equal(decode_files([str(tmp_path / "side.png")], squashed(8))[0], upright.permute(2, 0, 1))


def test_images_that_do_not_fit_into_memory_are_refused_where_all_are_asked_for(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "free_memory_bytes", lambda: 2 * 4 * 3 * 8**2 - 1)
    dataset = _load(pets)
    assert [len(batch) for batch in dataset.test.images.split(3)] == [3, 1]
    with pytest.raises(InputError, match=r"^--image-size 8: 4 images need 0\.0 GB of memory, and 0\.0 GB are free"):
        dataset.test.pixels()


def test_digits_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "free_memory_bytes", lambda: 10**9)
    with pytest.raises(InputError, match=r"--image-size 1024: 1,797 images need 11.3 GB"):
        load_dataset(DataConfig(dataset="digits", image_size=1024), seed=0)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_control_group(tmp_path: Path, version: int) -> None:
    """Files laid out as the kernel does."""
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_memory_bytes(tmp_path) == 5_120_000
    kind, options = ("cgroup2", "rw") if version == 2 else ("cgroup", "rw,memory")
    (proc / "mountinfo").write_text(f"30 29 0:26 / /sys/fs/cgroup rw - {kind} cgroup {options}\n")
    (proc / "cgroup").write_text("0::/job\n" if version == 2 else "5:memory:/job\n")
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, ("3000000", "1000000"), strict=True):
        (group / name).write_text(f"{value}\n")
    assert free_memory_bytes(tmp_path) == 2_000_000
    (group / names[0]).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert free_memory_bytes(tmp_path) == 5_120_000


def test_images_of_too_many_pixels_have_a_way_round(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses 178,956,970 pixels, and more; here an image without suffix has more than 100."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (11, 10), "red").save(pets / "train" / "cat" / "large", "PNG")
    said = _refusal(pets)
    assert "broken image" in said and said.endswith(
        "cat/large: Image size (110 pixels) exceeds limit of 100 pixels; if you trust the file, set "
        "QEXP_MAX_IMAGE_PIXELS to more"
    )
    monkeypatch.setenv("QEXP_MAX_IMAGE_PIXELS", "110")
    assert len(_load(pets).train) + len(_load(pets).validation) == 9
    monkeypatch.setenv("QEXP_MAX_IMAGE_PIXELS", "many")
    (pets / "train" / "cat" / "another.png").write_bytes((pets / "train" / "cat" / "0.png").read_bytes())
    assert _refusal(pets) == "QEXP_MAX_IMAGE_PIXELS many: must be a number of pixels, 1 or more"
