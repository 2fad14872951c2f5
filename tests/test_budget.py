"""The accuracy budget: its schedule on imagined drops, and a damaged layer that ends up in fp32 for real."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_tiny
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.data import Dataset
from qexp.errors import InputError
from qexp.evaluation import compare, predict_logits
from qexp.quantization import QuantizedModel, budget, quantize_model
from qexp.quantization.budget import BudgetResult, quantize_within_budget
from qexp.quantization.cleanup import clean
from qexp.quantization.sensitivity import measure_sensitivity, most_sensitive_first

ENGINES = ("fx", "pt2e", "onnx")
BEFORE, DAMAGED = "network.7", "network.10"
ORDER = tuple(f"layer{number}" for number in range(20))

# --- the schedule, with an engine that only remembers what it was told to keep


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[tuple[str, ...], BudgetResult]]:
    """`run(drop of a number of kept layers, options)`: what the returned model keeps, and the result."""
    monkeypatch.setattr(budget, "quantize_model", lambda model, images, options, reduce_range: options.keep_fp32)

    def search(drop_of_count: Callable[[int], float], **options: Any) -> tuple[tuple[str, ...], BudgetResult]:
        chosen = QuantizeConfig(**({"max_top1_drop": 1.0} | options))
        drop_of: Any = lambda kept: drop_of_count(len(kept))  # noqa: E731
        kept: Any
        kept, result = quantize_within_budget(nn.Identity(), Tensor(), chosen, False, ORDER, drop_of)
        return tuple(kept), result

    return search


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
    assert {found.validation_top1_drop_points <= 1 for found in result.tries} == {False, True}


@pytest.mark.parametrize("most", range(1, 11))
def test_tries_are_limited_and_the_best_so_far_is_returned(run: Any, most: int) -> None:
    kept, result = run(lambda count: 0.5 if count >= 11 else 5.0 - count / 10, max_tries=most)
    assert len(result.tries) <= most
    drops = {len(found.kept_layers): found.validation_top1_drop_points for found in result.tries}
    assert result.met == (0.5 in drops.values())
    best = min((drop, count) for count, drop in drops.items())
    assert len(kept) == best[1]


def test_a_budget_that_cannot_be_met_ends_with_the_smallest_drop_and_fewest_layers(run: Any) -> None:
    kept, result = run(lambda count: 2.0 if count in (2, 8) else 3.0)
    assert not result.met and _counts(result) == [0, 1, 2, 4, 8, 16, 20] and kept == ORDER[:2]


def test_layers_that_were_asked_for_come_first_and_do_not_count(run: Any) -> None:
    asked = [ORDER[1], "other"]
    kept, result = run(lambda count: 0.0 if count > 3 else 2.0, keep_fp32=asked)
    assert kept == (ORDER[1], "other", ORDER[0], ORDER[2])
    assert result.tries[0].kept_layers == tuple(asked)


def test_without_a_budget_there_is_nothing_to_search(run: Any) -> None:
    with pytest.raises(InputError, match="--quantize-max-top1-drop"):
        run(lambda count: 0.0, max_top1_drop=None)


def test_every_try_is_said_in_a_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda count: 0.5 if count >= 8 else 5.0, max_tries=6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(f"try {n} of 6" in line for n, line in enumerate(lines, 1))
    assert "drop 5.00 points (at most 1) with 0 layers" in lines[0] and lines[0].endswith("in fp32")
    assert lines[2].endswith("2 layers kept in fp32: layer0, layer1")
    assert "drop 0.50 points" in lines[4] and lines[4].endswith("layer2, layer3, ...")


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
    assert mixed.result.float_layers == kept == mixed.result.kept_layers
    assert set(mixed.result.int8_layers) == set(plain.result.int8_layers) - set(kept)
    fp32, before, after = (
        predict_logits(found, tiny.validation.images) for found in (model, plain.module, mixed.module)
    )
    assert not torch.equal(before, after)
    assert (after - fp32).abs().mean() < 0.12 * fp32.std()  # its activations are small, which is no reason to be coarse


def _search(model: nn.Module, tiny: Dataset, options: QuantizeConfig) -> tuple[QuantizedModel, BudgetResult, float]:
    """The most sensitive layers of `model` back to fp32, its own answers being the right ones; and the final drop."""
    calibration, images = tiny.train.images[:32], tiny.validation.images
    fp32 = predict_logits(model, images)
    labels = fp32.argmax(1)

    def drop_of(quantized: QuantizedModel) -> float:
        return compare(fp32, predict_logits(quantized.module, images), labels).top1_drop_points

    order = most_sensitive_first(measure_sensitivity(model, calibration, images, labels, options, False))
    int8, result = quantize_within_budget(model, calibration, options, False, order, drop_of)
    return int8, result, drop_of(int8)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_layer_goes_back_to_fp32(damaged: nn.Module, tiny: Dataset, engine: str) -> None:
    options = QuantizeConfig(engine=[engine], max_top1_drop=25, keep_fp32=["network.0"])
    int8, result, drop = _search(damaged, tiny, options)
    assert result.met and len(result.tries) == 2 and result.tries[0].validation_top1_drop_points > 50
    assert int8.result.kept_layers == ("network.0", DAMAGED) == int8.result.float_layers
    assert drop == result.tries[1].validation_top1_drop_points <= 25


def test_no_drop_at_all_is_a_budget_too(damaged: nn.Module, tiny: Dataset) -> None:
    int8, result, drop = _search(damaged, tiny, QuantizeConfig(max_top1_drop=0, max_tries=4))
    assert DAMAGED in int8.result.kept_layers and 2 <= len(result.tries) <= 4
    assert result.met == (drop <= 0) and drop == min(found.validation_top1_drop_points for found in result.tries)
