"""The accuracy budget: its schedule on imagined drops, and a damaged layer that ends up in fp32 for real."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_tiny
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.measurement.accuracy import Comparison, compare, predict_logits
from qexp.quantization import QuantizedModel, budget, quantize_model
from qexp.quantization.budget import BudgetResult, BudgetTry, quantize_within_budget
from qexp.quantization.cleanup import clean
from qexp.quantization.sensitivity import measure_sensitivity, most_sensitive_first

ENGINES = ("fx", "pt2e", "onnx")
BEFORE, DAMAGED = "network.7", "network.10"
WIDTH = 0.25  # from a drop to the ends of its interval, points
ORDER = tuple(f"layer{number}" for number in range(20))

# --- the schedule, with an engine that only remembers what it was told to keep


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[tuple[str, ...], BudgetResult]]:
    """`run(upper end of the drop with a number of kept layers, options)`: what the model keeps, and the result."""
    monkeypatch.setattr(budget, "quantize_model", lambda model, images, options, reduce_range: options.keep_fp32)

    def search(
        high_of_count: Callable[[int], float], images: int = 10_000, **options: Any
    ) -> tuple[tuple[str, ...], BudgetResult]:
        chosen = QuantizeConfig(**({"max_top1_drop": 1.0} | options))

        def compared(kept: Any) -> Comparison:
            high = high_of_count(len(kept))
            return Comparison(high - WIDTH, high - 2 * WIDTH, high, 0.0, 99.0, 0, 0, images)

        kept: Any
        kept, result = quantize_within_budget(nn.Identity(), Tensor(), chosen, False, ORDER, compared)
        return tuple(kept), result

    return search


def _high(found: BudgetTry) -> float:
    assert found.validation_top1_drop_high_points is not None
    return found.validation_top1_drop_high_points


def _counts(result: BudgetResult) -> list[int]:
    return [len(found.kept_layers) for found in result.tries]


def test_no_layer_is_kept_where_the_first_try_is_within_the_budget(run: Any) -> None:
    kept, result = run(lambda count: 1.0)
    assert kept == () and result.met and _counts(result) == [0] and result.max_top1_drop_points == 1.0


@pytest.mark.parametrize("needed", range(1, 21))
def test_the_fewest_layers_are_found(run: Any, needed: int) -> None:
    kept, result = run(lambda count: 0.5 if count >= needed else 5.0 - count / 10)
    assert kept == ORDER[:needed] and result.met and len(result.tries) <= 10
    assert len(set(_counts(result))) == len(result.tries)  # none is tried twice
    assert {_high(found) <= 1 for found in result.tries} == {False, True}


def test_the_upper_end_of_the_interval_decides(run: Any) -> None:
    """A drop of 0.875 points, up to 1.125, is not shown to be within 1 point."""
    kept, result = run(lambda count: 1.125 if count < 3 else 1.0)
    assert kept == ORDER[:3] and result.met
    assert result.tries[0].validation_top1_drop_points == 0.875
    assert result.tries[-1].validation_top1_drop_high_points == 1.0


@pytest.mark.parametrize(("high", "met"), [(1.5, False), (1.0, True)])
def test_too_few_images_are_said_and_not_searched(
    run: Any, high: float, met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 144 images the upper end is above 1 even where none changes; yet a better int8 model is within it."""
    kept, result = run(lambda count: high, images=144)
    assert result.too_few_images and 1.3 < result.least_high_points < 1.4
    assert kept == () and result.met is met and _counts(result) == [0]
    assert ("144 validation images cannot show a drop of at most 1 points" in capsys.readouterr().err) is not met


@pytest.mark.parametrize("most", range(1, 11))
def test_tries_are_limited_and_the_best_so_far_is_returned(run: Any, most: int) -> None:
    kept, result = run(lambda count: 0.5 if count >= 11 else 5.0 - count / 10, max_tries=most)
    assert len(result.tries) <= most
    drops = {len(found.kept_layers): _high(found) for found in result.tries}
    assert result.met == (0.5 in drops.values())
    best = min((drop, count) for count, drop in drops.items())
    assert len(kept) == best[1]


def test_a_budget_that_cannot_be_met_ends_with_the_smallest_drop_and_fewest_layers(run: Any) -> None:
    kept, result = run(lambda count: 2.0 if count in (2, 8) else 3.0)
    assert not result.met and _counts(result) == [0, 1, 2, 4, 8, 16, 20] and kept == ORDER[:2]


def test_layers_that_were_asked_for_come_first_and_do_not_count(run: Any) -> None:
    asked = [ORDER[1], "other"]
    kept, result = run(lambda count: 0.5 if count > 3 else 2.0, keep_fp32=asked)
    assert kept == (ORDER[1], "other", ORDER[0], ORDER[2])
    assert result.tries[0].kept_layers == tuple(asked)


