"""`qexp verify`: a version as it was registered, and one whose files or whose accuracy are others."""

import shutil
from pathlib import Path

import mlflow
import pytest
from conftest import Finished, run_qexp
from PIL import Image

from qexp.config import Config
from qexp.errors import InputError, StageError
from qexp.pipeline.predict import predict_files
from qexp.pipeline.verify import run_verify

NAME = "smallnet-digits-int8"


@pytest.fixture
def client(finished: Finished, tmp_path: Path) -> mlflow.MlflowClient:
    """Of a copy of the database: versions made here leave the finished run as it is."""
    shutil.copy(finished.folder / "mlflow.db", tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow.MlflowClient()


def _copied_version(client: mlflow.MlflowClient, folder: Path, **changed: str) -> str:
    """Another version with the tags of the first, and with files of its own in `folder`."""
    first = client.get_model_version(NAME, "1")
    shutil.copytree(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1"), folder)
    made = client.create_model_version(NAME, folder.as_uri(), first.run_id, tags=first.tags | changed)
    return f"models:/{NAME}/{made.version}"


def test_a_version_as_it_was_registered(finished: Finished, client: mlflow.MlflowClient) -> None:
    done = run_qexp(finished.folder, "verify", f"models:/{NAME}@champion", uri=mlflow.get_tracking_uri())
    assert done.code == 0, done.stderr
    summary = done.summary
    assert summary["verified"] is True and summary["uri"] == finished.summary["int8"]
    assert summary["top1_percent"] == finished.summary["int8_top1_percent"] and summary["test_images"] == 359
    assert summary["same_cpu_features"] is True


def test_files_that_were_changed_or_are_gone(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    uri = _copied_version(client, tmp_path / "copy")
    file = tmp_path / "copy" / "data" / "model.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StageError, match=rf"^{uri}: its files are not those that were registered: SHA-256 "):
        run_verify(Config(), uri)
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    with pytest.raises(StageError, match=rf"^{uri}: its files are not those"):
        predict_files(uri, [str(image)], 1)
    file.unlink()
    with pytest.raises(StageError, match=rf"^{uri}: the model's file is gone"):
        run_verify(Config(), uri)
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(StageError, match=rf"^{uri}: "):
        run_verify(Config(), uri)


def test_another_accuracy_than_was_recorded(
    client: mlflow.MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image makes the difference; on a CPU with other instructions it does not."""
    right = float(client.get_model_version(NAME, "1").tags["test_top1_correct"])  # in halves where two classes tie
    uri = _copied_version(client, tmp_path / "copy", test_top1_correct=str(right - 1))
    with pytest.raises(
        StageError, match=rf"{uri}: top1 is .* now \({right:g} of 359 .* \({right - 1:g}\): 1 images differ"
    ):
        run_verify(Config(), uri)
    client.set_model_version_tag(NAME, uri[-1], "cpu_features", "SSE")
    found = run_verify(Config(), uri)
    assert found["verified"] and not found["same_cpu_features"]
    assert "differs from the recorded one" in capsys.readouterr().err


def test_tags_that_were_changed_are_one_line(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    uri = _copied_version(client, tmp_path / "copy")
    number = uri.split("/")[-1]
    for name, value in (("threads", "x"), ("test_top1_correct", "abc")):
        kept = client.get_model_version(NAME, number).tags[name]
        client.set_model_version_tag(NAME, number, name, value)
        with pytest.raises(InputError, match=f"^{uri}: its tag {name} is {value}, which is no number$"):
            run_verify(Config(), uri)
        client.set_model_version_tag(NAME, number, name, kept)
    for name in ("test_top3_percent", "data_digest", "train_run_id"):
        kept = client.get_model_version(NAME, number).tags[name]
        client.delete_model_version_tag(NAME, number, name)
        with pytest.raises(InputError, match=f"^{uri}: has no tag {name}, which qexp gives to every version$"):
            run_verify(Config(), uri)
        client.set_model_version_tag(NAME, number, name, kept)


def test_pickle_that_is_forbidden_is_said(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(StageError, match="does not load with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false: MLflow loads"):
        run_verify(Config(), f"models:/{NAME}/1")


def test_what_is_no_version_of_ours(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("theirs")
    client.create_model_version("theirs", "file:///nowhere")
    for uri, words in (
        ("theirs", "must be models:/"),
        ("models:/theirs/1", "qexp registered"),
        ("models:/a/1", "exist"),
    ):
        with pytest.raises(InputError, match=f"^URI {uri}: .*{words}"):
            run_verify(Config(), uri)


def test_other_data_than_the_version_was_made_with(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    uri = _copied_version(client, tmp_path / "copy", data_digest="0" * 16)
    with pytest.raises(InputError, match=r"--data-dir: .* is not what .* was trained on \(digest 0{16}\)"):
        run_verify(Config(), uri)
