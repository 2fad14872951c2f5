"""The ranges that observers choose, whatever the number and the order of the calibration images."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.ao.quantization import observer as torch_kinds
from torchao.quantization.pt2e import observer as torchao_kinds

from qexp.config import QuantizeConfig, SearchConfig
from qexp.data.datasets import Split, calibration_subset
from qexp.quantization.observers import calibration_batches, observer_class

OBSERVERS = ("histogram", "minmax", "batch_average", "percentile")
KINDS = pytest.mark.parametrize("kinds", [torch_kinds, torchao_kinds], ids=["torch", "torchao"])
CLASSES, OF_EACH = 10, 110


@pytest.fixture(scope="module")
def brighter_by_class() -> Split:
    """Images in the order of their classes, each class brighter than the one before, the last up to 0.88."""
    labels = torch.arange(CLASSES).repeat_interleave(OF_EACH)
    shades = torch.rand(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shades[:, 0, 0, 0] = 1  # the brightest pixel is that of its class
    bright = (labels.view(-1, 1, 1, 1) + shades) / CLASSES * 0.88
    return Split((bright * 255).round().to(torch.uint8), labels)


def _range(kinds: ModuleType, name: str, images: Tensor, batch_size: int = 64) -> tuple[float, float]:
    watch = observer_class(kinds, QuantizeConfig(observer=name))(dtype=torch.quint8)
    for batch in calibration_batches(images, batch_size):
        watch(batch.float() / 255)
    scale, zero = watch.calculate_qparams()
    return float(-zero * scale), float((255 - zero) * scale)


@KINDS
@pytest.mark.parametrize("name", OBSERVERS)
def test_no_range_shrinks_when_images_are_added(brighter_by_class: Split, kinds: ModuleType, name: str) -> None:
    highs = [
        _range(kinds, name, calibration_subset(brighter_by_class, count, seed)[0].images)[1]
        for seed in (0, 1)
        for count in (32, 64, 65, 128, 500, 1000)
    ]
    assert max(highs) == pytest.approx(0.88, rel=0.02)
    assert min(highs) > 0.98 * max(highs)


@KINDS
@pytest.mark.parametrize("name", OBSERVERS)
def test_no_range_depends_on_the_order_of_classes(brighter_by_class: Split, kinds: ModuleType, name: str) -> None:
    images = brighter_by_class.images
    by_class = images.view(CLASSES, OF_EACH, *images.shape[1:])
    orders = [by_class, by_class.flip(0), by_class[torch.randperm(CLASSES)]]
    # Batches of one class each: the same batches in another order.
    ranges = [_range(kinds, name, order.reshape(images.shape), OF_EACH) for order in orders]
    for found in ranges[1:]:
        assert found == pytest.approx(ranges[0], rel=5e-3, abs=1e-3)


@KINDS
def test_batch_average_is_the_mean_of_the_extremes_of_the_batches(kinds: ModuleType) -> None:
    watch = observer_class(kinds, QuantizeConfig(observer="batch_average"))(dtype=torch.quint8)
    for batch in (torch.tensor([-1.0, 4.0]), torch.tensor([]), torch.tensor([-2.0, 0.0, 2.0]), torch.tensor([-3.0])):
        watch(batch)
    assert watch.min_val.item() == -2.0 and watch.max_val.item() == 1.0


@pytest.mark.parametrize(("images", "most"), [(1, 64), (64, 64), (65, 64), (100, 64), (7, 3), (5, 1)])
def test_batches_are_of_one_size(images: int, most: int) -> None:
    batches = calibration_batches(torch.arange(images), most)
    sizes = [len(batch) for batch in batches]
    assert torch.cat(batches).tolist() == list(range(images))
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(batches) == -(-images // most)


def test_the_name_of_an_earlier_version_is_understood() -> None:
    assert QuantizeConfig(observer="moving_average").observer == "batch_average"
    assert SearchConfig(observers=["moving_average", "minmax"]).observers == ["minmax", "batch_average"]
