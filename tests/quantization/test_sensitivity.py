"""Layer sensitivity: properties of the simulation, odd networks, and that the model comes out as it went in."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from conftest import build_tiny, equal_weights
from torch import Tensor, nn
from torch.nn.functional import kl_div

from qexp import progress
from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import measure_accuracy, predict_logits
from qexp.models.classifier import Classifier
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import clean
from qexp.quantization.sensitivity import (
    LayerSensitivity,
    SensitivityResult,
    _simulated,
    beyond_chance,
    measure_sensitivity,
    most_sensitive_first,
)
from qexp.training.train import TrainResult

LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))
BEFORE, MIDDLE = LAYERS[2:4]


@pytest.fixture(scope="module")
def source(tiny: Dataset) -> nn.Module:
    """With random weights, and a bias with which it names different classes; what it says counts as right."""
    model = build_tiny(tiny).eval()
    model.network[-1].bias.data -= predict_logits(model, tiny.train.images).mean(0)
    return clean(model, tiny.train.images[:2].float() / 255, fold_pool=False)


def _measure(model: nn.Module, tiny: Dataset, reduce_range: bool = False, **options: object) -> SensitivityResult:
    images = tiny.validation.images
    labels = predict_logits(model, images).argmax(1)
    chosen = QuantizeConfig(**options)
    return measure_sensitivity(model, tiny.train.images[:32], images, labels, chosen, reduce_range)


@pytest.fixture(scope="module")
def result(source: nn.Module, tiny: Dataset) -> SensitivityResult:
    return _measure(source, tiny)


def _sqnr(result: SensitivityResult) -> list[float]:
    return [layer.sqnr_db for layer in result.layers if layer.sqnr_db is not None]


def test_every_layer_is_measured(result: SensitivityResult) -> None:
    assert tuple(layer.layer for layer in result.layers) == LAYERS
    assert (result.images, result.observer, result.per_channel) == (60, "histogram", True)
    assert all(10 < value < 80 for value in _sqnr(result)) and len(_sqnr(result)) == len(LAYERS)
    assert sorted(most_sensitive_first(result)) == sorted(LAYERS) and result.engines == ("fx",)
    assert {layer.weight_bits for layer in result.layers} == {8}
    for layer in result.layers:  # small next to that of all, and not 0: top-1 would not tell most of them apart
        assert layer.kl_only_int8_nats and 0 < layer.kl_only_int8_nats < 1
        assert layer.top1_only_int8_percent == pytest.approx(
            result.fp32_top1_percent + (layer.only_int8_gained_images - layer.only_int8_lost_images) / 0.6
        )
        assert layer.top1_only_fp32_percent == pytest.approx(
            result.int8_top1_percent + (layer.only_fp32_gained_images - layer.only_fp32_lost_images) / 0.6
        )
    json.dumps(asdict(result), allow_nan=False)


def test_model_is_the_same_afterwards(source: nn.Module, tiny: Dataset) -> None:
    before, parameters = copy.deepcopy(source), [id(parameter) for parameter in source.parameters()]
    first = _measure(source, tiny)
    assert equal_weights(source, before) and parameters == [id(parameter) for parameter in source.parameters()]
    assert all("forward" not in vars(module) for module in source.modules())
    assert torch.equal(predict_logits(source, tiny.validation.images), predict_logits(before, tiny.validation.images))
    assert _measure(source, tiny) == first


def test_model_is_the_same_after_an_error(source: nn.Module, tiny: Dataset) -> None:
    before = copy.deepcopy(source)
    images, too_few = tiny.validation.images, tiny.validation.labels[:7]
    with pytest.raises(RuntimeError):
        measure_sensitivity(source, tiny.train.images[:4], images, too_few, QuantizeConfig(), False)
    assert equal_weights(source, before) and all("forward" not in vars(module) for module in source.modules())


def test_with_all_layers_off_the_simulation_is_the_fp32_model(source: nn.Module, tiny: Dataset) -> None:
    images = tiny.validation.images
    expected = predict_logits(source, images)
    with _simulated(source, tiny.train.images[:32], QuantizeConfig(), False) as layers:
        for layer in layers.values():
            layer.module.forward = layer.fp32
        assert torch.equal(predict_logits(source, images), expected)
        layers[MIDDLE].module.forward = layers[MIDDLE].int8
        assert not torch.equal(predict_logits(source, images), expected)


def test_simulation_of_all_layers_answers_like_the_engine(
    trained: tuple[Classifier, TrainResult], digits: Dataset
) -> None:
    calibration, options = digits.train.images[:32], QuantizeConfig(observer="minmax")
    images, labels = digits.test.images[:200], digits.test.labels[:200]
    int8 = quantize_model(trained[0], calibration, options, False)
    result = measure_sensitivity(int8.source, calibration, images, labels, options, False)
    fp32_logits, int8_logits = (predict_logits(model, images) for model in (trained[0], int8.module))
    assert result.fp32_top1_percent == measure_accuracy(fp32_logits, labels).top1_percent
    assert abs(result.int8_top1_percent - measure_accuracy(int8_logits, labels).top1_percent) < 2
    divergence = kl_div(int8_logits.log_softmax(1), fp32_logits.log_softmax(1), reduction="batchmean", log_target=True)
    assert result.int8_kl_nats and 0.5 < result.int8_kl_nats / float(divergence) < 2


@pytest.mark.parametrize(
    ("engines", "reduce_range", "bits"),
    [
        (["fx"], False, {"conv": 8, "wide": 8, "deep": 7, "last": 8}),
        (["pt2e", "onnx"], False, {"conv": 8, "wide": 8, "deep": 8, "last": 8}),
        (["onnx", "fx"], False, {"conv": 8, "wide": 8, "deep": 7, "last": 8}),
        (["onnx"], True, {"conv": 7, "wide": 7, "deep": 7, "last": 7}),
    ],
)
def test_the_bits_of_the_engine_are_simulated(
    engines: list[str], reduce_range: bool, bits: dict[str, int], tiny: Dataset
) -> None:
    """Engine fx reduces the weights of wide depthwise convolutions; every engine all weights without dot product."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.conv, net.wide = nn.Conv2d(3, 64, 4, 4), nn.Conv2d(64, 128, 1)
    net.deep, net.pool, net.flat = nn.Conv2d(128, 128, 3, padding=1, groups=128), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net.last = nn.Linear(128, 10)
    result = _measure(net.eval(), tiny, reduce_range, engine=engines, observer="minmax")
    assert {layer.layer: layer.weight_bits for layer in result.layers} == bits
    assert result.engines == tuple(engines)
    if engines == ["fx"]:
        (deep, *_), eight = (_sqnr(result)[2:], _sqnr(_measure(net, tiny, engine=["onnx"], observer="minmax")))
        assert deep < eight[2] - 1 and _sqnr(result)[:2] == eight[:2]


