"""The commands, on the store of a finished run: quantize, latency and report work on registered versions."""

import json
import re
from pathlib import Path

import mlflow
import pytest
from conftest import Finished, run_qexp
from PIL import Image

from qexp import tracking
from qexp.data import Dataset
from qexp.evidence import Evidence, from_json

SWEEP = "--batch-sizes 1,4 --min-repeats 3 --min-seconds 0 --warmup 1".split()


def test_metrics_json_is_what_the_summary_and_the_tags_say(finished: Finished) -> None:
    evidence = from_json(Evidence, (finished.folder / "report" / "metrics.json").read_text())
    for name, value in evidence.headline.items():
        assert finished.summary[name] == pytest.approx(value, abs=1e-4)
    mlflow.set_tracking_uri(finished.uri)
    tags = mlflow.MlflowClient().get_model_version("smallnet-digits-int8", "1").tags
    assert float(tags["test_top1_percent"]) == pytest.approx(evidence.int8.accuracy["test"].top1_percent, abs=1e-3)
    assert evidence.int8.quantize.float_layers == () and evidence.int8.cost.int8_percent == 100
    assert evidence.gate.passed == (tags["gate"] == "passed") == evidence.champion


def test_sizes_are_those_of_the_stored_files(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    for kind, file in (("fp32", "model.pt2"), ("int8", "model.pth")):
        folder = Path(mlflow.artifacts.download_artifacts(finished.summary[kind]))
        assert finished.summary[f"{kind}_size_mb"] == pytest.approx(
            (folder / "data" / file).stat().st_size / 1e6, abs=1e-4
        )


def test_nothing_is_left_in_the_working_folder(finished: Finished) -> None:
    assert {path.name for path in finished.folder.iterdir()} <= {"mlflow.db", "mlruns", "mlartifacts", "report"}


def test_the_logged_configuration_says_what_auto_stood_for(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    config = tracking.read_config(finished.summary["run_id"])
    assert config.train.learning_rate == 0.2 and config.train.flip is False and config.train.bf16 is not None
    assert config.threads is not None and config.quantize.calibration_samples == 64


def test_options_that_contradict_the_version_are_refused(in_use: Finished) -> None:
    for option, value in (("--model", "vgg16"), ("--seed", "7"), ("--epochs", "9"), ("--image-size", "64")):
        done = run_qexp(in_use.folder, "run", "--model-uri", in_use.summary["fp32"], option, value)
        assert done.code == 2 and f"{option} {value}: {in_use.summary['fp32']} was made with" in done.stderr


def _champion(finished: Finished) -> str:
    client = mlflow.MlflowClient(tracking_uri=finished.uri)
    return str(client.get_model_version_by_alias("smallnet-digits-int8", "champion").version)


def test_quantize_latency_and_report_on_registered_versions(in_use: Finished) -> None:
    champion = _champion(in_use)
    options = ["--calibration-samples", "32", "--observer", "minmax", "--per-channel", "false"]
    quantized = run_qexp(in_use.folder, "quantize", "--model-uri", "models:/smallnet-digits-fp32@champion", *options)
    assert quantized.code == 0, quantized.stderr
    uri = quantized.summary["int8"]
    version = mlflow.MlflowClient(tracking_uri=in_use.uri).get_model_version(*uri.removeprefix("models:/").split("/"))
    assert version.tags["observer"] == "minmax" and version.tags["per_channel"] == "false"
    assert version.tags["fp32_uri"] == in_use.summary["fp32"]

    early = run_qexp(in_use.folder, "report", "--model-uri", uri)
    assert early.code == 2 and "qexp latency --model-uri" in early.stderr

    latency = run_qexp(in_use.folder, "latency", "--model-uri", uri, *SWEEP)
    assert latency.code == 0, latency.stderr
    assert set(latency.summary["speedup_by_batch_size"]) == {"1", "4"} and len(latency.summary["run_id"]) == 32

    report = run_qexp(in_use.folder, "report", "--model-uri", uri, "--output-dir", "second", "--min-size-ratio", "99")
    assert report.code == 0, report.stderr
    text = (in_use.folder / "second" / "report.md").read_text()
    assert "minmax observer, weights per layer" in text
    assert "is not at least 99; `champion` stays where it was" in text and report.summary["gate"] == "failed"
    assert _champion(in_use) == champion


def test_run_from_a_registered_fp32_version_with_a_gate_that_fails(in_use: Finished) -> None:
    uri, champion = in_use.summary["fp32"], _champion(in_use)
    done = run_qexp(in_use.folder, "run", "--model-uri", uri, *SWEEP, "--min-speedup", "1000", "--engine", "pt2e")
    assert done.code == 0, done.stderr
    assert done.summary["fp32"] == uri and done.summary["gate"] == "failed"
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    version = client.get_model_version(*done.summary["int8"].removeprefix("models:/").split("/"))
    assert version.tags["gate"] == "failed" and "at least 1000" in version.tags["gate_reason"]
    assert version.tags["engine"] == "pt2e" and version.tags["verified"] == "true" and "backend" not in version.tags
    assert str(client.get_model_version_by_alias("smallnet-digits-int8", "challenger").version) == str(version.version)
    assert _champion(in_use) == champion


@pytest.fixture(scope="module")
def picture_folder(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scans as PNG files: three classes, 24 train and 8 test images each, 20 x 20 pixels."""
    root = tmp_path_factory.mktemp("pictures") / "Three Digits"
    for part, split, count in (("train", digits.train, 24), ("test", digits.test, 8)):
        for label in range(3):
            folder = root / part / f"digit {label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(split.images[split.labels == label][:count]):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20))
                picture.save(folder / f"{number}.png")
    return root


def test_the_whole_job_on_a_folder_of_pictures(picture_folder: Path, tmp_path: Path) -> None:
    data = ["--dataset", "imagefolder", "--data-dir", str(picture_folder), "--image-size", "24"]
    options = ["--epochs", "2", "--batch-size", "16", "--output-dir", "out", *SWEEP]
    done = run_qexp(tmp_path, "run", *data, *options)
    assert done.code == 0, done.stderr
    assert done.summary["int8"] == "models:/smallnet-three-digits-int8/1"
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["fp32"]["data"]
    assert facts["classes"] == ["digit 0", "digit 1", "digit 2"] and facts["test_images"] == 24
    assert facts["train_images"] + facts["validation_images"] == 72

    (picture_folder / "train" / "digit 0" / "0.png").write_bytes(b"no picture")
    broken = run_qexp(tmp_path, "run", *data)
    assert broken.code == 2 and re.search(r"broken image .*digit 0/0\.png", broken.stderr)
    (picture_folder / "train" / "digit 0" / "0.png").unlink()
    other = run_qexp(tmp_path, "quantize", "--model-uri", "models:/smallnet-three-digits-fp32/1")
    assert other.code == 2 and "is not what models:/smallnet-three-digits-fp32/1 was trained on" in other.stderr


@pytest.mark.slow
def test_another_torchvision_classifier(tmp_path: Path) -> None:
    options = "--model resnet18 --epochs 1 --calibration-samples 16".split()
    done = run_qexp(tmp_path, "run", *options, *SWEEP)
    assert done.code == 0, done.stderr
    assert done.summary["size_ratio"] > 3.5


def test_a_loss_that_is_no_number_fails_the_run_in_one_line(tmp_path: Path) -> None:
    done = run_qexp(tmp_path, "train", "--learning-rate", "1e30")
    assert done.code == 1
    assert re.search(r"^error: training stopped in epoch 1: the loss is (nan|inf)", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    client = mlflow.MlflowClient(tracking_uri=done.uri)
    experiment = client.get_experiment_by_name("qexp-digits")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]