def test_without_a_budget_there_is_nothing_to_search(run: Any) -> None:
    with pytest.raises(InputError, match="--quantize-max-top1-drop"):
        run(lambda count: 0.0, max_top1_drop=None)


def test_every_try_is_said_in_a_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda count: 0.5 if count >= 8 else 5.0, max_tries=6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(f"try {n} of 6" in line for n, line in enumerate(lines, 1))
    assert "drop 4.75 points, upper end 5.00 (at most 1) with 0 layers" in lines[0] and lines[0].endswith("in fp32")
    assert lines[2].endswith("2 layers kept in fp32: layer0, layer1")
    assert "upper end 0.50" in lines[4] and lines[4].endswith("layer2, layer3, ...")


# --- real engines


@pytest.fixture(scope="module")
def model(tiny: Dataset) -> nn.Module:
    """SmallNet that names different classes, cleaned up."""
    model = build_tiny(tiny).eval()
    model.network[-1].bias.data -= predict_logits(model, tiny.train.images).mean(0)
    return clean(model, tiny.train.images[:2].float() / 255, fold_pool=False)


@pytest.fixture(scope="module")
def damaged(model: nn.Module) -> nn.Module:
    """One layer has huge weights for an input that is always zero: fp32 is well, int8 rounds the others to zero."""
    copied = copy.deepcopy(model)
    before, layer = copied.get_submodule(BEFORE), copied.get_submodule(DAMAGED)
    with torch.no_grad():
        before.weight[0], before.bias[0] = 0, 0
        layer.weight[:, 0] = 1000
    return copied


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_keep_layers_in_fp32(model: nn.Module, tiny: Dataset, engine: str) -> None:
    kept = (BEFORE, "network.22")
    plain, mixed = (
        quantize_model(model, tiny.train.images[:16], QuantizeConfig(engine=[engine], keep_fp32=names), False)
        for names in (None, list(kept))
    )
    assert plain.result.float_layers == () == plain.result.kept_layers
    assert mixed.result.float_layers == kept and mixed.result.kept_layers == tuple(sorted(kept))
    assert set(mixed.result.int8_layers) == set(plain.result.int8_layers) - set(kept)
    fp32, before, after = (
        predict_logits(found, tiny.validation.images) for found in (model, plain.module, mixed.module)
    )
    assert not torch.equal(before, after)
    assert (after - fp32).abs().mean() < 0.12 * fp32.std()  # its activations are small, which is no reason to be coarse


def _search(
    model: nn.Module, tiny: Dataset, options: QuantizeConfig
) -> tuple[QuantizedModel, BudgetResult, Comparison]:
    """The most sensitive layers of `model` back to fp32, its own answers being the right ones; and the comparison."""
    calibration, images = tiny.train.images[:32], tiny.validation.images
    fp32 = predict_logits(model, images)
    labels = fp32.argmax(1)

    def compared(quantized: QuantizedModel) -> Comparison:
        return compare(fp32, predict_logits(quantized.module, images), labels)

    order = most_sensitive_first(measure_sensitivity(model, calibration, images, labels, options, False))
    int8, result = quantize_within_budget(model, calibration, options, False, order, compared)
    return int8, result, compared(int8)


@pytest.mark.parametrize("engine", ["fx", "onnx"])
def test_a_damaged_layer_goes_back_to_fp32(damaged: nn.Module, tiny: Dataset, engine: str) -> None:
    options = QuantizeConfig(engine=[engine], max_top1_drop=25, keep_fp32=["network.0"])
    int8, result, found = _search(damaged, tiny, options)
    assert result.met and len(result.tries) == 2 and result.tries[0].validation_top1_drop_points > 50
    assert int8.result.kept_layers == ("network.0", DAMAGED) == int8.result.float_layers
    assert found.top1_drop_high_points == result.tries[1].validation_top1_drop_high_points <= 25
    assert found.top1_drop_points == result.tries[1].validation_top1_drop_points and result.images == found.images


def test_a_budget_that_is_not_met_ends_with_the_lowest_upper_end(damaged: nn.Module, tiny: Dataset) -> None:
    """3.5 points are shown where none of the 60 images changes, and hardly otherwise."""
    int8, result, found = _search(damaged, tiny, QuantizeConfig(max_top1_drop=3.5, max_tries=4))
    assert not result.too_few_images and DAMAGED in int8.result.kept_layers and 2 <= len(result.tries) <= 4
    high = found.top1_drop_high_points
    assert result.met == (high <= 3.5) and high == min(_high(tried) for tried in result.tries)
