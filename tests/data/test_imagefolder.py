"""Folders of images: decoding of every kind of file, what is refused, and the cache."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from qexp.config import DataConfig
from qexp.data.datasets import Dataset, load_dataset
from qexp.data.decoding import decode_files
from qexp.data.imagefolder import read_folder
from qexp.errors import InputError
from qexp.models.preprocessing import Channels, Interpolation, Preprocessing, squashed
from qexp.models.vision import torchvision

transforms, InterpolationMode = torchvision.transforms, torchvision.transforms.InterpolationMode

RED, BLUE = (200, 10, 20), (5, 30, 220)


def _save(file: Path, color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)
    return file


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Red cats and blue dogs: four of each to train with, two to test with."""
    root = tmp_path / "pets"
    for part, count in (("train", 4), ("test", 2)):
        for name, (red, green, blue) in (("dog", BLUE), ("cat", RED)):
            for number in range(count):
                _save(root / part / name / f"{number}.png", (red, green + number, blue))
    return root


def _load(root: Path, image_size: int = 8) -> Dataset:
    options = DataConfig(dataset="imagefolder", data_dir=str(root), image_size=image_size, validation_share=0.25)
    return load_dataset(options, seed=0)


def _decoded(dataset: Dataset) -> dict[str, Tensor]:
    return {part: getattr(dataset, part).pixels() for part in ("train", "validation", "test")}


def _refusal(root: Path) -> str:
    with pytest.raises(InputError) as refused:
        _decoded(_load(root))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def _decode(image: Image.Image, file: Path, image_size: int) -> Tensor:
    image.save(file)
    decoded = decode_files([str(file)], squashed(image_size))
    assert decoded.shape == (1, 3, image_size, image_size) and decoded.dtype == torch.uint8
    return decoded[0]


def test_rgb_png_keeps_every_pixel(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (6, 6, 3), dtype=np.uint8)
    decoded = _decode(Image.fromarray(pixels), tmp_path / "a.png", 6)
    assert torch.equal(decoded, torch.from_numpy(pixels).permute(2, 0, 1))


def test_jpeg_is_near_the_original(tmp_path: Path) -> None:
    decoded = _decode(Image.new("RGB", (16, 16), RED), tmp_path / "a.jpeg", 16)
    assert (decoded.float() - torch.tensor(RED).view(3, 1, 1)).abs().max() <= 3


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    decoded = _decode(Image.fromarray(pixels), tmp_path / "a.png", 8)
    assert all(torch.equal(channel, torch.from_numpy(pixels)) for channel in decoded)


def test_grey_with_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    """Medical and depth images: 65535 is white, not everything above 255."""
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    decoded = _decode(Image.fromarray(levels), tmp_path / "a.png", 8)
    assert (decoded[0].int() - torch.from_numpy(levels.astype(np.int32)) // 257).abs().max() <= 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_a_pixel_are_refused(tmp_path: Path, kind: type[np.generic]) -> None:
    """Nothing says what white is; read as 16 bits, an image of 0 to 255 would be black."""
    with pytest.raises(InputError, match=r"a\.tiff: has 32 bits a pixel, .* save it with 8 or 16 bits"):
        _decode(Image.fromarray(np.full((8, 8), 200, kind)), tmp_path / "a.tiff", 8)


@pytest.mark.parametrize("opacity", [0, 128, 255])
def test_opacity_is_left_out(tmp_path: Path, opacity: int) -> None:
    decoded = _decode(Image.new("RGBA", (8, 8), (*RED, opacity)), tmp_path / "a.png", 8)
    assert decoded[:, 3, 3].tolist() == list(RED)


def test_palette_numbers_become_colours(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((2, 5), 0)
    decoded = _decode(image, tmp_path / "a.gif", 8)
    assert decoded[:, 0, 0].tolist() == list(RED)
    assert decoded[:, 5, 2].tolist() == list(BLUE)  # row 5, column 2


def test_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (8, 8), 1)
    image.putpixel((0, 0), 0)
    decoded = _decode(image, tmp_path / "a.bmp", 8)
    assert decoded[:, 0, 0].tolist() == [0, 0, 0] and decoded[:, 7, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(32, 32), (40, 10), (5, 9)])
