"""Folders and files of others: test images alone, CSV files of labels, class names, images without labels."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from qexp.config import DataConfig, QuantizeConfig
from qexp.data.datasets import Dataset, calibration_count, calibration_subset, load_dataset
from qexp.data.folders import check_data_dir
from qexp.errors import InputError

GREY = {"cat": 10, "dog": 20, "emu": 30}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`test/` with three classes of two images, each of one grey that says which class it is."""
    for name, grey in GREY.items():
        for number in range(2):
            _save(tmp_path / "photos" / "test" / name / f"{number}.png", grey)
    return tmp_path / "photos"


def _save(file: Path, grey: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(file)


def _load(root: Path | None, trains: bool = False, **options: Path) -> Dataset:
    places = {name: str(path) for name, path in ({"data_dir": root} | options).items() if path is not None}
    data = DataConfig(dataset="imagefolder", image_size=8, validation_share=0.25, **places)
    return load_dataset(data, 0, needs_training=trains)


def _greys(dataset: Dataset) -> list[int]:
    """Of the test images."""
    return dataset.test.pixels()[:, 0, 0, 0].tolist()


def _refusal(root: Path | None, trains: bool = False, **options: Path) -> str:
    with pytest.raises(InputError) as refused:
        _load(root, trains, **options)
    assert str(refused.value).isprintable()
    return str(refused.value)


def _names(dataset: Dataset) -> list[str]:
    """The class of each test image by its label."""
    return [dataset.classes[label] for label in dataset.test.labels.tolist()]


@pytest.mark.parametrize("part", ["test", "val", ""])
def test_test_images_are_enough_where_nothing_is_trained(root: Path, part: str) -> None:
    if part == "val":
        (root / "test").rename(root / "val")
    if part == "":
        for name in GREY:
            (root / "test" / name).rename(root / name)
        (root / "test").rmdir()
    dataset = _load(root)
    assert dataset.classes == ("cat", "dog", "emu") and _names(dataset) == ["cat"] * 2 + ["dog"] * 2 + ["emu"] * 2
    assert _greys(dataset) == [10, 10, 20, 20, 30, 30]
    assert dataset.parts == ("test",) and len(dataset.train) == len(dataset.validation) == 0
    assert dataset.train.pixels().shape == (0, 3, 8, 8)
    with pytest.raises(InputError, match=r"^--calibration-dir: must be given: .*photos has no training images"):
        _ = dataset.calibration_images
    assert f"no folder {root / 'train'}" in _refusal(root, trains=True)


def test_val_takes_the_place_of_test_in_a_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "test", root / "train")
    (root / "test").rename(root / "val")
    before = _load(root, trains=True)
    assert (len(before.train), len(before.validation), len(before.test)) == (4, 2, 6)
    (root / "test" / "cat").mkdir(parents=True)
    for name in GREY:
        _save(root / "test" / name / "0.png", GREY[name])
    assert len(_load(root, trains=True).test) == 3
    assert "the test images are those of test/; val/ is not used" in capsys.readouterr().err


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        _save(tmp_path / "flat" / f"{number}.png", number)
    _save(tmp_path / "flat" / "more" / "deeper" / "x.png", 9)
    dataset = _load(tmp_path / "flat")
    assert _greys(dataset) == [0, 1, 2, 9] and dataset.test.labels.tolist() == [-1] * 4
    assert not dataset.test.is_labelled and dataset.classes == () and len(dataset.test.digest) == 20
    assert dataset.with_classes(3).classes == ("0", "1", "2")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["a", "b"]))
    assert _load(tmp_path / "flat", classes=names).with_classes(2).classes == ("a", "b")
    (tmp_path / "flat" / "test").mkdir()
    assert "no image in" in _refusal(tmp_path / "flat")


