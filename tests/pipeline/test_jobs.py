"""The commands, on the store of a finished run: quantize, latency and report work on registered versions."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import numpy as np
import pytest
import torch
from conftest import NO_FIGURES, NOT_TIMED, PLAIN, Finished, run_qexp, start_qexp
from mlflow.exceptions import MlflowException

import qexp
from qexp.config import Config, GateConfig, QuantizeConfig, parse_yaml
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.files import from_json
from qexp.measurement.accuracy import measure_accuracy, predict_logits, to_float
from qexp.measurement.host import read_host
from qexp.pipeline import jobs, loading, report
from qexp.pipeline.decide import decide
from qexp.pipeline.job import Job, runs_below
from qexp.pipeline.setup import Setup, with_quantization_checked
from qexp.pipeline.sync import sync_run
from qexp.pipeline.verify import run_verify
from qexp.report.results import Evidence
from qexp.tracking import registry, uploads
from qexp.tracking import runs as tracking
from qexp.tracking.clean_process import bare_logits

# As few times as a verdict needs.
TIMES = "--batch-sizes 1 --min-repeats 6 --loads 3 --max-busy-percent 100 --min-seconds 0 --warmup 1".split()
SWEEP = [*TIMES, *PLAIN, "--calibration-samples", "16"]


def test_the_place_of_the_report_is_said_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `mlflow run` the current folder is that of the project."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "report.html").touch()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    report._copy(tmp_path / "made", "rep")
    report._copy(tmp_path / "made", str(tmp_path / "other"))
    places = [tmp_path / "project" / "rep", tmp_path / "other"]
    assert all((place / "report.html").is_file() for place in places)
    assert capsys.readouterr().err.splitlines() == [f"a copy of the report is in {place}" for place in places]


def test_metrics_json_is_what_the_summary_and_the_tags_say(finished: Finished) -> None:
    evidence = from_json(Evidence, (finished.folder / "report" / "metrics.json").read_text())
    for name, value in evidence.headline.items():
        assert finished.summary[name] == pytest.approx(value, abs=1e-4)
    mlflow.set_tracking_uri(finished.uri)
    tags = mlflow.MlflowClient().get_model_version("smallnet-digits-int8", "1").tags
    assert float(tags["test_top1_percent"]) == pytest.approx(evidence.int8.accuracy["test"].top1_percent, abs=1e-3)
    assert evidence.int8.quantize.float_layers == () and evidence.int8.cost.int8_percent == 100
    assert evidence.gate.passed == (tags["gate"] == "passed") == evidence.champion
    main = mlflow.MlflowClient().get_run(finished.summary["run_id"]).data.tags
    shown = ("verdict", "engine", "gate", "fp32", "int8")
    assert [main[f"qexp.{name}"] for name in shown] == [finished.summary[name] for name in shown]
    assert finished.summary["engine"] == "fx"
    assert tags["smallest_speedup"] == f"{evidence.headline['smallest_speedup']:.3f}"
    assert tags["mean_speedup"] == f"{evidence.headline['mean_speedup']:.3f}"
    assert tags["verdict"] == evidence.verdict.word == finished.summary["verdict"]
    assert tags["verdict_reason"] == evidence.verdict.reason == finished.summary["verdict_reason"]
    assert main["mlflow.note.content"].startswith(f"**{evidence.verdict.word.capitalize()}.** ")


def test_report_of_the_run_says_what_to_ship(finished: Finished) -> None:
    text = (finished.folder / "report" / "report.md").read_text()
    assert text.split("\n\n")[1].startswith(f"**{finished.summary['verdict'].capitalize()}.** ")
    assert f"MLflow run `{finished.summary['run_id']}`" in text
    assert ", the timed process used" in text or not Path("/proc/stat").exists()
    sensitivity = text.split("## Layer sensitivity")[1]
    assert "On 16 validation images, top-1 is " in sensitivity and "`network.22`" in sensitivity


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


def _challenger(finished: Finished) -> str:
    client = mlflow.MlflowClient(tracking_uri=finished.uri)
    return str(client.get_model_version_by_alias("smallnet-digits-int8", "challenger").version)


def test_quantize_latency_and_report_on_registered_versions(in_use: Finished) -> None:
    champion = _champion(in_use)
    (in_use.folder / "quick.yaml").write_text("latency: {batch_sizes: [1], min_repeats: 2, min_seconds: 0}\n")
    options = "--calibration-samples 32 --observer minmax --per-channel false --fold-pool true --sensitivity-images 8 "
    options += "--quantize-max-top1-drop 0 --max-tries 2 --config quick.yaml"
    fp32 = "models:/smallnet-digits-fp32@champion"
    # As on a CPU that has AVX2 alone:
    without_vnni = "import qexp.measurement.host\nqexp.measurement.host.INT8_DOT_PRODUCTS = set()"
    quantized = run_qexp(in_use.folder, "quantize", "--model-uri", fp32, *options.split(), before=without_vnni)
    assert quantized.code == 0, quantized.stderr
    assert "has no int8 dot product" in quantized.stderr
    assert "smallnet has no pool that only enlarges its map" in quantized.stderr
    assert "accuracy budget, try 1 of 2: validation top-1 drop" in quantized.stderr
    uri = quantized.summary["int8"]
    version = mlflow.MlflowClient(tracking_uri=in_use.uri).get_model_version(*uri.removeprefix("models:/").split("/"))
    assert version.tags["reduce_range_reason"].startswith("no int8 dot product: sums of two products")
    assert version.tags["fp32_uri"] == in_use.summary["fp32"]
    params = mlflow.MlflowClient(tracking_uri=in_use.uri).get_run(version.run_id).data.params
    assert params["quantize.observer"] == "minmax" and params["quantize.per_channel"] == "False"

    early = run_qexp(in_use.folder, "report", "--model-uri", uri)
    assert early.code == 2 and "qexp latency --model-uri" in early.stderr

    few = [*TIMES, "--baselines", "none", "--batch-sizes", "1,2"]
    latency = run_qexp(in_use.folder, "latency", "--model-uri", uri, *few)
    assert latency.code == 0, latency.stderr
    assert set(latency.summary["speedup_by_batch_size"]) == {"1", "2"} and len(latency.summary["run_id"]) == 32

    limits = "--min-size-ratio 99 --min-speedup 0 --max-top1-drop 100".split()  # which a busy machine keeps
    report = run_qexp(in_use.folder, "report", "--model-uri", uri, "--output-dir", "second", *limits, before=NO_FIGURES)
    assert report.code == 0, report.stderr
    text = (in_use.folder / "second" / "report.md").read_text()
    assert "minmax observer, weights per layer, of 7 bits" in text
    assert re.search(r"at most 0 points on validation images, (is met|\*\*is not met\*\*) after [12] tr", text)
    assert f"`{uri}` does not get the registry alias `champion`" in text and report.summary["gate"] == "failed"
    assert "is not at least 99" in report.summary["gate_reason"]
    assert _champion(in_use) == champion


def test_all_engines_that_fail_end_the_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(job: object, setup: object, fp32: object, engine: str, *others: object) -> None:
        raise StageError(f"no {engine}")

    monkeypatch.setattr(jobs, "quantize_stage", fail)
    monkeypatch.setattr(jobs, "sensitivity_stage", lambda *given: None)
    monkeypatch.setattr(jobs, "foldings", lambda *given: (False,))
    nothing, fp32 = cast(Any, None), cast(Any, SimpleNamespace(model=None))
    with pytest.raises(StageError, match=r"^no onnx$"):
        jobs.quantize_all(nothing, Setup(parse_yaml("quantize: {engine: [fx, onnx]}"), nothing, nothing), fp32)
    assert "continuing without engine fx: no fx" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "tried"), [("quick: true", ["fx", "pt2e"]), ("{}", ["fx", "pt2e", "onnx"])])
def test_auto_stands_for_every_engine_and_with_quick_for_the_first_that_takes_the_network(
    options: str, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def quantize(job: object, setup: object, fp32: object, engine: str, *others: object) -> str:
        asked.append(engine)
        if engine == "fx":
            raise StageError("no fx")
        return engine

    monkeypatch.setattr(jobs, "quantize_stage", quantize)
    monkeypatch.setattr(jobs, "sensitivity_stage", lambda *given: None)
    monkeypatch.setattr(jobs, "foldings", lambda *given: (False,))
    nothing, fp32 = cast(Any, None), cast(Any, SimpleNamespace(model=None))
    found = jobs.quantize_all(nothing, Setup(parse_yaml(options), nothing, nothing), fp32)
    assert asked == tried and found.int8s == tried[1:] and found.failed == {"fx": "no fx"}


def test_stages_that_have_finished_are_read_and_not_called_again(
    finished: Finished, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.set_tracking_uri(finished.uri)
    run_id = finished.summary["run_id"]
    config, host = tracking.read_config(run_id), read_host(1)
    job, setup = Job(host, run_id, runs_below(run_id)), Setup(config, host, digits)
    monkeypatch.setattr(Job, "_run", None)  # no run is opened
    fp32 = jobs.train_stage(job, setup)
    assert fp32.version.uri == finished.summary["fp32"] and set(fp32.logits) == {"train", "validation", "test"}
    found = jobs.sensitivity_stage(job, setup, fp32)
    assert found and found.images == 16 and [layer.layer for layer in found.layers][:2] == ["network.0", "network.3"]
    int8 = jobs.quantize_stage(job, setup, fp32, "fx", found, fold=False)
    assert int8.version_uri == finished.summary["int8"] and int8.size_bytes > 0 and int8.verified
    latency = jobs.latency_stage(job, config, fp32.version.uri, {int8.version_uri: "fx"}, lambda: None)
    evidence = decide(config, fp32.evidence, [int8], latency)
    assert evidence.verdict.word == finished.summary["verdict"] and latency.run_id != run_id
    with pytest.raises(TypeError):  # another int8 version has not been timed
        jobs.latency_stage(job, config, fp32.version.uri, {"models:/other/1": "fx"}, lambda: None)


@pytest.mark.slow
def test_a_version_whose_training_run_was_deleted_is_quantized_and_sync_makes_it_challenger(
    in_use: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stage writes to its own run only, and moves the alias last: also where its store has been away."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(in_use.uri)
    client, name = mlflow.MlflowClient(), "smallnet-digits-int8"
    trained = client.get_model_version("smallnet-digits-fp32", "1").run_id
    metrics = client.get_run(trained).data.metrics
    monkeypatch.setattr(registry, "reloads_equal", lambda *given: True)
    before, numbers = client.get_model_version_by_alias(name, "challenger").version, registry.version_numbers(name)
    client.delete_run(trained)

    def fail(*given: object) -> None:
        raise MlflowException("no answer")

    try:
        with monkeypatch.context() as patched, pytest.raises(StageError, match="`qexp sync checkpoints/"):
            patched.setattr(tracking, "log_text", fail)  # the last that an upload does, when the version is there
            options = parse_yaml("quantize: {calibration_samples: 16, sensitivity_images: 0}")
            jobs.run_quantize(options, in_use.summary["fp32"])
        assert client.get_model_version_by_alias(name, "challenger").version == before
        (folder,) = Path("checkpoints").iterdir()
        done = sync_run(folder)
    finally:
        client.restore_run(trained)
    assert done["status"] == "FINISHED" and done["int8"] not in [f"models:/{name}/{number}" for number in numbers]
    assert len(registry.version_numbers(name)) == len(numbers) + 1
    assert done["int8"].endswith(f"/{client.get_model_version_by_alias(name, 'challenger').version}")
    assert client.get_run(trained).data.metrics == metrics
    client.set_registered_model_alias(name, "challenger", before)


NO_FX = """
from qexp import quantization
from qexp.errors import StageError
def refuse(*given):
    raise StageError("engine fx cannot quantize this model")
