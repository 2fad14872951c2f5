"""The folder of a job: one process at a time, results that are there as a whole, nothing left at the end."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import onnx
import pytest
import torch
from conftest import REPOSITORY
from stores import new_store

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier
from qexp.models.onnx_file import OnnxClassifier
from qexp.quantization import quantize_model
from qexp.report.results import Evidence
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import (
    check_unlocked,
    has_results,
    job_folder,
    lock_of,
    note_end,
    noted_end,
    remove_folder,
    stage_folder,
)
from qexp.tracking.results import Fp32, NewModel, keep, kept_in
from qexp.tracking.uploads import upload
from qexp.training.train import TrainResult

HOLD = """
import time
from qexp.tracking.job_folder import lock_of
with lock_of("r1"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def new(trained: tuple[Classifier, TrainResult], digits: Dataset, evidence: Evidence) -> NewModel:
    """A trained classifier that nobody has registered."""
    model, result = trained
    sample, found = digits.train.images[:8], replace(evidence.fp32, version_uri="", size_bytes=0, train=result)
    logits = {"test": torch.rand(4, 10)}
    with torch.no_grad():
        expected = model(to_float(sample))
    return NewModel(found, model, model.spec, sample, expected, logits, {"dataset": "digits"}, "layers")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "LOST", "error": ""}', "[" * 99_999])
def test_a_note_of_the_end_that_was_changed_is_one_line(text: str, tmp_path: Path) -> None:
    note_end(tmp_path, "0", "FAILED", "why")
    assert noted_end(tmp_path, "0") == ("FAILED", "why")
    (tmp_path / "ended-0.json").write_text(text)
    with pytest.raises(InputError, match=rf"^{tmp_path}/ended-0.json: cannot be read \([^\n]*\); remove it$"):
        noted_end(tmp_path, "0")


def test_lock_ends_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_unlocked("r1")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"run r1: process {holder.pid} is still at work"):
        check_unlocked("r1")
    holder.kill()
    holder.wait()
    with lock_of("r1"):
        pass


def test_folders_of_what_has_finished_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("train", "latency"):
        stage_folder(job_folder("one"), stage).mkdir(parents=True)
    note_end(job_folder("one"), "abc", "FAILED", "why")
    assert noted_end(job_folder("one"), "abc") == ("FAILED", "why") and noted_end(job_folder("one"), "d") is None
    remove_folder(stage_folder(job_folder("one"), "train"))
    assert (job_folder("one") / "latency").is_dir()
    remove_folder(job_folder("one"))
    assert list(tmp_path.iterdir()) == []


def _same(first: NewModel, second: NewModel) -> bool:
    tensors = [(first.sample, second.sample), (first.expected, second.expected)]
    tensors += [(first.logits[name], second.logits[name]) for name in first.logits]
    said = [(one.evidence, one.spec, one.tags, one.layers) for one in (first, second)]
    return said[0] == said[1] and all(torch.equal(left, right) for left, right in tensors)


def test_a_trained_model_is_read_as_it_was_written(new: NewModel, tmp_path: Path) -> None:
    assert kept_in(tmp_path / "train") is None and not has_results(tmp_path)
    keep(tmp_path / "train", "r1", new)
    kept = kept_in(tmp_path / "train")
    assert kept and kept.run_id == "r1" and has_results(tmp_path) and isinstance(kept.result, NewModel)
    assert _same(kept.result, new)
    with torch.no_grad():
        assert torch.equal(kept.result.stored(to_float(new.sample)), new.expected)
    (tmp_path / "train" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"cannot be read \(tensors.safetensors is not the file that was written\)"):
        kept_in(tmp_path / "train")


@pytest.mark.parametrize("engine", ["fx", "pt2e", "onnx"])
def test_an_int8_model_is_read_as_it_was_written(
    engine: Any, new: NewModel, evidence: Evidence, digits: Dataset, tmp_path: Path
) -> None:
    made = quantize_model(new.stored, digits.train.images[:16], QuantizeConfig(engine=[engine]), False)
    with torch.no_grad():
        expected = made.module(to_float(new.sample))
    keep(tmp_path, "r1", replace(new, evidence=evidence.int8, stored=made.stored, expected=expected))
    kept = kept_in(tmp_path)
    assert kept and isinstance(kept.result, NewModel) and kept.result.evidence == evidence.int8
    stored = kept.result.stored
    with torch.no_grad():
        call = OnnxClassifier(stored) if isinstance(stored, onnx.ModelProto) else stored
        assert torch.equal(call(to_float(kept.result.sample)), expected)


def test_uploading_again_changes_nothing(new: NewModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files, as after a kill at the end of an upload, and as after one before the version's last tag."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    mlflow.set_experiment("digits")
    client, seen = mlflow.MlflowClient(), list[Any]()
    with tracking.start_run("train-smallnet", "note") as run_id:
        keep(tmp_path / "train", run_id, new)
        for _ in range(2):
            kept = kept_in(tmp_path / "train")
            assert kept is not None
            found = upload(kept.result, tmp_path / "train", kept.at_ms)
            assert isinstance(found, Fp32) and found.version.verified and found.evidence.contents
            (version,) = client.search_model_versions()
            (output,) = client.get_run(run_id).outputs.model_outputs
            curves = ("train/loss", "val/top1", "test_top1_percent", "size_mb")
            points = [[(one.step, one.value) for one in client.get_metric_history(run_id, name)] for name in curves]
            tags = {key: value for key, value in version.tags.items() if key != "size_mb"}
            made = version.version, version.model_id, output.model_id, found.version
            seen.append((made, points, tags, found.evidence))
            if len(seen) == 1:
                client.delete_model_version_tag(version.name, version.version, "kind")
    assert seen[0] == seen[1]
    assert [step for step, _ in seen[0][1][0]] == [1, 2, 3] and len(seen[0][1][2]) == 1