def test_a_layer_with_outliers_is_the_most_sensitive(source: nn.Module, tiny: Dataset) -> None:
    """Huge weights for an input that is always zero change nothing in fp32, but round all others to zero."""
    damaged = copy.deepcopy(source)
    before, layer = damaged.get_submodule(BEFORE), damaged.get_submodule(MIDDLE)
    with torch.no_grad():
        before.weight[0], before.bias[0] = 0, 0
        layer.weight[:, 0] = 1000
    result = _measure(damaged, tiny)
    worst = next(found for found in result.layers if found.layer == MIDDLE)
    assert result.fp32_top1_percent == 100 and most_sensitive_first(result)[0] == MIDDLE
    assert worst.sqnr_db == min(_sqnr(result)) and worst.sqnr_db < 5
    assert worst.top1_only_int8_percent == min(found.top1_only_int8_percent for found in result.layers)
    assert worst.top1_only_fp32_percent > result.int8_top1_percent + 20
    assert worst.kl_only_int8_nats == max(found.kl_only_int8_nats or 0 for found in result.layers)
    assert worst.kl_only_fp32_nats and result.int8_kl_nats and worst.kl_only_fp32_nats < result.int8_kl_nats / 2
    lost = [(found.only_int8_lost_images, found.only_int8_gained_images) for found in result.layers]
    told = [found.layer for found, beyond in zip(result.layers, beyond_chance(lost), strict=True) if beyond]
    assert told == [MIDDLE]


@pytest.mark.parametrize(("options", "reduce_range"), [({"per_channel": False}, False), ({}, True)])
def test_a_coarser_grid_is_noisier(
    source: nn.Module, tiny: Dataset, options: dict[str, object], reduce_range: bool
) -> None:
    uneven = copy.deepcopy(source)
    for module in uneven.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(
                torch.linspace(0.02, 1, len(module.weight)).view(-1, *[1] * (module.weight.ndim - 1))
            )
    fine, coarser = _measure(uneven, tiny), _measure(uneven, tiny, reduce_range, **options)
    assert sum(_sqnr(coarser)) < sum(_sqnr(fine)) - len(LAYERS)
    assert coarser.per_channel == options.get("per_channel", True)


def test_the_observer_of_the_options_chooses_the_ranges(source: nn.Module, tiny: Dataset) -> None:
    found = [_sqnr(_measure(source, tiny, observer=name)) for name in ("minmax", "percentile", "batch_average")]
    assert found[0] != found[1] != found[2]


