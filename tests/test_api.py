"""`import qexp`: every stage on a module of one's own, without a server; the examples of its page run as they stand."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import REPOSITORY, environment_for, run_qexp
from forked import start_python
from stores import new_store
from torch import Tensor, nn

import qexp
from qexp.config import Config
from qexp.errors import InputError, StageError
from qexp.models.preprocessing import Preprocessing
from qexp.pipeline.take import own_preprocessing_of
from qexp.quantization import QuantizedModel
from qexp.quantization.equivalence import sqnr_db
from qexp.tracking.tags import tags_of

PAGE = REPOSITORY / "docs" / "how-to" / "python-api.md"
CLASSES = ["ant", "bee", "cat", "dog", "emu"]
FAST: dict[str, Any] = {"loads": 3, "min_repeats": 6, "min_seconds": 0.0, "warmup": 1}


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.excite(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)).relu())
        return x * nn.functional.hardsigmoid(weights)


class Mobile(nn.Module):
    """Depthwise convolution, hard-swish, squeeze and excitation, a residual sum; normalisation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.Hardswish(), Excitation(32)
        )
        self.project = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem((images - 0.5) / 0.25)
        return self.head((x + self.project(self.depthwise(x))).mean((2, 3)))


class Attentive(nn.Module):
    """A small vision transformer of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


LAYERS = {
    Mobile: {"stem.0", "depthwise.0", "depthwise.3.squeeze", "depthwise.3.excite", "project.0", "head"},
    Attentive: {"patches", "attention.in_proj", "attention.out_proj", "mlp.1", "mlp.3", "head"},
}


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().train()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(24) % len(CLASSES)


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    return _made(Mobile)


@pytest.fixture(scope="module")
def int8(mobile: nn.Module, images: Tensor) -> QuantizedModel:
    return qexp.quantize(mobile, images, observer="minmax")


@pytest.mark.parametrize("engine", ["fx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pt2e", "onnx"))])
@pytest.mark.parametrize("kind", [Mobile, Attentive])
def test_own_models_on_every_engine(kind: type[nn.Module], engine: Any, images: Tensor, labels: Tensor) -> None:
    model = _made(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    int8 = qexp.quantize(model, images, engine=engine, observer="minmax")
    assert set(int8.int8_layers) == LAYERS[kind] and int8.float_layers == ()
    found = qexp.compare(model, int8, images, labels)
    assert model.training and all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    with torch.no_grad():
        exact = model.eval()(images)
    assert int8(images).dtype == torch.float32 and sqnr_db(exact, int8(images)) > 15
    with torch.no_grad():  # ONNX Runtime takes numpy arrays, which a tensor that requires gradients does not give
        assert torch.equal(int8(images.clone().requires_grad_()), int8(images))
    for accuracy, logits in ((found.fp32, exact), (found.int8, int8(images))):
        assert accuracy.top1_percent == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    difference = found.difference
    assert difference.top1_drop_points == pytest.approx(found.fp32.top1_percent - found.int8.top1_percent)
    assert difference.top1_drop_low_points < difference.top1_drop_points < difference.top1_drop_high_points
    cost = qexp.cost(model, 16, int8=int8)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.int8_macs == cost.conv_linear_macs  # in attention, products of activations are in no layer
    assert (cost.int8_percent == 100) == (kind is Mobile)


def test_pixels_floats_and_batches_of_pairs_give_the_same(
    mobile: nn.Module, int8: QuantizedModel, pixels: Tensor, images: Tensor, labels: Tensor
) -> None:
    pairs = list(zip(pixels.split(10), labels.split(10), strict=True))
    for given in (pixels, pixels.split(10), pairs, [list(pair) for pair in pairs]):
        assert torch.equal(qexp.quantize(mobile, given, observer="minmax")(images), int8(images))
    whole = qexp.compare(mobile, int8, pixels, labels.tolist())
    assert whole == qexp.compare(mobile, int8, pairs) == qexp.compare(mobile, int8, images, labels)


def test_calibration_takes_spread_images_of_a_tensor_and_the_first_of_an_iterable(
    mobile: nn.Module, pixels: Tensor
) -> None:
    read: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number, batch in enumerate(pixels.split(4)):
            read.append(number)
            yield batch

    first = qexp.quantize(mobile, batches(), observer="minmax", calibration_samples=6)
    assert first.result.calibration_images == 6 and read == [0, 1]
    spread = qexp.quantize(mobile, pixels, observer="minmax", calibration_samples=3)
    same = qexp.quantize(mobile, pixels[[0, 12, 23]], observer="minmax")
    assert torch.equal(spread(pixels / 255), same(pixels / 255))


def test_experts_override_what_is_found_out(mobile: nn.Module, images: Tensor) -> None:
    options: dict[str, Any] = {"observer": "percentile", "percentile": 99.0, "per_channel": False, "backend": "onednn"}
    made = qexp.quantize(mobile, images, reduce_range=True, keep_fp32=["head"], **options).result
    assert (made.reduce_range, made.observer, made.percentile, made.per_channel) == (True, "percentile", 99.0, False)
    assert made.float_layers == made.kept_layers == ("head",) and made.load_backend == "onednn"


def test_models_are_timed_in_turns(mobile: nn.Module, int8: QuantizedModel) -> None:
    threads = torch.get_num_threads()
    times = qexp.benchmark({"own": mobile, "int8": int8}, 16, [1, 4], threads=1, **FAST)
    assert mobile.training and torch.get_num_threads() == threads
    assert times.baseline == "own" and times.threads == 1 and [row.batch_size for row in times.rows] == [1, 4]
    for row in times.rows:
        assert set(row.stats) == {"own", "int8"} and len(row.loads) == 3 and row.noise.low <= row.noise.high
        assert row.speedups["int8"] == row.ratio("own", "int8")
    text = str(times)
    assert all(f"{row.stats['int8'].p50_ms:.3g}" in text for row in times.rows)
    assert f"{times.rows[0].speedups['int8'].median:.2f}" in times._repr_html_()


def test_results_print_as_tables_and_show_as_html(
    mobile: nn.Module, int8: QuantizedModel, images: Tensor, labels: Tensor
) -> None:
    found, cost = qexp.compare(mobile, int8, images, labels), qexp.cost(int8, 16)
    difference = found.difference
    interval = f"{difference.top1_drop_low_points:.2f} to {difference.top1_drop_high_points:.2f}"
    for result, figures in (
        (found, [f"{found.fp32.top1_percent:.2f}", f"{found.int8.top3_percent:.2f}", interval]),
        (int8, ["6 of 6", f"{int8.size_bytes / 1e6:.3f}", "minmax"]),
        (cost, [f"{cost.macs[1]:,}", f"{cost.parameters:,}"]),
    ):
        assert all(figure in str(result) for figure in figures)
        assert all(figure in result._repr_html_() for figure in figures)
        assert result._repr_html_().count("<table>") == len(result.tables())


def test_int8_models_are_saved_for_others(
    mobile: nn.Module, int8: QuantizedModel, images: Tensor, tmp_path: Path
) -> None:
    file = int8.save(tmp_path / "own.pth")
    assert file.stat().st_size == int8.size_bytes == int8.save(tmp_path / "a longer name.pth").stat().st_size
    with torch.no_grad():
        assert torch.equal(torch.jit.load(file)(images), int8.reloaded()(images))
    with pytest.raises(InputError, match=r"saved as NAME\.pth"):
        int8.save(tmp_path / "own.onnx")


def _refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda images: images * 255, ["[0, 1]", "to 255"]),
        (lambda images: images - 1, ["[0, 1]", "-1"]),
        (lambda images: images.masked_fill(images > 0.9, float("nan")), ["[0, 1]", "nan"]),
        (lambda images: images[:, :2], ["[N, 3, H, W]", "2, 16, 16"]),
        (lambda images: images[0], ["[N, 3, H, W]", "[3, 16, 16]"]),
        (lambda images: images[:0], ["there are none"]),
        (lambda images: [], ["there are none"]),
        (lambda images: iter(()), ["there are none"]),
        (lambda images: (255 * images).int(), ["uint8", "int32"]),
        (lambda images: ["a.png"], ["tensor", "str"]),
        (lambda images: None, ["iterable", "NoneType"]),
        (lambda images: [images, images[:, :, 4:]], ["alike", "12"]),
        (lambda images: images[:, :, :2, :2].double() * 3, ["[0, 1]"]),
    ],
)
def test_what_is_no_batch_of_images_is_refused(given: Any, words: list[str], mobile: nn.Module, images: Tensor) -> None:
    _refused(lambda: qexp.quantize(mobile, given(images)), *words)


def test_messages_name_arguments_and_no_options_of_the_command_line(mobile: nn.Module, images: Tensor) -> None:
    class Twice(nn.Module):
        """Ends with a layer that no engine quantizes."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 4, 3), nn.Bilinear(4, 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x).mean((2, 3))
            return self.head(x, x)

    quantize: Any = qexp.quantize
    _refused(lambda: quantize(mobile, images, keep_fp32=["nothing", "other"]), "keep_fp32=nothing,other: not among")
    with pytest.raises(StageError) as failed:
        quantize(Twice(), images)
    assert "allow_float=True" in str(failed.value) and "--" not in str(failed.value)
    times = qexp.benchmark({"own": mobile}, 16, [1], **FAST | {"loads": 1, "min_repeats": 2})
    assert "(min_repeats, loads)" in times.shortcomings[0] and "--" not in "".join(times.shortcomings)
    _refused(lambda: qexp.load("nothing"), "uri nothing: must be models:/NAME/VERSION")


