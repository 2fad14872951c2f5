"""`qexp verify`: a version as it was registered, and one whose files or whose accuracy are others."""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlflow
import pytest
from conftest import Finished, equal_weights, run_qexp
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import qexp
from qexp.config import Config, LatencyConfig
from qexp.errors import InputError, StageError
from qexp.models.classifier import load_classifier, read_weights
from qexp.pipeline.jobs import run_latency
from qexp.pipeline.loading import load_weights
from qexp.pipeline.predict import predict_files
from qexp.pipeline.promote import run_promote
from qexp.pipeline.verify import run_verify
from qexp.tracking.integrity import checked_copy

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


class Command:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.left}'",)


def _uses(uri: str, image: Path) -> dict[str, Callable[[], object]]:
    """What opens the files of an int8 version, by command."""
    quick = LatencyConfig(batch_sizes=[1], baselines=[])
    return {
        "verify": lambda: run_verify(Config(), uri),
        "predict": lambda: predict_files(uri, [str(image)], 1),
        "latency": lambda: run_latency(Config(latency=quick), uri),
        "promote": lambda: run_promote(Config(latency=quick), NAME, uri.split("/")[-1]),
        "load": lambda: qexp.load(uri),
    }


def test_nothing_is_opened_before_it_has_been_compared(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another file in the place of the model, and then without the digest that says so."""
    monkeypatch.chdir(tmp_path)
    own = client.create_experiment("own", artifact_location=str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", own)  # runs that fail leave nothing in the finished folder
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    uri, left = _copied_version(client, tmp_path / "copy"), tmp_path / "left"
    (tmp_path / "copy" / "data" / "model.pth").write_bytes(pickle.dumps(Command(left)))
    uses = _uses(uri, tmp_path / "image.png")
    for use in uses.values():
        with pytest.raises(StageError, match=rf"^{uri}: its files are not those that were registered: SHA-256 "):
            use()
    client.delete_model_version_tag(NAME, uri.split("/")[-1], "artifact_sha256")
    for use in uses.values():
        with pytest.raises(
            InputError, match=rf"^{uri}: has no tag artifact_sha256, which qexp gives to every version$"
        ):
            use()
    assert not left.exists()
    assert {run.info.status for run in client.search_runs([own])} == {"FAILED"}


def test_files_that_the_digest_does_not_name_are_others(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    uri = _copied_version(client, tmp_path / "copy")
    number = uri.split("/")[-1]
    with checked_copy(client.get_model_version(NAME, number)) as copy:
        assert copy.stat().st_mode & 0o077 == 0  # nobody else can change what has been compared
    for extra in ("data/registered_model_meta", "sitecustomize.py", ".hidden"):
        (tmp_path / "copy" / extra).write_text("x")
        with (
            pytest.raises(StageError, match="its files are not those"),
            checked_copy(client.get_model_version(NAME, number)),
        ):
            pass
        (tmp_path / "copy" / extra).unlink()


def test_weights_that_were_not_registered_are_not_used(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie beside the training: they must have their digest, and be those of the version's own files."""
    found = client.get_model_version("smallnet-digits-fp32", "1")
    original = Path(mlflow.artifacts.download_artifacts(found.tags["weights_uri"], dst_path=str(tmp_path)))
    spec, weights = read_weights(original)
    first = next(iter(weights))
    assert equal_weights(load_weights(found), load_classifier(original))
    file, left, download = tmp_path / "changed.safetensors", tmp_path / "left", mlflow.artifacts.download_artifacts

    def changed(uri: str, **given: str) -> str:
        return download(uri, **given) if uri != found.tags["weights_uri"] else shutil.copy(file, given["dst_path"])

    def save(metadata: str, **others: Tensor) -> Callable[[], object]:
        return lambda: save_file(weights | others, file, metadata={"qexp": metadata})

    own = json.dumps(asdict(spec))
    not_registered = rf"the weights in {found.tags['weights_uri']} are not those that were registered"
    cases: dict[str, list[Callable[[], object]]] = {
        not_registered: [
            save(own, **{first: weights[first] + 1}),
            save(own.replace('"9"', '"ten"')),
            save(own.replace("smallnet", "os:abort")),  # whose code would run
        ],
        "its tag weights_uri is .*: of an unknown architecture, 'os.system'": [
            save(own.replace("smallnet", "os.system"))
        ],
        "its tag weights_uri is .*: not written by qexp": [
            save("[]"),
            save("{"),
            save("[" * 99_999),
            lambda: save_file(weights, file),
            lambda: file.write_bytes(pickle.dumps(Command(left))),
        ],
        "its tag weights_uri is .*: cannot be read": [file.unlink],
    }
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", changed)
    for change in (change for words, changes in cases.items() if "cannot be read" not in words for change in changes):
        change()
        with pytest.raises(StageError, match=not_registered):
            load_weights(found)
    del found.tags["weights_sha256"]  # which versions of before do not have
    for words, changes in cases.items():
        for change in changes:
            change()
            with pytest.raises(StageError if words is not_registered else InputError) as refused:
                load_weights(found)
            assert re.match(f"models:/smallnet-digits-fp32/1: {words}", str(refused.value))
            assert len(str(refused.value).splitlines()) == 1 and not left.exists()
            assert change == file.unlink or tempfile.gettempdir() not in str(refused.value)


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
