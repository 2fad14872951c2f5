"""`qexp check` and `qexp.check`: classifiers that were trained elsewhere, taken as they are."""

import io
import json
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from conftest import NO_FIGURES, REPOSITORY, Finished, environment_for, run_qexp
from forked import start_python
from mlflow.models import MetricThreshold
from PIL import Image
from stores import new_store
from torch import Tensor, nn

import qexp
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.tracking.store import logged_model_of

pytestmark = pytest.mark.slow
FEW = (
    "--quick --baselines none --sensitivity-images 0 --batch-sizes 1 --loads 3 --min-repeats 6 --min-seconds 0 "
    "--warmup 1 --max-busy-percent 100"
).split()
EXAMPLES = REPOSITORY / "examples"
CODE = (EXAMPLES / "my_nets.py").read_text()


@dataclass(frozen=True)
class Given:
    """What somebody else has: a folder with images, code and weights; and what the script that trained them says."""

    folder: Path
    images: Tensor
    labels: Tensor
    correct: int


@pytest.fixture(scope="module")
def given(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_nets.py").write_text(CODE)
    test, train = digits.test.subset(torch.arange(200)), digits.train.subset(torch.arange(400))
    for part, split in (("test", test), ("train", train)):
        for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            file = folder / "photos" / part / f"digit-{label}" / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    made: dict[str, Any] = {}
    exec(CODE, made)
    model, images = made["build"](), train.images.float() / 127.5 - 1  # residual sums, and one ReLU for all
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(15):
        for chosen in torch.randperm(400).split(50):
            loss = nn.functional.cross_entropy(model(images[chosen]), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "best.pt")
    files = [file for of_class in sorted((folder / "photos/test").iterdir()) for file in sorted(of_class.iterdir())]
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        correct = int((model.eval()(pixels.float() / 127.5 - 1).argmax(1) == labels).sum())
    assert correct > 150
    return Given(folder, pixels, labels, correct)


@pytest.fixture(scope="module")
def checked(given: Given) -> Finished:
    words = "my_nets:build --weights best.pt --data photos --image-size 16 --input-range -1,1 --output-dir report"
    return run_qexp(given.folder, "check", *words.split(), *FEW, before=NO_FIGURES)


def test_a_model_of_ones_own_gets_the_answer_of_run(checked: Finished, given: Given, finished: Finished) -> None:
    assert checked.code == 0, checked.stderr
    found = checked.summary
    assert found["command"] == "check" and found.keys() == finished.summary.keys()
    assert found["fp32_top1_percent"] == pytest.approx(100 * given.correct / 200)  # to the last image
    tags = mlflow.MlflowClient(checked.uri).get_model_version("my_nets-build-photos-fp32", "1").tags
    assert tags["trained"] == "elsewhere" and tags["checkpoint"] == "best.pt" and len(tags["checkpoint_sha256"]) == 64
    assert json.loads(tags["preprocessing"])["input_range"] == [-1.0, 1.0]
    report = (given.folder / "report/report.md").read_text()
    assert "trained elsewhere: architecture `my_nets:build`" in report
    assert "tested on photos" in report and "Loss by epoch" not in report


def test_its_versions_load_without_qexp_and_without_its_code(checked: Finished, given: Given, tmp_path: Path) -> None:
    code = """import sys, mlflow, numpy, torch
mlflow.set_tracking_uri(sys.argv[1])
images = torch.from_numpy(numpy.load(sys.argv[2])).float() / 255
for kind in ("fp32", "int8"):
    model = mlflow.pytorch.load_model(f"models:/my_nets-build-photos-{kind}/1")
    print((model(images).argmax(1) == torch.from_numpy(numpy.load(sys.argv[3]))).sum().item())
assert "qexp" not in sys.modules and "my_nets" not in sys.modules"""
    np.save(tmp_path / "images.npy", given.images.numpy())
    np.save(tmp_path / "labels.npy", given.labels.numpy())
    words = [checked.uri, str(tmp_path / "images.npy"), str(tmp_path / "labels.npy")]
    process = start_python(tmp_path, ("-c", code, *words), dict(os.environ), clean=True)
    assert process.wait() == 0, process.stderr
    int8 = round(checked.summary["int8_top1_percent"] * 2)
    assert process.stdout.split() == [str(given.correct), str(int8)]


def test_what_works_on_own_versions_works_on_it(
    checked: Finished, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32, int8 = checked.summary["fp32"], checked.summary["int8"]
    for words in (
        ["verify", int8],
        ["predict", int8, "photos/test/digit-3/" + os.listdir(given.folder / "photos/test/digit-3")[0]],
    ):
        done = run_qexp(given.folder, *words, uri=checked.uri)
        assert done.code == 0, done.stderr
    mlflow.set_tracking_uri(checked.uri)
    monkeypatch.chdir(given.folder)  # where the code of the network is
    options: dict[str, Any] = {"baselines": "none", "batch_sizes": [1], "loads": 3, "min_repeats": 6, "min_seconds": 0}
    again = qexp.run(fp32, given.folder / "photos", engine="fx", sensitivity_images=0, warmup=1, **options)
    assert again.evidence.int8.version_uri == "models:/my_nets-build-photos-int8/2" and again.run_id
    assert again.evidence.fp32.version_uri == fp32
    with pytest.raises(InputError, match="register=False: must be left out"):
        qexp.run(fp32, register=False)


def test_mlflow_evaluates_it_beside_its_source(checked: Finished, given: Given) -> None:
    from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry as evaluators

    from qexp.tracking.evaluator import Evaluator

    evaluators.register("qexp", Evaluator)  # as the entry point of the installed package does
    mlflow.set_tracking_uri(checked.uri)
    rows = given.images.reshape(200, -1).numpy()
    client = mlflow.MlflowClient()
    with mlflow.start_run(experiment_id=client.get_run(checked.summary["run_id"]).info.experiment_id) as run:
        found = mlflow.models.evaluate(
            checked.summary["int8"], rows, targets=given.labels.numpy(), model_type="classifier", evaluators="qexp"
        )
    assert found.metrics["fp32_top1_percent"] == pytest.approx(checked.summary["fp32_top1_percent"])
    assert found.metrics["top1_drop_points"] == pytest.approx(checked.summary["top1_drop_points"])
    high = found.metrics["top1_drop_high_points"]
    mlflow.validate_evaluation_results(
        {"top1_drop_high_points": MetricThreshold(threshold=high + 0.1, greater_is_better=False)}, found
    )
    (used,) = client.get_run(run.info.run_id).inputs.model_inputs
    logged = client.get_logged_model(used.model_id)
    assert logged.model_id == logged_model_of(client.get_model_version(*checked.summary["int8"].split("/")[1:]))
    ours = [metric for metric in logged.metrics or [] if metric.run_id == run.info.run_id]
    assert {metric.key: metric.value for metric in ours} == pytest.approx(found.metrics)
    assert {metric.dataset_name for metric in ours} == {"dataset"} and all(metric.dataset_digest for metric in ours)


def test_two_processes_share_the_evaluation_and_find_the_same(checked: Finished, given: Given, tmp_path: Path) -> None:
    words = "my_nets:build --weights best.pt --data photos --image-size 16 --input-range -1,1".split()
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m entrypoints.import_model".split()
    environment = environment_for(f"sqlite:///{tmp_path}/mlflow.db")
    process = start_python(given.folder, (*torchrun, *words), environment)
    assert process.wait() == 0, process.stderr
    assert "shared by 2 processes" in process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["fp32_top1_percent"] == checked.summary["fp32_top1_percent"]


def test_without_registering_nothing_is_asked_of_mlflow(given: Given, tmp_path: Path) -> None:
    words = f"{given.folder}/best.pt --model my_nets:build --data {given.folder}/photos --image-size 16".split()
    (tmp_path / "my_nets.py").write_text(CODE)
    words += ["--input-range=-1,1", "--no-register", "--output-dir", "report", *FEW]
    done = run_qexp(tmp_path, "check", *words, uri="http://127.0.0.1:9", before=NO_FIGURES)  # nobody is there
    assert done.code == 0, done.stderr
    assert done.summary["fp32_top1_percent"] == pytest.approx(100 * given.correct / 200)
    assert sorted(os.listdir(tmp_path)) == ["my_nets.py", "report"] or "__pycache__" in os.listdir(tmp_path)
    assert "were not registered" in (tmp_path / "report/report.md").read_text()


def test_a_module_in_python_and_an_onnx_file(given: Given, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    exec(CODE, made)
    model = made["build"]()
    state = torch.load(given.folder / "best.pt", weights_only=True)["model"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    options: dict[str, Any] = {
        "data": given.folder / "photos", "register": False, "image_size": 16, "input_range": "-1,1",
        "baselines": "none", "sensitivity_images": 0, "batch_sizes": [1], "loads": 3, "min_repeats": 6, "warmup": 1,
        "min_seconds": 0,
    }  # fmt: skip
    with redirect_stderr(io.StringIO()):  # which has no file, as in some notebooks
        found = qexp.check(model, **options, engine="fx")
    assert found.evidence.fp32.accuracy["test"].top1_correct == given.correct
    assert found.verdict.word in capsys.readouterr().out.lower() and "<table>" in found._repr_html_()
    pytest.importorskip("onnxscript")
    file = tmp_path / "net.onnx"
    batch = {0: torch.export.Dim("batch", min=1, max=999)}
    torch.onnx.export(model.eval(), (torch.rand(2, 3, 16, 16),), str(file), dynamo=True, dynamic_shapes=(batch,))
    other = qexp.run(file, options.pop("data"), **options)
    assert other.evidence.fp32.accuracy["test"].top1_correct == given.correct
    assert other.evidence.int8.quantize.engine == "onnx"


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "resnet18.pt --model resnet18 --resize 64 --crop 64"),
        ("resnet18", "resnet18.onnx --resize 64 --crop 64"),
        ("own", "own.pt --model my_nets:build --resize 32 --crop 32"),
        ("vit_tiny", "vit_tiny.pt --model timm:vit_tiny_patch16_224 --resize 32 --crop 32"),
    ],
)
def test_the_examples_go_through(name: str, words: str, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's right answers to the last image, the report, and both versions without the example's code."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    right = import_module("train").main(name, str(given.folder / "photos"), str(given.folder / name), 1)
    options = [*"--data photos --preprocess imagenet --output-dir".split(), f"report-{name}", *FEW]
    done = run_qexp(given.folder, "check", *words.split(), *options)
    assert done.code == 0, done.stderr
    assert done.summary["fp32_top1_percent"] == pytest.approx(100 * right / len(given.images))
    assert "trained elsewhere" in (given.folder / f"report-{name}" / "report.md").read_text()
    mlflow.set_tracking_uri(done.uri)
    side = int(words.rpartition(" ")[2])
    images = np.zeros((2, 3, side, side), np.float32)
    for kind in ("fp32", "int8"):
        found = mlflow.pyfunc.load_model(done.summary[kind]).predict(images)
        (logits,) = found.values() if isinstance(found, dict) else (found,)
        assert np.asarray(logits).shape == (2, 10)


def test_wrong_input_is_one_line(given: Given) -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
    photos = given.folder / "photos"
    for words, options in (
        ("no such option; did you mean image_size", {"image_sise": 16}),
        ("gives logits of 7 classes|7 logits", {"image_size": 16}),
        ("no such folder", {"data": "nowhere"}),
    ):
        with pytest.raises(InputError, match=words):
            qexp.check(model, **{"data": photos, "register": False} | options)
    for weights in ("best.pt",):
        with pytest.raises(InputError, match=r"is weights alone; say with"):
            qexp.check(given.folder / weights, data=photos, register=False)


def test_any_version_of_mlflow_is_taken(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = new_store(tmp_path)
    mlflow.set_tracking_uri(uri)
    monkeypatch.syspath_prepend(str(given.folder))
    model = import_module("my_nets").build()
    with mlflow.start_run(experiment_id=mlflow.create_experiment("own", artifact_location=str(tmp_path / "own"))):
        plain: Any = {"registered_model_name": "plain", "serialization_format": "pickle", "pip_requirements": ["torch"]}
        mlflow.pytorch.log_model(model, name="m", **plain)
    words = ["models:/plain/1", "--data", "photos", "--image-size", "16"]
    done = run_qexp(given.folder, "import", *words, uri=uri)
    assert done.code == 0, done.stderr
    assert done.summary["fp32"] == "models:/plain-1-photos-fp32/1"
    gone = run_qexp(given.folder, "import", "models:/plain/7", *words[1:], uri=uri)
    assert gone.code == 2 and "MODEL models:/plain/7: does not exist" in gone.stderr


def test_images_without_labels_show_agreement(given: Given, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    shutil.copytree(given.folder / "photos/test/digit-3", loose)
    (tmp_path / "classes.txt").write_text("\n".join(f"digit-{number}" for number in range(10)))
    (tmp_path / "my_nets.py").write_text(CODE)
    words = f"{given.folder}/best.pt --model my_nets:build --data loose --image-size 16 --classes classes.txt".split()
    words += f"--input-range -1,1 --min-agreement 10 --calibration-dir {given.folder}/photos/train".split()
    done = run_qexp(tmp_path, "check", *words, "--output-dir", "report", *FEW, before=NO_FIGURES)
    assert done.code == 0, done.stderr
    assert done.summary["fp32_top1_percent"] == 100
    verified = run_qexp(tmp_path, "verify", done.summary["int8"])
    assert verified.code == 0, verified.stderr
    assert verified.summary["top1_percent"] == pytest.approx(done.summary["int8_top1_percent"])
    report = (tmp_path / "report/report.md").read_text()
    assert "The test images have no labels" in report and "Lowest agreement with fp32" in report