def test_other_bad_input_is_refused(mobile: nn.Module, int8: QuantizedModel, images: Tensor, labels: Tensor) -> None:
    quantize: Any = qexp.quantize
    _refused(lambda: quantize(mobile, images, engine="best"), "engine", "best", "fx", "pt2e", "onnx")
    _refused(lambda: quantize(mobile, images, engine="fx,onnx"), "engine", "one of")
    _refused(lambda: quantize(mobile, images, observer="best"), "observer", "histogram")
    _refused(lambda: quantize(mobile, images, percentile=120.0), "percentile=120.0", "less than or equal to 100")
    _refused(lambda: quantize(mobile, images, obsever="minmax"), "obsever", "observer")
    _refused(lambda: quantize(mobile, images, max_top1_drop=1.0), "max_top1_drop", "qexp.quantize")
    _refused(lambda: quantize(mobile, images, keep_fp32=["nothing"]), "nothing", "stem.0")
    _refused(lambda: quantize(mobile, images, engine="onnx", backend="x86"), "backend", "onnx")
    _refused(lambda: quantize("model.pth", images), "model", "str")
    _refused(lambda: quantize(nn.Conv2d(3, 8, 3), images), "[N, classes]", "[2, 8, 14, 14]")
    _refused(lambda: quantize(nn.Linear(5, 5), images), "does not take images", "[2, 3, 16, 16]")
    compare: Any = qexp.compare
    _refused(lambda: compare(mobile, int8, images, labels[:3]), "3", "24")
    _refused(lambda: compare(mobile, int8, images, labels + 1), "0 to 4", "5")
    _refused(lambda: compare(mobile, int8, images, labels.float()), "class numbers")
    _refused(lambda: compare(mobile, int8, images), "must be given")
    _refused(lambda: compare(mobile, nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), images, labels), "3 logits", "5")
    benchmark: Any = qexp.benchmark
    _refused(lambda: benchmark({}, 16), "one at least")
    _refused(lambda: benchmark({"own": mobile}, 16, [0]), "batch_sizes", "greater than 0")
    _refused(lambda: benchmark({"own": mobile}, 16, loads=0), "loads=0")
    _refused(lambda: benchmark({"own": mobile}, 16, baselines=["bf16"]), "baselines")
    _refused(lambda: benchmark({"own": mobile}, 0), "image_size=0")
    _refused(lambda: benchmark({"own": mobile}, 16, threads=0), "threads=0")
    _refused(lambda: benchmark({"own": nn.Linear(2, 2)}, 16), "own", "does not take images")
    _refused(lambda: qexp.cost(mobile, 16, int8=["nothing"]), "nothing")
    _refused(lambda: qexp.run(mobile, "photos", epochs=3), "epochs=3: must be left out")
    _refused(lambda: qexp.run("models:/own-fp32/1", weights="DEFAULT"), "weights=DEFAULT: must be left out")
    _refused(lambda: qexp.run("smallnet", register=False), "register=False")
    _refused(lambda: qexp.run(3), "model: must be an nn.Module", "int")  # type: ignore[arg-type]
    _refused(lambda: qexp.cost(int, 16), "type")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float"):
        int8((255 * images).to(torch.uint8))