def test_other_sizes_are_resized_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    """Nothing is cropped: the left end stays red and the right end blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, size[0], size[1]))
    decoded = _decode(image, tmp_path / "a.png", 8)
    assert decoded[:, :, 0].T.tolist() == [list(RED)] * 8
    assert decoded[:, :, 7].T.tolist() == [list(BLUE)] * 8


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.RandomState(sum(size)).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize("channels", ["rgb", "bgr", "grey"])
def test_pixels_are_those_of_torchvisions_evaluation_transform(
    tmp_path: Path, interpolation: Interpolation, channels: Channels
) -> None:
    """Landscape, portrait and odd sizes, of which some crops are larger than the image; squares and other inputs; the
    short side longer and shorter than the crop; without it, the whole image is resized."""
    sizes = [(40, 25), (25, 41), (33, 33), (64, 9), (12, 12)]
    files = [str(tmp_path / f"{width}x{height}.png") for width, height in sizes]
    for file, size in zip(files, sizes, strict=True):
        _noise(size).save(file)
    mode = InterpolationMode(interpolation)
    for resize, crop in ((20, (16, 16)), (12, (9, 23)), (10, (13, 13)), (33, (12, 19)), (None, (12, 19))):
        first = [transforms.Resize(resize or crop, mode), transforms.CenterCrop(crop), transforms.PILToTensor()]
        made = transforms.Compose(([transforms.Grayscale()] if channels == "grey" else []) + first)
        found = decode_files(files, Preprocessing(*crop, resize, interpolation, channels))
        assert torch.equal(found, torch.stack([made(_noise(size)) for size in sizes]))


@pytest.mark.parametrize("kind", ["exif", "16-bit", "CMYK", "palette", "grey"])
@pytest.mark.parametrize("channels", ["rgb", "grey"])
def test_every_kind_of_file_is_resized_and_cropped(tmp_path: Path, kind: str, channels: Channels) -> None:
    """As the same image is that was opened, turned upright and made RGB before."""
    rgb, options = _noise((30, 20)), {}
    if kind == "exif":
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = 6
    image = {"CMYK": rgb.convert("CMYK"), "palette": rgb.quantize(64), "grey": rgb.convert("L")}.get(kind, rgb)
    if kind == "16-bit":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    file = tmp_path / ("a.tiff" if kind == "CMYK" else "a.png")
    image.save(file, **options)
    upright = {"exif": rgb.rotate(-90, expand=True), "16-bit": rgb.convert("L")}.get(kind, image).convert("RGB")
    made = transforms.Compose([transforms.Resize(14), transforms.CenterCrop((10, 12)), transforms.PILToTensor()])
    expected = made(upright.convert("L") if channels == "grey" else upright)
    assert torch.equal(decode_files([str(file)], Preprocessing(10, 12, 14, channels=channels))[0], expected)


def test_images_keep_the_order_of_the_files(tmp_path: Path) -> None:
    files = [str(_save(tmp_path / f"{level}.png", (level, 0, 0))) for level in (9, 3, 250, 77)]
    assert decode_files(files, squashed(8))[:, 0, 0, 0].tolist() == [9, 3, 250, 77]


def test_folder_becomes_a_dataset(pets: Path) -> None:
    dataset = _load(pets)
    assert dataset.classes == ("cat", "dog")
    assert (dataset.name, dataset.source) == ("pets", str(pets.resolve()))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (6, 2, 4)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.labels.dtype == torch.int64
        assert (part.images[:, 0, 0, 0] == RED[0]).tolist() == (part.labels == 0).tolist()


def test_sub_folders_and_suffixes_in_capitals_count(pets: Path) -> None:
    _save(pets / "test" / "cat" / "more" / "x.PNG", RED)
    assert len(_load(pets).test) == 5


def test_hidden_files_and_other_files_are_ignored(pets: Path) -> None:
    for name in (".hidden.png", "notes.txt", "Thumbs.db", "README"):
        (pets / "train" / "cat" / name).write_text("no image")
    (pets / "train" / ".git").mkdir()
    (pets / "train" / "index.html").write_text("no class")
    dataset = _load(pets)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + len(dataset.validation) == 8


def test_hidden_folders_in_a_class_are_ignored(pets: Path) -> None:
    """Jupyter leaves copies in .ipynb_checkpoints: counted, a training image would come twice."""
    _save(pets / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", RED)
    dataset = _load(pets)
    assert len(dataset.train) + len(dataset.validation) == 8


@pytest.mark.parametrize("keep", [0, 20, 50], ids=["empty", "header", "cut_off"])
def test_cut_off_image_is_named(pets: Path, keep: int) -> None:
    file = pets / "train" / "dog" / "2.png"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"broken image {file}" in _refusal(pets)


def test_cut_off_jpeg_is_named(pets: Path) -> None:
    file = _save(pets / "test" / "cat" / "big.jpg", RED, (64, 64))
    file.write_bytes(file.read_bytes()[:-200])
    assert f"broken image {file}" in _refusal(pets)


def test_text_in_an_image_file_is_named(pets: Path) -> None:
    file = pets / "test" / "cat" / "1.png"
    file.write_text("<html>404 Not Found</html>")
    assert f"broken image {file}" in _refusal(pets)


def test_link_to_nowhere_is_named(pets: Path) -> None:
    link = pets / "train" / "cat" / "gone.png"
    link.symlink_to(pets / "absent.png")
    assert str(link) in _refusal(pets)


def test_empty_class_is_named(pets: Path) -> None:
    (pets / "train" / "emu").mkdir()
    (pets / "test" / "emu").mkdir()
    message = _refusal(pets)
    assert "class emu is empty" in message and str(pets / "train" / "emu") in message


@pytest.mark.parametrize("part", ["train", "test"])
def test_class_in_one_part_only_is_named(pets: Path, part: str) -> None:
    _save(pets / part / "emu" / "0.png", RED)
    message = _refusal(pets)
    assert "same classes" in message and f"emu is only in {part}" in message


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part_is_named(pets: Path, part: str) -> None:
    (pets / part).rename(pets / "elsewhere")
    message = _refusal(pets)
    assert f"no folder {pets / part}" in message and "DIR/train/<class>/" in message


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _save(tmp_path / part / "cat" / "0.png", RED)
    assert "at least 2 class folders" in _refusal(tmp_path)


def test_folder_that_does_not_exist_or_was_not_given(tmp_path: Path) -> None:
    assert f"--data-dir {tmp_path / 'absent'}: no such folder" in _refusal(tmp_path / "absent")
    with pytest.raises(InputError, match="--data-dir: must be given"):
        load_dataset(DataConfig(dataset="imagefolder"), seed=0)


def test_list_folder_is_sorted(pets: Path) -> None:
    found = read_folder(DataConfig(dataset="imagefolder", data_dir=str(pets)), needs_training=True)
    assert found.train is not None and found.classes == ("cat", "dog")
    assert list(found.train.names) == [f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(4)]
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4
