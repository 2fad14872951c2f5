"""The exact clean-up: outputs stay, dropout and batch norm go, a repeated pool is folded, odd networks stay."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import equal_weights
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.folding import folded
from qexp.models.preprocessing import squashed
from qexp.models.vision import torchvision  # first: the import that works beside a CPU build of torch
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import clean, folded_layers

IMAGES = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FIRST_LINEAR = "network.classifier.0"


def _build(name: str, size: int = 32) -> Classifier:
    """With random weights, and batch norms whose statistics are not the neutral ones."""
    torch.manual_seed(0)
    return _with_statistics(build_classifier(ModelSpec(name, tuple("0123456789"), squashed(size)), IMAGES).eval())


def _with_statistics(model: Classifier) -> Classifier:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def _error(cleaned: nn.Module, model: nn.Module, size: int = 32) -> float:
    """Largest difference of the outputs, as a share of the largest output."""
    with torch.no_grad():
        inputs = nn.functional.interpolate(IMAGES.float() / 255, size=(size, size))
        expected = model(inputs)
        return float((cleaned(inputs) - expected).abs().max() / expected.abs().max())


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("fold_pool", [False, True])
@pytest.mark.parametrize("name", ["smallnet", "resnet18", "mobilenet_v2"])
def test_outputs_stay_and_dropout_and_batch_norm_go(name: str, fold_pool: bool) -> None:
    model = _build(name)
    before = copy.deepcopy(model)
    cleaned = clean(model, IMAGES[:2].float() / 255, fold_pool)
    assert _error(cleaned, model) < 1e-5
    assert not _kinds(cleaned) & {nn.Dropout, nn.BatchNorm2d}
    assert equal_weights(model, before) and nn.BatchNorm2d in _kinds(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert set(layers) <= {name for name, _ in cleaned.named_modules()}  # they keep their names


def _vgg() -> Classifier:
    """Torchvision's VGG with narrow layers, five pools and 512 channels before the linear layers as all of them."""
    vgg = torchvision.models.vgg
    torch.manual_seed(0)
    with torch.device("meta"):  # without 100 million weights, which are replaced
        network = vgg.VGG(nn.Identity(), num_classes=10, init_weights=False)
    network.features = vgg.make_layers([8, "M", 16, "M", 32, "M", 64, "M", 512, "M"], batch_norm=True)
    network.classifier = nn.Sequential(nn.Linear(49 * 512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    model = _build("smallnet")
    model.network = network.eval()
    return _with_statistics(model)


def test_pools_of_vgg() -> None:
    """A pool that enlarges its map is folded, one that averages is not."""
    vgg = _vgg()
    plain = clean(vgg, IMAGES[:2].float() / 255, fold_pool=False)
    assert _error(plain, vgg) < 1e-5
    assert plain.get_submodule(FIRST_LINEAR).in_features == vgg.get_submodule(FIRST_LINEAR).in_features == 49 * 512
    folded = clean(vgg, IMAGES[:2].float() / 255, fold_pool=True)
    assert _error(folded, vgg) < 1e-5
    assert nn.Dropout in _kinds(vgg) and not _kinds(folded) & {nn.Dropout, nn.BatchNorm2d}
    assert folded.get_submodule(FIRST_LINEAR).in_features == 512
    assert _parameters(plain) - _parameters(folded) == 48 * 512 * 64
    assert (folded_layers(vgg, folded), folded_layers(vgg, plain)) == ([FIRST_LINEAR], [])
    for size, inputs in ((96, 9 * 512), (224, 49 * 512)):  # maps of 3 x 3 pixels, whose averages overlap, and 7 x 7
        images = nn.functional.interpolate(IMAGES[:2].float() / 255, size=(size, size))
        vgg.spec = ModelSpec("smallnet", vgg.spec.classes, squashed(size))
        larger = clean(vgg, images, fold_pool=True)
        assert larger.get_submodule(FIRST_LINEAR).in_features == inputs
        assert _error(larger, vgg, size) < 1e-5


class _Odd(nn.Module):
    """A pool that repeats, and more than one place that uses what comes of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.pool = nn.Conv2d(3, 8, 32), nn.AdaptiveAvgPool2d(3)
        self.one, self.two = nn.Linear(72, 5), nn.Linear(72, 5)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.conv(images))
        flat = torch.flatten(pooled, 1)
        if self.way == "two layers":
            return self.one(flat) + self.two(flat)
        if self.way == "one layer twice":
            return self.one(flat) + self.one(pooled.flatten(1) / 2)
        if self.way == "by keyword":
            return self.one(input=flat)
        return self.one(flat) + pooled[:, :5, 2, 2]


@pytest.mark.parametrize("way", ["two layers", "one layer twice", "by keyword", "the map itself"])
def test_outputs_stay_where_a_pool_has_more_than_one_reader(way: str) -> None:
    model = _Odd(way).eval()
    assert _error(clean(model, IMAGES[:2].float() / 255, fold_pool=True), model) < 1e-5


class _InFunctions(nn.Module):
    """A pool and a flattening that are no modules."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.linear = way, nn.Conv2d(3, 8, 32), nn.Linear(72, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.adaptive_avg_pool2d(self.conv(images), output_size=(3, 3))
        flat = {
            "view": lambda: maps.view(maps.size(0), -1),
            "reshape": lambda: maps.reshape(-1, 72),
            "flatten": lambda: torch.flatten(maps, start_dim=1),
        }[self.way]()
        return self.linear(flat)


@pytest.mark.parametrize("way", ["view", "reshape", "flatten"])
def test_a_pool_in_a_function_is_folded(way: str) -> None:
    model, images = _InFunctions(way).eval(), IMAGES[:2].float() / 255
    small = folded(model, images)
    assert small and small.get_submodule("linear").in_features == 8 and _error(small, model) < 1e-5
    assert folded_layers(model, clean(model, images, fold_pool=True)) == ["linear"]
    assert folded(small, images) is None and folded(_Branching(), images) is None


class _Shared(nn.Module):
    """One convolution, called twice, with a batch norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        nn.init.constant_(self.first.bias, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(images)))).mean((2, 3))


def test_a_convolution_that_is_called_twice_keeps_its_weights() -> None:
    model = _Shared().eval()
    assert _error(clean(model, IMAGES[:2].float() / 255, fold_pool=False), model) < 1e-5


class _Branching(nn.Module):
    """Takes a decision that depends on pixels, which tracing cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.mean() > 0 else images.amax((2, 3))


def test_a_network_that_cannot_be_traced_is_copied(capsys: pytest.CaptureFixture[str]) -> None:
    model = _Branching()
    cleaned = clean(model, IMAGES[:2].float() / 255, fold_pool=True)
    assert type(cleaned) is _Branching and cleaned is not model and _error(cleaned, model) == 0
    assert "the model is quantized without clean-up: " in capsys.readouterr().err


def test_a_folded_vgg_is_small_in_int8(tmp_path: Path) -> None:
    """A byte for each parameter, and the biases and scales."""
    vgg = _vgg()
    int8 = quantize_model(vgg, IMAGES[:4], QuantizeConfig(fold_pool=True, observer="minmax"), False)
    assert int8.result.float_layers == () and len(int8.result.int8_layers) == 7
    torch.jit.save(int8.stored, tmp_path / "int8.pt")
    parameters = _parameters(vgg) - 48 * 512 * 64
    assert parameters < (tmp_path / "int8.pt").stat().st_size < 1.25 * parameters


def test_a_network_without_such_a_pool_has_no_folded_layers() -> None:
    smallnet = _build("smallnet")
    assert folded_layers(smallnet, clean(smallnet, IMAGES[:2].float() / 255, True)) == []