@pytest.mark.slow
def test_registered_models_load_and_the_commands_say_what_they_lack(
    mobile: nn.Module, int8: QuantizedModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_store(tmp_path)
    mlflow.set_tracking_uri(uri)
    for name in ("", "a/b", "a:b", "a@b", "a.b", "a?b", "a#b", "a\nb", 251 * "a"):
        _refused(lambda name=name: qexp.register(mobile, name, classes=CLASSES, image_size=16), "name")  # type: ignore[misc]
    _refused(lambda: qexp.register(mobile, "own-fp32", classes=CLASSES[1:], image_size=16), "4 names", "5 logits")
    bad = [*CLASSES[1:], "\udcff"]
    _refused(lambda: qexp.register(mobile, "own-fp32", classes=bad, image_size=16), "UTF-8")
    register: Any = partial(qexp.register, mobile, "own-fp32", classes=CLASSES)
    _refused(register, "image_size=None: must be given")
    _refused(lambda: register(image_size=16, mean=0.5), "std: must be given with mean")
    _refused(lambda: register(image_size=32, crop=16), "image_size=32: must be that of crop, 16")
    _refused(lambda: register(image_size=16, croop=16), "croop: no option of qexp.register")
    _refused(lambda: qexp.register(int8, "own-int8", classes=CLASSES, image_size=16, mean=0.5, std=1), "inside already")
    fp32_uri = register(crop=16, resize=18, mean=0.5, std=[0.25, 0.5, 1])
    taken = Preprocessing(16, 16, 18, mean=(0.5,) * 3, std=(0.25, 0.5, 1.0))
    assert tags_of(mlflow.MlflowClient().get_model_version("own-fp32", "1")).input == taken
    # To check it again needs the geometry alone: what changes values is in the model.
    assert own_preprocessing_of(Config(model=fp32_uri)) == replace(taken, mean=None, std=None)
    assert mobile.training
    with mlflow.start_run() as run:
        int8_uri = qexp.register(int8, "own-int8", classes=CLASSES, image_size=16)
    onnx = qexp.quantize(mobile, images, engine="onnx", observer="minmax")
    onnx_uri = qexp.register(onnx, "own-int8", classes=CLASSES, image_size=16)
    assert (fp32_uri, int8_uri, onnx_uri) == ("models:/own-fp32/1", "models:/own-int8/1", "models:/own-int8/2")
    mobile.eval()
    std = torch.tensor([0.25, 0.5, 1]).reshape(1, 3, 1, 1)
    for one, model in (
        (fp32_uri, lambda images: mobile((images - 0.5) / std)),
        (int8_uri, int8.reloaded()),
        (onnx_uri, onnx),
    ):
        name, number = one.removeprefix("models:/").split("/")
        version = mlflow.MlflowClient().get_model_version(name, number)
        assert version.tags["verified"] == "true" and version.tags["registered_by"] == "qexp.register"
        with torch.no_grad():
            assert torch.equal(qexp.load(one)(images), model(images))
    turned = images.double().numpy()[:, :, ::-1, ::-1]  # of another type, backwards in memory
    expected = onnx(torch.from_numpy(turned.copy()).float())
    assert torch.equal(qexp.load(onnx_uri)(turned), expected)
    assert torch.equal(qexp.load(onnx_uri)((255 * images).round().to(torch.uint8).numpy()), onnx(images))
    mobile.train()
    found = mlflow.MlflowClient()
    assert found.get_model_version("own-int8", "1").run_id == run.info.run_id
    own_run = found.get_run(found.get_model_version("own-fp32", "1").run_id)
    assert own_run.info.status == "FINISHED" and own_run.info.run_name == "register-own-fp32"
    listed = run_qexp(tmp_path, "models", uri=uri)
    assert listed.code == 0 and len(listed.summary["models"]) == 3
    for words in (
        f"quantize --model-uri {fp32_uri}", f"run --model-uri {fp32_uri}", f"latency --model-uri {int8_uri}",
        f"report --model-uri {int8_uri}", f"verify {fp32_uri}", "promote own-int8",
    ):  # fmt: skip
        done = run_qexp(tmp_path, *words.split(), uri=uri)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.code == 2 and "qexp.register" in line and "Traceback" not in done.stderr


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
def test_examples_of_the_page_run_as_they_stand_there(tmp_path: Path) -> None:
    blocks = "\n".join(_blocks(PAGE))
    shown = blocks.replace("qexp.check(", "qexp.check( qexp.run(")  # the same job once more
    assert all(f"qexp.{name}(" in shown for name in qexp.__all__) and "qexp.run(" in PAGE.read_text()
    process = start_python(tmp_path, ("-c", blocks), environment_for(new_store(tmp_path)))
    assert process.wait() == 0, process.stderr
    said = process.stdout
    assert "models:/digits-own-fp32/1 models:/digits-own-int8/1" in said and "not verified" not in process.stderr
    assert "must be in [0, 1], and are from 0 to 255" in said
    top1 = re.search(r"^fp32 +([\d.]+) ", said, re.MULTILINE)
    assert top1 and float(top1[1]) > 75


def _without(packages: tuple[str, ...], program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python where these packages are found as little as they are where they are not installed."""
    block = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages!r} else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
    environment = environment_for(new_store(folder)) | {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-W", "ignore", "-c", block + program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


EXTRAS = ("torchao", "onnx", "onnxscript", "onnxruntime", "psycopg", "psycopg2", "selenium", "openvino", "nncf")
BARE = """
import sys, qexp
assert not {"torch", "mlflow", "pydantic"} & set(sys.modules)
import torch
from torch import nn
from qexp.errors import InputError
model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)), torch.rand(8, 3, 8, 8)
int8 = qexp.quantize(model, images, observer="minmax")
print(len(int8.int8_layers), "layers")
qexp.compare(model, int8, images, torch.arange(8) % 5)
qexp.benchmark({"fp32": model, "int8": int8}, 8, [1], loads=1, min_repeats=2, min_seconds=0.0, warmup=1)
qexp.cost(model, 8)
assert "mlflow" not in sys.modules  # it comes in with the first registration
for engine in ("pt2e", "onnx"):
    try:
        qexp.quantize(model, images, engine=engine)
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_extras_engine_fx_works_and_the_others_name_them(tmp_path: Path) -> None:
    """In a process that has imported nothing before; MLflow is imported by none of these functions."""
    done = _without(EXTRAS, BARE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 layers",
        "engine pt2e needs torchao: pip install 'qexp[pt2e]'",
        "engine onnx needs onnx: pip install 'qexp[onnx]'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "options", "said"),
    [
        (EXTRAS, ["--engine", "fx,pt2e"], "engine pt2e needs torchao: pip install 'qexp[pt2e]'"),
        (("sklearn",), [], "--dataset digits needs sklearn: pip install 'qexp[digits]'"),
    ],
)
def test_a_command_names_the_extra_before_it_imports_torch(
    gone: tuple[str, ...], options: list[str], said: str, tmp_path: Path
) -> None:
    program = f"""
import runpy
sys.argv = ["qexp", "run", *{options!r}]
sys.path.insert(0, {str(REPOSITORY)!r})
runpy.run_module("entrypoints.cli", run_name="__main__")
"""
    done = _without((*gone, "torch", "mlflow"), program, tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {said}", done.stderr