class _Net(nn.Module):
    """`body` decides what is called, after a convolution and before the last layer."""

    def __init__(self, body: Callable[["_Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.one, self.two, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(self, self.conv(images).relu().mean((2, 3))))


@pytest.mark.parametrize(
    ("body", "called"),
    [
        (lambda net, values: net.one(net.one(values)), ("conv", "one", "last")),
        (lambda net, values: net.two(input=values), ("conv", "two", "last")),
        (lambda net, values: values, ("conv", "last")),
    ],
    ids=["twice", "by keyword", "never"],
)
def test_layers_called_twice_by_keyword_and_never(
    tiny: Dataset, body: Callable[[_Net, Tensor], Tensor], called: tuple[str, ...]
) -> None:
    result = _measure(_Net(body).eval(), tiny)
    assert tuple(layer.layer for layer in result.layers) == called


def test_shared_weights_stay_shared_and_count_for_each_layer(tiny: Dataset) -> None:
    net = _Net(lambda net, values: net.two(net.one(values))).eval()
    net.two.weight = net.one.weight
    result = _measure(net, tiny)
    assert net.two.weight is net.one.weight and [layer.layer for layer in result.layers][1:3] == ["one", "two"]


def test_a_dead_layer_has_no_ratio_and_ranks_last(tiny: Dataset) -> None:
    torch.manual_seed(0)
    net = _Net(lambda net, values: values + net.one(values)).eval()
    nn.init.zeros_(net.one.weight)
    nn.init.zeros_(net.one.bias)
    result = _measure(net, tiny)
    dead = next(layer for layer in result.layers if layer.layer == "one")
    assert dead.sqnr_db is None and dead.top1_only_int8_percent == result.fp32_top1_percent
    assert dead.kl_only_int8_nats == 0 and most_sensitive_first(result)[-1] == "one"
    json.dumps(asdict(result), allow_nan=False)


def test_logits_that_are_not_numbers_count_as_wrong(tiny: Dataset) -> None:
    net = _Net(lambda net, values: values).eval()
    nn.init.constant_(net.last.bias, math.nan)
    result = _measure(net, tiny)
    assert result.fp32_top1_percent == 0 and result.int8_top1_percent == 0
    assert result.layers[-1].sqnr_db is None
    json.dumps(asdict(result), allow_nan=False)


def test_order_is_by_the_divergence_then_by_the_noise() -> None:
    """One image more or less does not change it."""
    layers = (
        LayerSensitivity("quiet", None, 90.0, 80.0, kl_only_int8_nats=0.0),
        LayerSensitivity("clear", 50.0, 90.0, 80.0, kl_only_int8_nats=0.25),
        LayerSensitivity("noisy", 20.0, 91.0, 80.0, kl_only_int8_nats=0.25),
        LayerSensitivity("first", 60.0, 92.0, 79.0, kl_only_int8_nats=0.5),
        LayerSensitivity("of an earlier version", 70.0, 50.0, 95.0),
    )
    result = SensitivityResult(layers, 95.0, 80.0, 100, "minmax", True)
    assert most_sensitive_first(result) == ("first", "noisy", "clear", "of an earlier version", "quiet")


def test_the_order_does_not_depend_on_the_images(trained: tuple[Classifier, TrainResult], digits: Dataset) -> None:
    calibration, options = digits.train.images[:64], QuantizeConfig(observer="minmax")
    source = clean(trained[0], calibration[:2].float() / 255, fold_pool=False)
    images, labels = digits.test.images, digits.test.labels
    orders = [
        most_sensitive_first(measure_sensitivity(source, calibration, images[part], labels[part], options, False))
        for part in (slice(0, 200, 2), slice(1, 200, 2))
    ]
    places = [[order.index(layer) for layer in LAYERS] for order in orders]
    assert float(torch.corrcoef(torch.tensor(places, dtype=torch.double))[0, 1]) > 0.7  # Spearman's


def test_one_image_is_no_finding() -> None:
    assert beyond_chance([(1, 0), (3, 1), (0, 0)]) == [False] * 3
    assert beyond_chance([(12, 0)] + [(1, 0)] * 19) == [True] + [False] * 19
    assert beyond_chance([(0, 12)]) == [False]  # told from chance, the other way round
    # 6 of 6 has p = 2 / 64, below 0.05 alone, and not among two.
    assert beyond_chance([(6, 0)]) == [True] and beyond_chance([(6, 0), (5, 5)]) == [False, False]
    # Holm: the smallest times 3, the next times 2.
    assert beyond_chance([(7, 0), (8, 0), (0, 0)]) == [True, True, False]


def test_false_findings_are_rare() -> None:
    """Of 53 layers that all flip 6 images as a coin falls, one is called worse in at most 5 % of the reports."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.binomial(torch.full((400, 53), 6.0), torch.full((400, 53), 0.5), generator=generator).int().tolist()
    wrong = sum(any(beyond_chance([(lost, 6 - lost) for lost in report])) for report in heads)
    many = torch.binomial(torch.full((400, 53), 40.0), torch.full((400, 53), 0.5), generator=generator).int().tolist()
    wrong_of_many = sum(any(beyond_chance([(lost, 40 - lost) for lost in report])) for report in many)
    assert wrong <= 20 and 0 < wrong_of_many <= 20


def test_progress_goes_layer_by_layer(
    source: nn.Module, tiny: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    _measure(source, tiny, observer="minmax")
    count, lines = len(LAYERS), capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("sensitivity")] == [
        f"sensitivity: {done}/{count}" for done in range(1, count)
    ]
