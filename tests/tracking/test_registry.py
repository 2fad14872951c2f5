"""The registry, on a real SQLite store: what a version carries, verification, aliases, a clean subprocess."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import Finished
from markdown import markdown
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from nasty import Page, nasty
from PIL import Image
from stores import new_store
from torch import nn

import qexp
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.foundation.processes import start_python
from qexp.foundation.text import printable
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier, ModelSpec, load_classifier
from qexp.models.preprocessing import squashed
from qexp.pipeline.predict import predict_files
from qexp.tracking import aliases, class_names, clean_process, description, registry
from qexp.tracking.class_names import ClassNames
from qexp.tracking.clean_process import BareProcess
from qexp.tracking.leftovers import discard_unregistered
from qexp.training.train import TrainResult

BARE = """
import sys
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2])))
assert "qexp" not in sys.modules
"""


@pytest.fixture
def client(finished: Finished) -> mlflow.MlflowClient:
    mlflow.set_tracking_uri(finished.uri)
    return mlflow.MlflowClient()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_version_has_signature_example_pins_classes_and_lineage(
    kind: str, finished: Finished, client: mlflow.MlflowClient
) -> None:
    uri = finished.summary[kind]
    info = mlflow.models.get_model_info(uri)
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert info.signature.outputs.inputs[0].shape == (-1, 10)
    assert info.metadata["classes"] == list("0123456789")
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.split("==")[0] for pin in pins} == {"mlflow", "torch", "numpy"} and all("==" in pin for pin in pins)
    assert (folder / "input_example.json").is_file()
    assert (folder / "data" / {"fp32": "model.pt2", "int8": "model.pth"}[kind]).is_file()
    tags = client.get_model_version(*uri.removeprefix("models:/").split("/")).tags
    expected = {"kind", "verified", "dataset", "data_digest", "cpu_features", "test_top1_percent", "size_mb"}
    expected |= {"config_uri", "git_commit", "cpu", "threads", "test_top1_correct", "artifact_sha256"}
    int8 = {"fp32_uri", "engine", "flavor", "backend", "calibration_samples", "gate_reason", "mean_speedup"}
    int8 |= {"calibration_digest", "top1_drop_points", "top1_drop_high_points"}
    assert expected | {"fp32": {"weights_uri"}, "int8": int8}[kind] <= set(tags)
    assert tags["verified"] == "true"
    if kind == "int8":
        assert tags["engine"] == "fx" and tags["flavor"] == "pytorch" and tags["backend"] in ("x86", "onednn")
        assert tags["float_layers"] == "none"


def _version(**tags: str) -> ModelVersion:
    needed = {"kind": "int8", "classes": '["cat", "dog"]'}
    return ModelVersion(
        "resnet18-birds-int8", "1", 0, tags=[ModelVersionTag(*pair) for pair in (needed | tags).items()]
    )


def test_description_of_a_version_gives_the_answer_and_links_to_its_runs(
    finished: Finished, client: mlflow.MlflowClient
) -> None:
    int8, fp32 = (client.get_model_version(f"smallnet-digits-{kind}", "1") for kind in ("int8", "fp32"))
    text, tags = int8.description, int8.tags
    assert text.startswith(f"{finished.summary['verdict'].capitalize()}: {finished.summary['verdict_reason']}")
    drop = [float(tags[f"top1_drop_{name}points"]) for name in ("", "low_", "high_")]
    assert "| Drop | {:.4g} points (95 % interval {:.4g} to {:.4g}) |".format(*drop) in text
    assert f"| {float(tags['mean_speedup']):.4g}x the fastest float in the mean" in text
    assert f"| {float(tags['test_top1_percent']):.4g} % on digits |" in text
    runs = "#/experiments/1/runs"
    assert f"[report]({runs}/{tags['report_run_id']}/artifacts/report/report.html)" in text
    assert f"[quantization]({runs}/{int8.run_id})" in text and f"[latency]({runs}/{tags['latency_run_id']})" in text
    assert "[models:/smallnet-digits-fp32/1](#/models/smallnet-digits-fp32/versions/1)" in text
    assert "mlflow.pytorch.load_model('models:/smallnet-digits-int8/1')" in text
    assert "\n\nKernels: `qexp.load(uri)` uses " in text
    assert f"[training]({runs}/{fp32.run_id})" in fp32.description and "Drop" not in fp32.description
    for kind in ("fp32", "int8"):
        assert "digits" in client.get_registered_model(f"smallnet-digits-{kind}").description


@pytest.mark.slow
def test_names_that_no_tag_holds_are_in_a_file_of_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as ImageNet-21k has; names of 35 letters make longer lists of fewer."""
    names = tuple(f"class {number:05d} of a large set of images" for number in range(10_450))
    mlflow.set_tracking_uri(new_store(tmp_path))
    monkeypatch.setattr(registry, "reloads_equal", lambda *given: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, len(names))).eval()
    sample = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with mlflow.start_run(experiment_id="0"):
        version = registry.register("fp32", model, "many-fp32", ModelSpec("many", names, squashed(16)), sample, {})
    found = registry.find_version(version.uri, "fp32")
    assert found.tags["classes"] == "10450 names: metadata.classes of the file MLmodel"
    assert "logits [N, 10450] in the order of `metadata.classes of the file MLmodel`" in description.of_version(found)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    _, (predicted,) = predict_files(version.uri, [str(tmp_path / "red.png")], 2)
    with torch.no_grad():
        logits = model(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert predicted.classes == tuple(names[place] for place in logits[0].topk(2).indices)


def test_names_are_in_the_tag_where_they_fit() -> None:
    few = ["cat", 'a "dog"', "Ä"]
    tag = class_names.as_tag(few)
    assert json.loads(tag) == few and class_names.parse_tag(tag) == ClassNames(3, tuple(few))
    longest = class_names.as_tag([(class_names.LONGEST_TAG - 4) * "x"])
    assert len(longest) == class_names.LONGEST_TAG and class_names.parse_tag(longest).names
    assert class_names.parse_tag(class_names.as_tag([(class_names.LONGEST_TAG - 3) * "x"])) == ClassNames(1, None)


def test_descriptions_fit_into_a_database_with_any_number_of_names() -> None:
    """PostgreSQL takes 5,000 characters."""
    classes = json.dumps([f"a class of birds {number}" for number in range(1000)])
    layers = ",".join(f"features.{number}.0" for number in range(1000))
    text = description.of_version(_version(classes=classes, engine="fx", float_layers=layers))
    assert len(text) < 1000 and "logits [N, 1000] in the order of the tag `classes`" in text
    assert "in fp32: see tag `float_layers`" in text
    few = description.of_version(_version(flavor="onnx", engine="onnx", float_layers="none"))
    assert "logits [N, 2] in the order cat, dog" in few and "predict(images)['logits']" in few
    assert "| Engine | onnx |" in few


def test_a_version_of_earlier_qexp_is_described_by_the_tags_that_it_has(client: mlflow.MlflowClient) -> None:
    """Those that are no longer set do no harm, what is not known is left out, nor does a run that is gone."""
    old = {"observer": "minmax", "backend_speedups": "x86 2.00", "fold_pool": "false", "smallest_speedup": "1.500"}
    text = description.of_version(_version(test_top1_percent="93.5", dataset="birds", train_run_id="0" * 32, **old))
    assert "| Test top-1 | 93.5 % on birds |" in text
    assert "| Speed | 1.5x at the batch size where it gains least |" in text
    assert "minmax" not in text and "Runs" not in text and "None" not in text


def test_both_versions_are_challenger_and_champion(client: mlflow.MlflowClient) -> None:
    for name in ("smallnet-digits-fp32", "smallnet-digits-int8"):
        for alias in ("challenger", "champion"):
            assert client.get_model_version_by_alias(name, alias).version == 1


def test_int8_version_in_a_bare_process_gives_the_logits_of_the_loaded_model(
    finished: Finished, client: mlflow.MlflowClient, digits: Dataset, tmp_path: Path
) -> None:
    images = to_float(digits.test.images[:40])
    np.save(tmp_path / "images.npy", images.numpy())
    uri = "models:/smallnet-digits-int8@champion"
    environment = registry.child_environment(torch.get_num_threads())
    command = [sys.executable, "-c", BARE, uri, str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run(command, env=environment, check=True)
    logits = np.load(tmp_path / "logits.npy")
    with torch.no_grad():
        loaded = registry.load_version(uri)(images).numpy()
    assert np.array_equal(logits, loaded)
    assert (logits.argmax(1) == digits.test.labels[:40].numpy()).mean() > 0.7


def test_loaded_int8_model_computes_with_int8_kernels(client: mlflow.MlflowClient) -> None:
    model = registry.load_version("models:/smallnet-digits-int8/1")
    graph = str(model.inlined_graph)
    # The last layer is one of oneDNN's, which give float logits.
    assert graph.count("quantized::conv2d_relu") == 6 and graph.count("onednn::qlinear_pointwise") > 0
    assert "aten::conv2d" not in graph and "aten::linear" not in graph


def test_weights_file_of_the_fp32_version_rebuilds_it(client: mlflow.MlflowClient, digits: Dataset) -> None:
    weights = client.get_model_version("smallnet-digits-fp32", "1").tags["weights_uri"]
    model = load_classifier(Path(mlflow.artifacts.download_artifacts(weights)))
    images = to_float(digits.test.images[:16])
    with torch.no_grad():
        assert torch.equal(model(images), registry.load_version("models:/smallnet-digits-fp32/1")(images))


def test_a_version_that_differs_is_not_verified_and_gets_no_alias(
    tmp_path: Path, trained: tuple[Classifier, TrainResult], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    model, _ = trained
    sample = digits.train.images[:8]
    spec = ModelSpec("smallnet", digits.classes, squashed(16))
    # What was stored is not what is in memory: one weight changes between logging and verification.
    damaged = registry.log_version

    def log_then_change(kind: str, module: Classifier, *given: object) -> object:
        info = damaged(kind, module, *given)
        with torch.no_grad():
            module.network[0].weight[0, 0, 0, 0] += 0.25
        return info

    before = model.network[0].weight.detach().clone()
    monkeypatch.setattr(registry, "log_version", log_then_change)
    try:
        with mlflow.start_run(experiment_id="0"):  # not one that a test before this has set
            version = registry.register("fp32", model, "damaged", spec, sample, {})
    finally:
        with torch.no_grad():
            model.network[0].weight.copy_(before)
    assert not version.verified
    registry.make_challenger(version)
    found = mlflow.MlflowClient().get_model_version("damaged", version.version)
    assert found.tags["verified"] == "false"
    assert found.aliases == []


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_what_users_do_with_modules_works(client: mlflow.MlflowClient, digits: Dataset, kind: str) -> None:
    model = qexp.load(f"models:/smallnet-digits-{kind}/1")
    images = to_float(digits.test.images[:4])
    expected = model(images)
    for same in (model.eval(), model.train(), model.to("cpu"), model.float(), model.cpu(), copy.deepcopy(model)):
        assert torch.equal(same(images), expected)
    assert torch.equal(nn.Sequential(model, nn.Identity()).eval()(images.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    assert len(model.state_dict()) == len(list(model.parameters())) + len(list(model.buffers()))


def test_load_sets_the_engine_of_the_version(client: mlflow.MlflowClient) -> None:
    import qexp

    before = client.get_model_version("smallnet-digits-int8", "1").tags["backend"]
    client.set_model_version_tag("smallnet-digits-int8", "1", "backend", "onednn")
    try:
        qexp.load("models:/smallnet-digits-int8/1")
        assert torch.backends.quantized.engine == "onednn"
        registry.load_version("models:/smallnet-digits-int8/1", "x86")  # as the latency sweep asks for others
        assert torch.backends.quantized.engine == "x86"
    finally:
        torch.backends.quantized.engine = "x86"
        client.set_model_version_tag("smallnet-digits-int8", "1", "backend", before)


@pytest.mark.parametrize("uri", ["smallnet", "models:/a", "models:/a/b", "runs:/1/model", "models:/a/1/2"])
def test_other_uris_are_refused(uri: str, client: mlflow.MlflowClient) -> None:
    with pytest.raises(InputError, match="must be models:/NAME/VERSION"):
        registry.find_version(uri, "fp32")


def test_latest_is_the_newest_version(client: mlflow.MlflowClient) -> None:
    assert registry.find_version("models:/smallnet-digits-int8/latest", "int8").version == 1
    assert registry.newest_version("no-such-model") == registry.newest_version("no'such") == "0"


def test_a_version_looked_up_knows_its_logged_model(client: mlflow.MlflowClient) -> None:
    for kind in ("fp32", "int8"):
        found = registry.from_entity(client.get_model_version(f"smallnet-digits-{kind}", "1"))
        assert client.get_logged_model(found.model_id).name == f"smallnet-{kind}"


def test_a_version_that_is_being_made_is_none_yet(finished: Finished, tmp_path: Path) -> None:
    shutil.copy(finished.folder / "mlflow.db", tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(new_store(tmp_path))
    client = mlflow.MlflowClient()
    first = client.get_model_version("smallnet-digits-int8", "1")
    made = client.create_model_version("smallnet-digits-int8", first.source, first.run_id)
    assert registry.newest_version("smallnet-digits-int8") == "1"
    with pytest.raises(InputError, match="must be a version of kind int8"):
        registry.find_version(f"models:/smallnet-digits-int8/{made.version}", "int8")


def test_models_that_somebody_has_registered_stay(tmp_path: Path) -> None:
    """Whatever a run has left: from the logged model, or from the place of its files, where the version has no run."""
    mlflow.set_tracking_uri(new_store(tmp_path))
    client, made = mlflow.MlflowClient(), []
    with mlflow.start_run(experiment_id="0") as run:
        for name in ("by-model", "by-place", "unused"):
            made.append(mlflow.initialize_logged_model(name=name))
            client.log_outputs(run.info.run_id, [LoggedModelOutput(made[-1].model_id, 0)])
        by_model, by_place, unused = made
        for name, source in (("by-model", f"models:/{by_model.model_id}"), ("by-place", by_place.artifact_location)):
            client.create_registered_model(name)
            client.create_model_version(name, source)
            client.set_registered_model_alias(name, "champion", "1")
        discard_unregistered(run.info.run_id)
    assert unused.model_id not in {model.model_id for model in client.search_logged_models(["0"])}
    assert len(client.search_logged_models(["0"])) == 2
    assert all(client.get_model_version_by_alias(name, "champion") for name in ("by-model", "by-place"))


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file"), KeyboardInterrupt()])
def test_a_version_that_could_not_be_completed_is_none_until_the_next_try_completes_it(
    error: BaseException,
    tmp_path: Path,
    trained: tuple[Classifier, TrainResult],
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(uri: str) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    monkeypatch.setattr(registry, "reloads_equal", lambda *given: True)
    model, _ = trained
    given = ("fp32", model, "unfinished", model.spec, digits.train.images[:8], {})
    expected = StageError if isinstance(error, Exception) else KeyboardInterrupt
    with mlflow.start_run(experiment_id="0"):
        with monkeypatch.context() as broken, pytest.raises(expected):
            broken.setattr(registry, "read_contents", fail)  # after the version was made and verified
            registry.register(*given, once=True)
        assert registry.newest_version("unfinished") == "0"
        with pytest.raises(InputError, match="must be a version of kind fp32"):
            registry.find_version("models:/unfinished/1", "fp32")
        assert registry.register(*given, once=True).uri == "models:/unfinished/1"
    (version,) = mlflow.MlflowClient().search_model_versions("name = 'unfinished'")
    assert version.tags["kind"] == "fp32" and version.description and len(list(tmp_path.rglob("model.pt2"))) == 1


def test_a_bare_process_that_is_not_needed_or_is_killed_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started before the model is there, which may never be."""
    monkeypatch.setattr(clean_process, "start_python", start_python)
    with pytest.raises(KeyboardInterrupt), BareProcess("pytorch", dict(os.environ)) as bare:
        raise KeyboardInterrupt
    assert bare._process.returncode == -signal.SIGKILL
    with BareProcess("pytorch", dict(os.environ)) as bare, pytest.raises(StageError, match="exit code -9"):
        bare._process.kill()
        bare.logits("nowhere", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_no_tag_of_a_version_is_markup_in_its_description() -> None:
    """Written anew again and again, it stays the same."""
    for name in nasty(150, seed=3):
        shown, tags = (
            " ".join(printable(name).replace("`", "'").split()),
            dict.fromkeys(("verdict", "gate_reason"), name),
        )
        tags |= {"engine": name, "verdict_reason": name, "promotion_reason": name, "float_layers": name, "cpu": name}
        tags |= {"classes": json.dumps([name, "dog"]), "dataset": name, "test_top1_percent": "1"}
        version = _version(**tags)
        version._name = name.replace("/", "")
        first = description.of_version(version)
        version._description = description.with_kernels(first, "`x86` is used.")
        text = description.of_version(version)
        assert text == version.description == f"{first}\n\nKernels: `x86` is used."
        page = Page(markdown(text, extensions=["tables", "fenced_code"]))
        assert page.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"} and not page.open
        assert page.attributes <= {"class", "style"} and not page.addresses
        assert " ".join(page.text.replace("`", "'").split()).count(shown) >= 3, name
        assert Page(markdown(description.of_model("int8", name))).tags == {"p", "code"}


@pytest.mark.parametrize("moved", [True, False])
def test_a_mover_that_stood_still_looks_again_before_it_moves_the_alias(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process has taken it for one that was killed, removed its mark, and perhaps moved the alias."""
    mlflow.set_tracking_uri(new_store(tmp_path))
    client = mlflow.MlflowClient()
    client.create_registered_model("net-int8")
    for _ in range(3):
        client.create_model_version("net-int8", str(tmp_path))
    client.set_registered_model_alias("net-int8", "champion", "1")
    look, looked = aliases.version_with, list[str]()

    def look_and_stand_still(alias: str, name: str) -> ModelVersion | None:
        found = look(alias, name)
        if not looked:
            for mark in client.get_registered_model(name).tags:
                client.delete_registered_model_tag(name, mark)
            if moved:
                client.set_registered_model_alias(name, alias, "3")
        looked.append(alias)
        return found

    monkeypatch.setattr(aliases, "version_with", look_and_stand_still)
    assert aliases.succeed("models:/net-int8/2", "models:/net-int8/1") is not moved
    assert client.get_model_version_by_alias("net-int8", "champion").version == (3 if moved else 2)
    assert "this process stood still" in capsys.readouterr().err
    assert client.get_registered_model("net-int8").tags == {}