quantization.ENGINES["fx"] = refuse
"""


@pytest.fixture(scope="module")
def side_by_side(in_use: Finished) -> Finished:
    """`qexp run` with three engines and every baseline on the registered fp32 version, which the first cannot
    quantize."""
    options = "--sensitivity-images 0 --calibration-samples 16 --engine fx,pt2e,onnx --output-dir both".split()
    options += "--baselines fp32_eager,fp32_traced,bf16,fp32_onnx".split()
    options += ["--min-speedup", "0", "--max-top1-drop", "100"]  # the present champion alone can be in its way
    options += ["--model-uri", in_use.summary["fp32"], *TIMES]
    done = run_qexp(in_use.folder, "run", *options, before=f"{NO_FIGURES}\n{NO_FX}")
    assert done.code == 0, done.stderr
    return done


def _versions_of(done: Finished) -> dict[str, Any]:
    """The int8 versions of a run, by engine."""
    client = mlflow.MlflowClient(tracking_uri=done.uri)
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{done.summary['run_id']}'")
    ids = {run.info.run_id for run in children}
    found = [version for version in client.search_model_versions() if version.run_id in ids]
    return {version.tags["engine"]: version for version in found}


def test_engines_side_by_side(side_by_side: Finished) -> None:
    """The engine that fails does not end the job."""
    client = mlflow.MlflowClient(tracking_uri=side_by_side.uri)
    versions = _versions_of(side_by_side)
    assert "continuing without engine fx: engine fx cannot quantize this model" in side_by_side.stderr
    assert side_by_side.summary["fp32"] == "models:/smallnet-digits-fp32/1"
    flavors = {engine: version.tags["flavor"] for engine, version in versions.items()}
    assert flavors == {"pt2e": "pytorch", "onnx": "onnx"}
    for version in versions.values():
        assert version.tags["verified"] == "true" and version.tags["gate"] == "passed"
        assert version.tags["latency_run_id"] == versions["onnx"].tags["latency_run_id"]
        assert "backend" not in version.tags
    parent = f"tags.`mlflow.parentRunId` = '{side_by_side.summary['run_id']}'"
    statuses = {run.info.run_name: run.info.status for run in client.search_runs(["1"], parent)}
    finished = {"quantize-pt2e-16", "quantize-onnx-16", "latency-smallnet", "promote-smallnet-digits-int8", "report"}
    assert statuses == {"quantize-fx-16": "FAILED"} | dict.fromkeys(finished, "FINISHED")
    chosen = versions[side_by_side.summary["engine"]]
    replaces = side_by_side.summary["champion"]
    assert chosen.tags["promotion"] == ("passed" if replaces else "champion stays")
    assert side_by_side.summary["int8"] == f"models:/{chosen.name}/{chosen.version}"
    aliases = {alias: str(client.get_model_version_by_alias(chosen.name, alias).version) for alias in ("challenger",)}
    assert aliases["challenger"] == str(chosen.version)
    assert (_champion(side_by_side) == str(chosen.version)) == replaces
    assert side_by_side.summary["ship"] == f"models:/{chosen.name}/{_champion(side_by_side)}"


def test_report_on_engines_side_by_side(side_by_side: Finished) -> None:
    text = (side_by_side.folder / "both" / "report.md").read_text()
    evidence = from_json(Evidence, (side_by_side.folder / "both" / "metrics.json").read_text())
    uris = {f"models:/{version.name}/{version.version}" for version in _versions_of(side_by_side).values()}
    assert {judged.int8.version_uri for judged in evidence.versions} == uris == set(evidence.measured.names)
    assert evidence.int8.version_uri == side_by_side.summary["int8"] and all(f"`{uri}`" in text for uri in uris)
    times = text.split("Median time (p50)")[1].split("`fp32`, p90")[0]
    bf16 = ["bf16"] if evidence.measured.host.has_bf16 else []
    names = ["fp32", "fp32_eager", "fp32_traced", *bf16, "fp32_onnx", "int8_pt2e", "int8_onnx"]
    names += ["int8_onnx_openvino"]
    assert re.findall(r"^\| \**`(\w+)`\** \|", times, re.MULTILINE) == names
    assert [found.model for found in evidence.latency.startups] == names
    assert bool(evidence.measured.bf16) == evidence.measured.host.has_bf16 == ("| smallnet bf16 |" in text)
    mlflow.set_tracking_uri(side_by_side.uri)
    assert all(loading.bf16_of(one) == evidence.measured.rounded for one in _versions_of(side_by_side).values())
    assert f"\n\n**{side_by_side.summary['verdict'].capitalize()}.** " in text
    assert "## Layer sensitivity" not in text


def test_onnx_version_is_served_without_torch(side_by_side: Finished, digits: Dataset, tmp_path: Path) -> None:
    """By mlflow.pyfunc with what its requirements name, and with the bits of the model that qexp loads."""
    version = _versions_of(side_by_side)["onnx"]
    uri = f"models:/{version.name}/{version.version}"
    mlflow.set_tracking_uri(side_by_side.uri)
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.split("==")[0] for pin in pins} == {"mlflow", "onnx", "onnxruntime", "numpy"}
    assert all("==" in pin for pin in pins) and (folder / "model.onnx").is_file()
    assert float(version.tags["size_mb"]) == pytest.approx((folder / "model.onnx").stat().st_size / 1e6)
    info = mlflow.models.get_model_info(uri)
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert "mlflow.pyfunc.load_model" in version.description and "backend" not in version.tags
    script = """
import sys
import mlflow, numpy
found = mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.load(sys.argv[2]))
numpy.save(sys.argv[3], found["logits"])
assert not {"torch", "qexp"} & set(sys.modules)
"""
    images = to_float(digits.test.images[:40])
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", script, uri, str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    environment = registry.child_environment(1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    logits = np.load(tmp_path / "logits.npy")
    assert np.array_equal(logits, registry.load_version(uri, "onnxruntime")(images).numpy())
    assert (logits.argmax(1) == digits.test.labels[:40].numpy()).mean() > 0.7


def test_a_version_runs_in_the_runtime_of_its_tag(
    side_by_side: Finished, digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tags give the accuracy in that runtime, by which `verify` holds it in a process without qexp."""
    mlflow.set_tracking_uri(side_by_side.uri)
    version = _versions_of(side_by_side)["onnx"]
    uri, client, images = (
        f"models:/{version.name}/{version.version}",
        mlflow.MlflowClient(),
        to_float(digits.test.images),
    )
    int8 = loading.int8_of_run(version.tags["quantize_run_id"])
    assert int8.runtime == "onnxruntime" and set(int8.runtimes) == {"openvino"}
    first, other = (int8.in_runtime(name) for name in ("onnxruntime", "openvino"))
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["openvino_agreement_percent"] == other.comparison["test"].agreement_percent > 90
    won = evidence_of(side_by_side).measured.name_of(uri)
    assert version.tags["runtime"] == ("openvino" if won == "int8_onnx_openvino" else "onnxruntime")
    assert f"Kernels: `qexp.load(uri)` uses the runtime `{version.tags['runtime']}`." in version.description
    assert other.accuracy["test"] == measure_accuracy(qexp.load(uri, "openvino")(images), digits.test.labels)
    assert first.accuracy["test"] == measure_accuracy(qexp.load(uri, "onnxruntime")(images), digits.test.labels)
    for name, found in (("openvino", other), ("onnxruntime", first)):
        tags = uploads._tags_of_runtime(version, name)
        assert tags["runtime"] == name and tags["test_top1_correct"] == found.accuracy["test"].top1_correct
        registry.tag_version(uri, tags)
        assert name in type(qexp.load(uri)).__name__.lower().replace("onnxclass", "onnxruntimeclass")
        verified = run_verify(Config(), uri)
        assert verified["top1_percent"] == found.accuracy["test"].top1_percent
    host = read_host(1)
    registry.tag_version(uri, {"runtime": "openvino_bf16"})
    monkeypatch.setattr(registry, "read_host", lambda threads: replace(host, features=("AMX-bf16",)))
    in_bf16 = qexp.load(uri)
    assert in_bf16.options["INFERENCE_PRECISION_HINT"] == "bf16"
    with registry.checked_copy(version) as copy:
        logits = bare_logits(str(copy), "onnx", digits.test.images, registry.child_environment(1), "openvino_bf16")
    assert torch.equal(logits, predict_logits(in_bf16, digits.test.images)) or not host.has_bf16
    monkeypatch.setattr(registry, "read_host", lambda threads: replace(host, features=("AVX512-VNNI",)))
    assert qexp.load(uri).options["INFERENCE_PRECISION_HINT"] == "f32"
    assert "has no bf16 instructions: what is not int8 is computed in fp32" in capsys.readouterr().err
    registry.tag_version(uri, uploads._tags_of_runtime(version, "openvino"))
    monkeypatch.setattr(registry, "has_openvino", lambda: False)
    assert type(qexp.load(uri)).__name__ == "OnnxClassifier" and "in ONNX Runtime" in capsys.readouterr().err
    registry.tag_version(uri, uploads._tags_of_runtime(version, version.tags["runtime"]))
    with pytest.raises(InputError, match="is no ONNX file"):
        qexp.load(side_by_side.summary["fp32"], "openvino")
    with pytest.raises(InputError, match=r"^runtime='tensorrt': must be one of onnxruntime, openvino, openvino_bf16"):
        qexp.load(uri, "tensorrt")  # type: ignore[arg-type]


def evidence_of(done: Finished) -> Evidence:
    return from_json(Evidence, (done.folder / "both" / "metrics.json").read_text())


def test_evidence_of_one_version_of_two(side_by_side: Finished) -> None:
    """The one that was asked for comes first; one that was deleted since is left out."""
    mlflow.set_tracking_uri(side_by_side.uri)
    versions = _versions_of(side_by_side)
    chosen = side_by_side.summary["int8"]
    (other,) = (one for one in versions.values() if f"models:/{one.name}/{one.version}" != chosen)
    uri = f"models:/{other.name}/{other.version}"
    both = loading.evidence_of_version(Config(), uri)
    assert [judged.int8.version_uri for judged in both.versions] == [uri, chosen] and not both.champion
    mlflow.MlflowClient().delete_model_version(other.name, other.version)
    one = loading.evidence_of_version(Config(), chosen)
    assert [judged.int8.version_uri for judged in one.versions] == [chosen]
    assert set(one.measured.names) == {chosen, uri}


def test_the_whole_job_on_a_folder_of_pictures_with_a_classifier_of_torchvision(pictures: Path, tmp_path: Path) -> None:
    """Two of the test images are training images, too."""
    picture_folder = shutil.copytree(pictures, tmp_path / pictures.name)
    for label in (1, 2):
        source, target = (picture_folder / part / f"digit {label}" for part in ("test", "train"))
        shutil.copy(source / "0.png", target / "copy.png")
    data = ["--dataset", "imagefolder", "--data-dir", str(picture_folder), "--image-size", "32"]
    options = [
        "--model",
        "squeezenet1_1",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--output-dir",
        "out",
        *SWEEP,
        *NOT_TIMED,
    ]
    done = run_qexp(tmp_path, "run", *data, *options, before=NO_FIGURES)
    assert done.code == 0, done.stderr
    assert done.summary["int8"] == "models:/squeezenet1_1-three-digits-int8/1" and done.summary["size_ratio"] > 3.5
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["fp32"]["data"]
    assert facts["classes"] == ["digit 0", "digit 1", "digit 2"] and facts["test_images"] == 24
    assert facts["train_images"] + facts["validation_images"] == 74
    told, printed = (
        f"2 of 24 test images {words}"
        for words in ("equal a training or validation image", "also are training or validation images")
    )
    assert done.summary["test_images_also_in_training"] == 2 == facts["duplicates"]["test_images_seen"]
    assert f"warning: {told}" in done.stderr and f"**{printed}" in (tmp_path / "out" / "report.md").read_text()

    (picture_folder / "train" / "digit 0" / "0.png").write_bytes(b"no picture")
    broken = run_qexp(tmp_path, "run", *data)
    assert broken.code == 2 and re.search(r"broken image .*digit 0/0\.png", broken.stderr)
    (picture_folder / "train" / "digit 0" / "0.png").unlink()
    other = run_qexp(tmp_path, "quantize", "--model-uri", "models:/squeezenet1_1-three-digits-fp32/1")
    assert other.code == 2 and "is not what models:/squeezenet1_1-three-digits-fp32/1 was trained on" in other.stderr


def test_a_loss_that_is_no_number_fails_the_run_in_one_line(tmp_path: Path) -> None:
    done = run_qexp(tmp_path, "train", "--learning-rate", "1e30", "--image-size", "8", *NOT_TIMED)
    assert done.code == 1
    assert re.search(r"^error: training stopped in epoch 1: the loss is (nan|inf)", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    client = mlflow.MlflowClient(tracking_uri=done.uri)
    experiment = client.get_experiment_by_name("qexp-digits")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]


def test_engines_that_mlflow_would_not_load_are_refused(monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    config = Config(quantize=QuantizeConfig(engine=["fx", "onnx"]))
    with pytest.raises(InputError, match=r"^--engine fx: with MLFLOW_ALLOW\w*=false it must be onnx;"):
        with_quantization_checked(config, digits)
    with_quantization_checked(Config(quantize=QuantizeConfig(engine=["onnx"])), digits)


def test_kernels_of_an_engine_without_a_choice_are_refused(digits: Dataset) -> None:
    with pytest.raises(
        InputError, match=r"^--backend onednn: .* auto, onnxruntime, openvino, openvino_bf16 with --engine pt2e,onnx$"
    ):
        with_quantization_checked(Config(quantize=QuantizeConfig(engine=["pt2e", "onnx"], backend="onednn")), digits)
    with pytest.raises(InputError, match=r"^--backend x86: must be auto with --engine pt2e, without a choice$"):
        with_quantization_checked(Config(quantize=QuantizeConfig(engine=["pt2e"], backend="x86")), digits)


def test_two_rounds_are_no_verdict_and_move_no_alias(in_use: Finished) -> None:
    aliases = _champion(in_use), _challenger(in_use)
    few = [*SWEEP, *"--min-repeats 2 --min-speedup 0 --output-dir few".split()]
    done = run_qexp(in_use.folder, "run", "--model-uri", in_use.summary["fp32"], *few, before=NO_FIGURES)
    assert done.code == 0 and "warning: no verdict rests on these times: 2 rounds in 2 loads" in done.stderr
    assert done.summary["verdict"] == done.summary["gate"] == "not measured well enough"
    assert done.summary["ship"] is None and not done.summary["champion"]
    assert (_champion(in_use), _challenger(in_use)) == aliases
    assert (
        "**Not measured well enough.** The times do not support a verdict: 2 rounds in 2 loads"
        in (in_use.folder / "few" / "report.md").read_text()
    )


def test_a_busy_machine_is_said_and_makes_no_verdict(in_use: Finished) -> None:
    """The sweep beside a process that computes without end on the same cores."""
    uri, command = in_use.summary["int8"], [sys.executable, "-c", "while True: pass"]
    options = [*TIMES, "--baselines", "none", "--max-busy-percent", "10"]
    process = start_qexp(in_use.folder, "latency", "--model-uri", uri, *options, uri=in_use.uri)
    process.wait_for_line("timing ")
    others = [subprocess.Popen(command) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        assert process.wait() == 0, process.stderr
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert "the machine was busy: other programs or the CPU quota took up to" in process.stderr
    mlflow.set_tracking_uri(in_use.uri)
    found = loading.evidence_of_version(Config(gate=GateConfig(min_speedup=0, max_top1_drop=100)), uri)
    assert found.verdict.word == found.gate.word == "not measured well enough" and found.verdict.ship is None
    assert "the CPU quota took up to" in found.verdict.reason