def test_calibration_images_need_no_labels_and_alone_are_decoded(root: Path, tmp_path: Path) -> None:
    for number in range(5):
        _save(tmp_path / "more" / "a" / f"{number}.png", 100 + number)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    dataset = _load(root, calibration_dir=tmp_path / "more")
    images = dataset.calibration_images
    assert calibration_count(QuantizeConfig(), images) == 5
    subset, digest = calibration_subset(images, 5, seed=3)
    assert sorted(subset.images[:, 0, 0, 0].tolist()) == [100, 101, 102, 103, 104] and len(digest) == 16
    assert digest != calibration_subset(images, 5, seed=4)[1]
    with pytest.raises(InputError, match=r"^--calibration-samples 6: must be at most 5, the number of images to"):
        calibration_count(QuantizeConfig(calibration_samples=6), images)


@pytest.mark.parametrize(
    "lines",
    [
        ["test/dog/1.png,dog", "test/cat/0.png,cat"],
        ["file,label", "test/dog/1.png,dog", "test/cat/0.png,cat"],
        ["number;Target;Image", "7;dog;test/dog/1.png", "", "8;cat;test/cat/0.png"],
        ["\ufeffpath\tclass", "test/dog/1.png\tdog", "test/cat/0.png\tcat"],
        ['"test/dog/1.png", "dog"', '"test/cat/0.png", cat'],
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_a_csv_file_of_labels(root: Path, lines: list[str], beside: bool, tmp_path: Path) -> None:
    """Names are relative to its folder, or to the data's."""
    file = (root if beside else tmp_path) / "labels.csv"
    file.write_bytes("\r\n".join(lines).encode())
    dataset = _load(None if beside else root, labels=file)
    assert dataset.classes == ("cat", "dog") and _names(dataset) == ["dog", "cat"] and _greys(dataset) == [20, 10]


def test_labels_that_are_numbers(root: Path, tmp_path: Path) -> None:
    file, names = tmp_path / "labels.csv", tmp_path / "names.txt"
    file.write_text("test/dog/1.png,2\ntest/cat/0.png,0\n")
    assert _load(root, labels=file).classes == ("0", "1", "2")
    assert _load(root, labels=file).with_classes(5).classes == ("0", "1", "2", "3", "4")
    with pytest.raises(InputError, match="has 3 classes, and the model has 2 logits"):
        _load(root, labels=file).with_classes(2)
    names.write_text("cat\nemu\ndog\n")
    assert _names(_load(root, labels=file, classes=names)) == ["dog", "cat"]
    names.write_text("2\n1\n0\n")  # names that are numbers
    assert _load(root, labels=file, classes=names).test.labels.tolist() == [0, 2]
    names.write_text("cat\nemu\n")
    assert (
        _refusal(root, labels=file, classes=names) == f"--labels {file}: label 2: must be 0 to 1, the number of a class"
    )


def test_classes_are_in_the_order_of_the_logits(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("emu\ncat\ndog\n")
    shutil.copytree(root / "test", root / "train")
    dataset = _load(root, trains=True, classes=names)
    assert dataset.classes == ("emu", "cat", "dog")
    assert dataset.test.labels.tolist() == [1, 1, 2, 2, 0, 0]
    greys = {grey: dataset.classes.index(name) for name, grey in GREY.items()}
    assert dataset.train.labels.tolist() == [greys[grey] for grey in dataset.train.pixels()[:, 0, 0, 0].tolist()]
    digits = tmp_path / "digits.txt"
    digits.write_text("\n".join(map(str, range(9, -1, -1))))
    turned = load_dataset(DataConfig(image_size=8, classes=str(digits)), 0)
    assert torch.equal(turned.test.labels, 9 - load_dataset(DataConfig(image_size=8), 0).test.labels)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("cat\ndog\n", "has 2 classes, and the data have 3: cat, dog; cat, dog, emu"),
        ("cat\ndog\nyak\n", "class emu is not among cat, dog, yak"),
        ("cat\ndog\ndog\n", "class dog is there 2 times"),
        ("", "has no name in it"),
        ("cat\n\ndog\nemu\n", "name 2 must be text"),
        ('["cat", 1]', "must be one name a line, or a JSON list of texts"),
        ('{"cat": 1}', "must be one name a line, or a JSON list of texts"),
        ('["cat"', "must be one name a line, or a JSON list ("),
        (b"caf\xe9", "is not UTF-8 at byte 3"),
        (None, "no such file"),
    ],
)
def test_class_names_that_do_not_fit_are_one_line(root: Path, content: str | bytes | None, said: str) -> None:
    file = root / "names.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert _refusal(root, classes=file).startswith(f"--classes {file}: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no row of file and label"),
        ("file,label\n", "has no row of file and label"),
        ("photo,kind\ntest/cat/0.png,cat\n", "line 1: no file photo in "),
        ("test/cat/0.png\n", "line 1: must be a file and its label"),
        ("test/cat/0.png,cat,1\n", "line 1: must be a file and its label"),
        ("test/cat/0.png,cat\ntest/cat/1.png,\n", "line 2: must be a file and its label"),
        ("test/cat/0.png,cat\ntest/cat/9.png,cat\n", "line 2: cannot read "),
        ("test/cat/0.png,cat\ntest/cat/0.png,dog\n", "line 2: test/cat/0.png is there twice"),
        ("test/cat/0.png,cat\nlabels.csv,dog\n", "line 2: labels.csv is no image"),
        ('test/cat/0.png,"cat\n', "not a CSV file ("),
        ("test/cat/0.png,cat\na\0b,cat\n", "line 2: must be a file and its label"),
        (b"caf\xe9.png,cat\n", "is not UTF-8 at byte 3"),
        (None, "no such file"),
    ],
)
def test_labels_that_cannot_be_are_one_line(root: Path, content: str | bytes | None, said: str) -> None:
    file = root / "labels.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert _refusal(root, labels=file).startswith(f"--labels {file}: {said}")


