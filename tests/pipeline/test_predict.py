"""`qexp predict`: real image files of many kinds, what it prints, and what it refuses."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import Finished, run_qexp
from PIL import Image
from stores import new_store

from qexp.data.datasets import Dataset
from qexp.data.decoding import decode_files
from qexp.errors import InputError, StageError
from qexp.measurement.accuracy import predict_logits
from qexp.models.preprocessing import squashed
from qexp.pipeline import predict as prediction
from qexp.tracking.registry import load_version

INT8 = "models:/smallnet-digits-int8/1"


@pytest.fixture
def folder(tmp_path: Path, digits: Dataset) -> Path:
    """Test images in forms that people have; digit N is what N in the name says."""
    first = {int(label): image for image, label in zip(digits.test.images, digits.test.labels, strict=True)}
    picture = [Image.fromarray(first[n].permute(1, 2, 0).numpy()) for n in range(10)]
    picture[0].convert("L").save(tmp_path / "grey 0.png")
    picture[1].resize((90, 60)).save(tmp_path / "1.jpg", quality=95)
    veiled = picture[2].convert("RGBA")
    veiled.putalpha(99)
    veiled.save(tmp_path / "2.png")
    exif = picture[3].getexif()
    exif[0x0112] = 6  # "turn it": as in a data set, the pixels are taken as they are stored
    picture[3].save(tmp_path / "3.jpg", exif=exif, quality=95)
    Image.fromarray(np.asarray(picture[4].convert("L")).astype(np.uint16) * 257).save(tmp_path / "4.png")
    picture[6].save(tmp_path / "ÄÖ 6.bmp")
    return tmp_path


def test_names_and_probabilities_of_any_image_file_as_lines_and_as_json(
    folder: Path, finished: Finished, digits: Dataset
) -> None:
    files = sorted(file.name for file in folder.iterdir())
    done = run_qexp(folder, "predict", INT8.replace("/1", "@challenger"), *files, "--top-k", "2", uri=finished.uri)
    assert done.code == 0, done.stderr
    assert done.summary["uri"] == INT8 and [found["file"] for found in done.summary["images"]] == files
    mlflow.set_tracking_uri(finished.uri)
    decoded = decode_files([str(folder / name) for name in files], squashed(16))
    shares = torch.softmax(predict_logits(load_version(INT8), decoded), 1)
    for found, expected in zip(done.summary["images"], shares, strict=True):
        best = expected.argsort(descending=True, stable=True)[:2].tolist()
        assert [one["class"] for one in found["classes"]] == [digits.classes[rank] for rank in best]
        assert [one["probability"] for one in found["classes"]] == pytest.approx(expected[best].tolist(), abs=6e-5)
    lines = done.stderr.splitlines()
    assert len(lines) == len(files) and all(line.startswith(name) for line, name in zip(lines, files, strict=True))
    right = [found["classes"][0]["class"] in found["file"] for found in done.summary["images"]]
    assert sum(right) >= len(files) - 2


def test_many_files_go_through_in_batches(folder: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri(finished.uri)
    files = [str(file) for file in sorted(folder.iterdir())]
    _, whole = prediction.predict_files(INT8, files, 3)
    monkeypatch.setattr(prediction, "BATCH_SIZE", 4)
    _, parts = prediction.predict_files(INT8, files, 3)
    assert parts == whole and len({found.probabilities for found in whole}) == len(files)


def test_more_classes_than_there_are_are_all_of_them(folder: Path, finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    _, (found,) = prediction.predict_files("models:/smallnet-digits-fp32@challenger", [str(folder / "1.jpg")], 99)
    assert sorted(found.classes) == list("0123456789")
    assert sum(found.probabilities) == pytest.approx(1)


BAD_IMAGES = {
    "absent.png": "IMAGE absent.png: no such file",
    ".": "IMAGE .: a folder",
    "text.png": "IMAGE text.png: cannot identify image file",
    "empty.jpg": "IMAGE empty.jpg: cannot identify image file",
    "cut.jpg": "IMAGE cut.jpg: ",
    f"{'a' * 300}.png": "no such file",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_file_that_is_no_image_is_refused_by_name(
    name: str, folder: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:500])
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri(finished.uri)
    with pytest.raises(InputError) as refused:
        prediction.predict_files(INT8, ["1.jpg", name], 3)
    assert BAD_IMAGES[name] in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/smallnet-digits-int8/9", "URI models:/smallnet-digits-int8/9: does not exist"),
        ("models:/smallnet-digits-int8@nobody", "does not exist"),
        ("models:/nothing/1", "does not exist"),
        ("smallnet", "URI smallnet: must be models:/NAME/VERSION"),
    ],
)
def test_an_unknown_version_is_refused(uri: str, said: str, folder: Path, finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    with pytest.raises(InputError, match=said):
        prediction.predict_files(uri, [str(folder / "1.jpg")], 3)


def test_a_version_that_qexp_did_not_register_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("other")
    monkeypatch.chdir(place)
    mlflow.set_tracking_uri(new_store(place))
    client = mlflow.MlflowClient()
    client.create_registered_model("other")
    client.create_model_version("other", str(place))
    with pytest.raises(
        InputError, match="URI models:/other/1: must be a version of kind fp32 or int8 that qexp regist"
    ):
        prediction.predict_files("models:/other/1", [str(folder / "1.jpg")], 3)


def test_a_version_that_cannot_be_loaded_is_one_line(
    folder: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.set_tracking_uri(finished.uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(
        StageError, match=f"{INT8} does not load with MLFLOW_ALLOW.*=false: .*take a version of engine onnx"
    ):
        prediction.predict_files(INT8, [str(folder / "1.jpg")], 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (f"{INT8} nowhere.png", "IMAGE nowhere.png: no such file"),
        (f"{INT8} 1.jpg --top-k 0", "--top-k 0: must be a whole number, at least 1"),
        (f"{INT8} 1.jpg --threads 0", "--threads 0"),
        (INT8, "IMAGE"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(arguments: str, said: str, folder: Path, finished: Finished) -> None:
    done = run_qexp(folder, "predict", *arguments.split(), uri=finished.uri)
    assert done.code == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr
