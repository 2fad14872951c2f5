# ruff: noqa: E501
"""Classifiers that were trained elsewhere: architectures of others, their weights, preprocessing inside the model."""

import hashlib
import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import DOCUMENTED, says
from torch import Tensor, nn

from qexp.config import Config, QuantizeConfig
from qexp.errors import InputError, StageError
from qexp.foundation.processes import OWN_CODE, python_environment, run_python
from qexp.measurement import sweep_models
from qexp.models import onnx_file
from qexp.models.classifier import (
    Classifier,
    ModelSpec,
    build_classifier,
    load_classifier,
    normalization,
    outline,
    save_classifier,
)
from qexp.models.external import check_weights, load_external, source_facts
from qexp.models.factories import NotImportable, build_from_factory
from qexp.models.names import check_model_name, short_name
from qexp.models.networks import build_network
from qexp.models.preprocessing import Preprocessing, squashed
from qexp.models.program import as_network
from qexp.models.published import own_classes, own_preprocessing
from qexp.models.taken import export_program, wrap
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import clean

ABC = ("a", "b", "c")
PLAIN = squashed(16)
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MY_NETS = """
import random, helpers_of_mine
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    def forward(self, x):
        return self.relu(self.relu(self.conv(x)) + x)

def build(num_classes):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Residual(), *head)

def three():
    return build(helpers_of_mine.THREE)

def handed_on(**options):
    return build(**options)

def without(**options):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 3, **options))

ready = build(3)
number = 3

def fails():
    raise RuntimeError("no such file: w.bin")

def gives_text():
    return "net"

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Pixels(nn.Module):
    def forward(self, x):
        return x

class NaNs(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] / (x.sum() * 0)

class Noise(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] + x.shape[0]

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's and one that has the name of Python's own."""
    for name, text in (("my_nets", MY_NETS), ("helpers_of_mine", "THREE = 3"), ("random", "raise SystemExit")):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "broken_net.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in {"my_nets", "helpers_of_mine", "broken_net"} - before:
        sys.modules.pop(name, None)


def _config(model: str, weights: str | None = None) -> Config:
    return Config(model=model, weights=weights)


def _logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(images)


def test_names_are_accepted_by_their_form_and_shortened(tmp_path: Path) -> None:
    (tmp_path / "model.v2.pt2").touch()
    short = {
        "smallnet": "smallnet", "vgg16": "vgg16", "my_nets:build": "my_nets-build", "a.b:C.make": "a-b-C-make",
        f"{tmp_path}/model.v2.pt2": "model-v2",
    }  # fmt: skip
    for name, expected in short.items():
        check_model_name(name)
        assert short_name(name) == expected
    assert short_name("timm:vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    assert short_name("dir/größe 1.onnx") == "gr-e-1" and short_name("../.onnx") == "onnx"
    for name, line in {
        "my-nets:build": "unknown; Allowed: smallnet, ", "models:/x/1": "unknown; Allowed: ", "my_nets:": "unknown; ",
        "no.pt2": "no such file", f"{tmp_path}/no.onnx": "no such file", "timm:": "unknown; ",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"--model {name}: {line}")):
            check_model_name(name)


@pytest.mark.parametrize("attribute", ["build", "three", "handed_on", "without", "ready"])
def test_a_factory_of_the_current_folder_gives_a_classifier_that_its_weights_file_rebuilds(
    attribute: str, code: Path
) -> None:
    model = load_external(_config(f"my_nets:{attribute}"), ABC, PLAIN)
    assert _logits(model).shape == (4, 3) and not model.training
    assert str(code) not in sys.path
    save_classifier(model, code / "w")
    if attribute != "ready":
        assert torch.equal(_logits(load_classifier(code / "w")), _logits(model))
        assert len(list(outline(model.spec).modules())) == len(list(model.network.modules()))


def test_a_training_process_imports_from_the_folder_of_the_command(
    code: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(NotImportable):
        build_from_factory("my_nets:ready", 3)
    monkeypatch.setenv(OWN_CODE, str(code))
    assert isinstance(build_from_factory("my_nets:ready", 3), nn.Module)
    assert OWN_CODE not in python_environment(dict(os.environ))


def test_a_factory_may_import_a_torchvision_that_was_built_for_another_torch(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import fails unless qexp has imported it in its own way before."""
    (code / "needs_vision.py").write_text(
        "import sys\n"
        "if 'qexp.models.vision' not in sys.modules:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Linear(1, 1)\n"
    )
    monkeypatch.delitem(sys.modules, "qexp.models.vision", raising=False)
    assert isinstance(build_from_factory("needs_vision:build", 2), nn.Linear)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("no_nets:build", "no module no_nets in the current folder, "),
        ("my_nets.deeper:build", "no module my_nets.deeper in the current folder"),
        ("my_nets:nothing", r"my_nets \(.*/my_nets.py\) has no attribute nothing"),
        ("broken_net:build", "importing broken_net failed .No module named 'no_such_package'."),
        ("my_nets:number", "must be a function that returns an nn.Module, and is a int"),
        ("my_nets:fails", r"the call failed \(RuntimeError: no such file: w.bin\)"),
        ("my_nets:leaves", r"the call failed \(SystemExit: 3\)"),
        ("my_nets:gives_text", "must return an nn.Module, and returns a str"),
        ("my_nets:Pair", "must give a tensor of logits, and gives a tuple"),
        ("my_nets:Pixels", r"must give float logits \[1, classes\] for an image, and gives torch.float32 "),
        ("my_nets:NaNs", "gives logits that are NaN or infinite for an image of random pixels$"),
        ("my_nets:Noise", "gives an image other logits when it is alone than among others"),
    ],
)
def test_what_is_no_factory_of_a_classifier_is_one_line(model: str, line: str, code: Path) -> None:
    with pytest.raises(InputError, match=f"^--model {model}: {line}") as refused:
        load_external(_config(model), ABC, PLAIN)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("given", "model", "classes", "preprocessing"),
    [
        ("a network that gives other logits", "three", ABC[:2], PLAIN),
        ("grey images for a network of colours", "three", ABC, Preprocessing(16, 16, channels="grey")),
        ("an image size that does not fit", "without", ABC, Preprocessing(8, 16)),
        ("a network that gives NaN", "NaNs", ABC, PLAIN),
    ],
)
def test_what_does_not_fit_is_the_documented_line(
    given: str, model: str, classes: tuple[str, ...], preprocessing: Preprocessing, code: Path
) -> None:
    with pytest.raises(InputError) as refused:
        load_external(_config(f"my_nets:{model}"), classes, preprocessing)
    assert says(DOCUMENTED[given], str(refused.value))


@pytest.mark.slow
def test_a_process_of_qexp_takes_the_stored_program_instead_of_the_code(code: Path, tmp_path: Path) -> None:
    """As the latency sweep does, which makes the baselines; the folder of the version has the exported program."""
    model = load_external(_config("my_nets:build"), ABC, PLAIN)
    save_classifier(model, code / "weights")
    (code / "stored").mkdir()
    torch.export.save(_exported(model), code / "stored" / "model.pt2")
    torch.save(IMAGES, code / "images.pt")
    done = run_python(["-c", CHILD], {"PATH": "", "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(code / "logits.pt"), _logits(model), atol=1e-5)


CHILD = """
import torch
from pathlib import Path
from qexp.measurement.sweep_models import SweepModel, load, prepare_baseline
from qexp.models.classifier import load_classifier
from qexp.models.factories import NotImportable
here = Path.cwd()
try:
    load_classifier(here / "weights")
except NotImportable as error:
    assert "the current folder is left out" in str(error), error
else:
    raise SystemExit("imported")
prepare_baseline(here / "weights", here / "stored", "fp32_eager", (3, 16, 16), here)
with torch.no_grad():
    torch.save(load(SweepModel("fp32_eager", ""), here)(torch.load(here / "images.pt")), here / "logits.pt")
"""


def _exported(model: nn.Module, batch: bool = True) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},) if batch else None
    return torch.export.export(model, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("batch", [True, False], ids=["any batch", "batches of two"])
def test_an_exported_program_is_a_classifier_with_layers_that_its_weights_file_holds(
    batch: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build_network("smallnet", 3, PLAIN.shape).eval()
    file = tmp_path / "net.pt2"
    torch.export.save(_exported(network, batch), file)
    model = load_external(_config(str(file)), ABC, PLAIN)
    assert torch.equal(_logits(model), _logits(network))
    assert set(model.network.state_dict()) == set(network.state_dict())
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [type(module) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)] == kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # copying it, torch warns of itself
        clean(model, IMAGES, fold_pool=False)
    facts = source_facts(_config(str(file)))
    assert facts["checkpoint_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()
    save_classifier(model, tmp_path / "w")
    again = load_classifier(tmp_path / "w")
    assert again.spec.architecture == "net.pt2" and torch.equal(_logits(again), _logits(network))
    saved = io.BytesIO()
    torch.save(again, saved)  # as the eager baseline is handed on


def test_the_module_of_an_exported_program_is_taken_as_any_other() -> None:
    """MLflow gives such a one for a version in its format pt2, and `qexp.register` writes that."""
    torch.manual_seed(0)
    network = build_network("smallnet", 3, PLAIN.shape).eval()
    given = _exported(network).module()
    model = wrap(as_network(given), ModelSpec("net", ABC, PLAIN))
    assert torch.equal(_logits(model), _logits(network)) and not model.training
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [type(module) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)] == kinds
    with pytest.raises(NotImplementedError):  # which is left as it was
        given.train()
    assert torch.equal(_logits(given), _logits(network)) and as_network(network) is network


def test_what_is_no_exported_program_of_a_network_in_evaluation_is_one_line(tmp_path: Path) -> None:
    network, file = (
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(588, 3)),
        tmp_path / "a.pt2",
    )
    for content in (b"", b"text", b"PK\x03\x04" + bytes(100)):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"--model {file}: not an exported program"):
            load_external(_config(str(file)), ABC, PLAIN)
    torch.save(network.state_dict(), file)
    with pytest.raises(InputError, match="does not load as an exported program"):
        load_external(_config(str(file)), ABC, PLAIN)
    torch.export.save(_exported(network.train()), file)
    with pytest.raises(InputError, match=r"other logits when it is alone .*; was it exported in training mode"):
        load_external(_config(str(file)), ABC, PLAIN)


class _FixesBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)


class _Asks(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        logits = images.mean((2, 3))
        return logits if float(logits.sum()) > 0 else -logits


def test_a_module_that_cannot_be_exported_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match=r"data-dependent .*test_external.py:\d+: return logits if float"):
        export_program(_Asks(), IMAGES, tmp_path / "a.pt2")
    assert capfd.readouterr().err == ""


def test_a_module_that_fixes_its_batch_is_told_how_not_to(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"number of images for a constant, as len\(x\) does; write x\.shape\[0\]"):
        export_program(_FixesBatch(), IMAGES, tmp_path / "a.pt2")


def test_without_class_names_the_model_says_how_many_there_are(code: Path, tmp_path: Path) -> None:
    seven = build_network("squeezenet1_1", 7, (3, 32, 32)).eval()
    torch.save({"model": {f"module.{name}": value for name, value in seven.state_dict().items()}}, tmp_path / "a.pt")
    model = load_external(_config("squeezenet1_1", str(tmp_path / "a.pt")), (), squashed(32))
    assert model.spec.classes == tuple("0123456")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(_logits(model, images), _logits(seven, images))
    assert load_external(_config("my_nets:three"), (), PLAIN).spec.classes == tuple("012")  # as it comes
    five = build_from_factory("my_nets:build", 5).eval()  # which must be told
    torch.save(five.state_dict(), tmp_path / "b.pt")
    model = load_external(_config("my_nets:build", str(tmp_path / "b.pt")), (), PLAIN)
    assert model.spec.classes == tuple("01234") and torch.equal(_logits(model), _logits(five))
    with pytest.raises(InputError, match=r"b.pt: does not fit .*; 2 of another shape \(\S+ \[5, 4\], not \[3, 4\]"):
        load_external(_config("my_nets:three", str(tmp_path / "b.pt")), (), PLAIN)
    with pytest.raises(InputError, match="--image-size 8: not for --model squeezenet1_1"):
        load_external(_config("squeezenet1_1", str(tmp_path / "a.pt")), (), squashed(8))


def test_weights_of_a_file_are_those_of_the_script_that_saved_them(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = build_network("smallnet", 3, PLAIN.shape).eval()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "best.pt")
    config = _config("smallnet", str(tmp_path / "best.pt"))
    preprocessing = Preprocessing(16, 16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model = load_external(config, ABC, preprocessing)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    assert torch.equal(_logits(model), _logits(trained, (IMAGES - mean) / std))
    assert torch.equal(_logits(load_external(config, ABC, PLAIN)), _logits(trained))
    digest = hashlib.sha256((tmp_path / "best.pt").read_bytes()).hexdigest()
    assert source_facts(config) | {"code": ""} == {
        "trained": "elsewhere", "architecture": "smallnet", "code": "", "checkpoint": "best.pt",
        "checkpoint_sha256": digest,
    }  # fmt: skip
    for model_name, weights in (("smallnet", None), ("a.pt2", "best.pt")):
        with pytest.raises(InputError, match=r"^--weights"):
            check_weights(_config(model_name, weights))


@pytest.mark.parametrize(
    ("channels", "given", "by_hand"),
    [
        ("bgr", {"input_range": (0.0, 255.0)}, lambda x: x.flip(1) * 255),
        ("rgb", {"input_range": (-1.0, 1.0)}, lambda x: 2 * x - 1),
        ("rgb", {"mean": (0.0,), "std": (1.0,)}, lambda x: x),
        ("bgr", {"input_range": (0.0, 255.0), "mean": (104.0, 117.0, 123.0), "std": (1.0, 2.0, 4.0)},
         lambda x: (x.flip(1) * 255 - torch.tensor([104.0, 117, 123]).view(1, 3, 1, 1)) / torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)),
        ("grey", {"mean": (0.13,), "std": (0.31,)}, lambda x: (x - 0.13) / 0.31),
    ],
    ids=["BGR, 0 to 255", "-1 to 1", "inside", "BGR, Caffe", "grey"],
)  # fmt: skip
def test_the_network_gets_what_its_script_would_give_it(
    channels: Any, given: dict, by_hand: Any, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    preprocessing = Preprocessing(16, 16, channels=channels, **given)
    network, images = build_network("smallnet", 3, preprocessing.shape).eval(), IMAGES[:, : preprocessing.shape[0]]
    torch.save(network.state_dict(), tmp_path / "w.pt")
    model = load_external(_config("smallnet", str(tmp_path / "w.pt")), ABC, preprocessing)
    expected = _logits(network, by_hand(images))
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    assert torch.allclose(_logits(model, images), expected, **close)
    save_classifier(model, tmp_path / "w")
    again = load_classifier(tmp_path / "w")
    assert torch.equal(_logits(again, images), _logits(model, images)) and again.spec == model.spec


def test_bgr_survives_tracing_export_and_each_engine(tmp_path: Path) -> None:
    spec = ModelSpec("smallnet", ABC, Preprocessing(16, 16, channels="bgr", input_range=(0.0, 255.0)))
    images = (IMAGES * 255).round().to(torch.uint8)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(8, 3))
    model = Classifier(spec, *normalization(spec.preprocessing, images), network).eval()
    assert torch.allclose(_logits(model.normalize).mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.05)
    logits = _logits(model)
    onnx_file.export(model, IMAGES, tmp_path / "fp32.onnx")
    traced = sweep_models.freeze(model, spec.shape, torch.float32)
    for found in (traced, onnx_file.OnnxClassifier(tmp_path / "fp32.onnx")):
        assert torch.allclose(_logits(found), logits, atol=1e-4)
    assert torch.equal(_logits(_exported(model).module()), logits)
    for engine in ("fx", "pt2e", "onnx"):
        int8 = quantize_model(model, images, QuantizeConfig(engine=[engine]), None)
        error = (_logits(int8.module) - logits).pow(2).sum() / logits.pow(2).sum()
        assert len(int8.int8_layers) == 3 and error < 0.05, engine


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"mean": (0.5, 0.5), "std": (1.0,)}, "--mean 0.5,0.5: must be one number, or 3"),
        ({"std": (0.0,)}, "--std 0: must be numbers above 0"),
        ({"mean": (float("nan"),)}, "--mean nan: must be numbers"),
        ({"input_range": (1.0, 1.0)}, "--input-range 1,1: must be two different numbers"),
    ],
)
def test_arithmetic_that_is_none_is_one_line(given: dict, line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        build_classifier(ModelSpec("smallnet", ABC, Preprocessing(16, 16, **given)), torch.zeros(1, 3, 16, 16).byte())


def test_weights_by_name_come_with_their_preprocessing_and_classes() -> None:
    found = own_preprocessing("resnet50", "DEFAULT")
    assert found == Preprocessing(224, 224, 232, "bilinear", "rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    inception = own_preprocessing("inception_v3", "IMAGENET1K_V1")
    assert inception and (inception.height_px, inception.resize_px, inception.mean) == (299, 342, (0.5, 0.5, 0.5))
    classes = own_classes("resnet50", "IMAGENET1K_V1")
    assert classes and len(classes) == 1000 and classes[0] == "tench"
    assert own_preprocessing("resnet50", "best.pt") is None and own_preprocessing("smallnet", None) is None
    for model, weights, line in (
        ("resnet50", "IMAGENET1K_V9", "no such weights of resnet50, and no such file; must be IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("smallnet", "DEFAULT", "must be a file; only models of torchvision and timm have some by name"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"--weights {weights}: {line}")):
            own_preprocessing(model, weights)


def test_weights_by_name_are_taken_from_the_folder_where_they_are_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    config, file = _config("squeezenet1_1", "DEFAULT"), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    classes = tuple(f"class {number}" for number in range(1000))
    with pytest.raises(InputError, match=f"^--weights DEFAULT: https://.* cannot be downloaded .*expected at {file}$"):
        load_external(config, classes, squashed(64))
    assert not file.exists() and not list(file.parent.iterdir())
    network = build_network("squeezenet1_1", 1000, (3, 64, 64)).eval()
    torch.save(network.state_dict(), file)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(_logits(load_external(config, classes, squashed(64)), images), _logits(network, images))
    assert "is not the file that torchvision publishes" in capfd.readouterr().err
    assert source_facts(config)["checkpoint"] == file.name and source_facts(config)["weights"] == "DEFAULT"
    with pytest.raises(InputError, match="its last layer is for 1000 classes, and the data have 3"):
        load_external(config, ABC, squashed(64))


def test_a_model_of_timm_at_a_size_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="extra timm")
    name, preprocessing = "timm:vit_tiny_patch16_224", squashed(32)
    check_model_name(name)
    torch.manual_seed(0)
    network = build_network(name, 3, preprocessing.shape).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "vit.pt")
    model = load_external(_config(name, str(tmp_path / "vit.pt")), ABC, preprocessing)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(_logits(model, images), _logits(network, images))
    save_classifier(model, tmp_path / "w")
    assert torch.equal(_logits(load_classifier(tmp_path / "w"), images), _logits(network, images))
    found = own_preprocessing(name, None)
    assert found == Preprocessing(224, 224, 248, "bicubic", "rgb", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"^--weights DEFAULT: https://\S* cannot be downloaded .*expected in .*models--timm--vit"
    ):
        load_external(_config(name, "DEFAULT"), ABC, preprocessing)
    with pytest.raises(InputError, match=r"no such model; did you mean .*vit_tiny_patch16_224"):
        build_network("timm:vit_tiny_patch16_225", 3, preprocessing.shape)
    assert build_network("timm:resnet18", 3, (1, 32, 32)).conv1.in_channels == 1
    assert source_facts(_config(name))["code"].startswith("timm ")


def test_timm_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"^--model timm:resnet18 needs timm: pip install 'qexp\[timm\]'$"):
        check_model_name("timm:resnet18")


def test_a_weights_file_of_a_factory_that_is_gone_names_it(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_classifier(load_external(_config("my_nets:build"), ABC, PLAIN), code / "w")
    sys.modules.pop("my_nets")
    (code / "elsewhere").mkdir()
    monkeypatch.chdir(code / "elsewhere")
    with pytest.raises(NotImportable, match="my_nets:build: no module my_nets in the current folder"):
        load_classifier(code / "w")