def test_what_is_missing_is_one_line(root: Path, tmp_path: Path) -> None:
    file = root / "labels.csv"
    file.write_text("test/cat/0.png,cat\n")
    assert _refusal(tmp_path / "none").startswith(f"--data-dir {tmp_path / 'none'}: no such folder")
    assert _refusal(root, calibration_dir=tmp_path / "none").startswith("--calibration-dir ")
    (tmp_path / "empty").mkdir()
    assert _refusal(root, calibration_dir=tmp_path / "empty").startswith("--calibration-dir: no image in ")
    assert _refusal(tmp_path / "empty").startswith("--data-dir: no image in ")
    assert _refusal(None, trains=True, labels=file).startswith("--data-dir: must be given")
    assert _refusal(root, trains=True, labels=file).startswith(f"--data-dir {root}: no folder {root / 'train'}")
    (root / "train").mkdir()
    (root / "test").rename(root / "other")
    assert _refusal(root).startswith(f"--data-dir {root}: no folder {root / 'test'}")
    with pytest.raises(InputError, match=r"^--labels .*: needs --dataset imagefolder"):
        check_data_dir(DataConfig(dataset="digits", labels=str(file)))
    assert DataConfig(labels=str(file)).dataset == "imagefolder"
    os.mkfifo(root / "pipe.csv")
    assert _refusal(root, labels=root / "pipe.csv").startswith(f"--labels {root / 'pipe.csv'}: no such file")


def test_a_training_folder_without_classes_calibrates(root: Path) -> None:
    for number in range(3):
        _save(root / "train" / "all" / f"{number}.png", number)
    dataset = _load(root)
    assert len(dataset.calibration_images) == len(dataset.train) == 3 and not dataset.train.is_labelled
    assert dataset.parts == ("train", "test") and dataset.classes == ("cat", "dog", "emu")
    assert "at least 2 class folders in train/" in _refusal(root, trains=True)
