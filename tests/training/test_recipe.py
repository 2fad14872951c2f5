"""The recipe: what `auto` stands for, the schedule, each layer's rate."""

import pytest
import torch
from conftest import build_tiny, equal_weights

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.models.classifier import Classifier, ModelSpec, outline
from qexp.models.preprocessing import squashed
from qexp.training.recipe import ADAMW, Recipe, make_optimizer, parameter_groups, recipe_for, settle_options, steps_of


@pytest.mark.parametrize(
    ("name", "flip", "expected"),
    [("digits", None, False), ("pets", None, True), ("digits", True, True), ("p", False, False)],
)
def test_digits_are_not_mirrored_unless_asked(tiny: Dataset, name: str, flip: bool | None, expected: bool) -> None:
    assert settle_options(TrainConfig(flip=flip), name, build_tiny(tiny)).flip is expected


def test_settled_options_name_the_device(tiny: Dataset) -> None:
    model = build_tiny(tiny)
    assert settle_options(TrainConfig(), "p", model).device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert settle_options(TrainConfig(device="cpu"), "p", model).device == "cpu"
    gpus = torch.cuda.device_count()
    with pytest.raises(InputError, match="--device cuda: this machine has"):
        settle_options(TrainConfig(device="cuda", processes=gpus + 1), "p", model)


def test_learning_rate_rises_for_a_quarter_then_falls(tiny: Dataset) -> None:
    options = TrainConfig(learning_rate=0.05)
    optimizer, schedule = make_optimizer(build_tiny(tiny), options, steps=40)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert top == 9 and max(rates) == pytest.approx(0.05)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-5


def test_steps_of_a_training() -> None:
    assert steps_of(129, TrainConfig(epochs=3, batch_size=64)) == 9
    assert steps_of(128, TrainConfig(epochs=3, batch_size=64)) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smallnet", Recipe("sgd", 0.2, 5e-4)),
        ("vgg16_bn", Recipe("sgd", 0.2, 5e-4)),
        ("resnet18", Recipe("sgd", 0.05, 5e-4)),
        ("mobilenet_v3_small", Recipe("sgd", 0.05, 5e-4)),
        ("vgg16", Recipe("sgd", 0.03, 5e-4)),
        ("squeezenet1_1", ADAMW),
        ("convnext_tiny", ADAMW),
        ("vit_b_16", ADAMW),
        ("swin_t", ADAMW),
    ],
)
def test_recipe_by_kind_of_network(name: str, expected: Recipe) -> None:
    assert recipe_for(outline(ModelSpec(name, tuple("ab"), squashed(224)))) == expected


def test_given_options_win_over_the_recipe(tiny: Dataset) -> None:
    settled = settle_options(TrainConfig(optimizer="adamw"), "p", build_tiny(tiny))
    assert (settled.optimizer, settled.learning_rate, settled.weight_decay) == ("adamw", 1e-3, 0.05)
    settled = settle_options(TrainConfig(weight_decay=0, learning_rate=0.5), "p", build_tiny(tiny))
    assert (settled.optimizer, settled.learning_rate, settled.weight_decay) == ("sgd", 0.5, 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_first_step_leaves_nothing_behind(optimizer: str, tiny: Dataset) -> None:
    """As a fused optimiser skips it; torch's SGD leaves a momentum of whatever was in memory otherwise."""
    finals = []
    for skip in (True, False):
        model = build_tiny(tiny)
        options = settle_options(TrainConfig(optimizer=optimizer, weight_decay=0), "p", model)
        made, _ = make_optimizer(model, options, steps=10)
        for found_inf in [1.0, 0.0] if skip else [0.0]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if found_inf else 0.5)
            made.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
            made.step()
        finals.append(model)
    assert equal_weights(*finals)


def test_layer_that_sees_49_copies_gets_a_49th_of_the_rate() -> None:
    with torch.device("meta"):
        model = Classifier(ModelSpec("vgg16", tuple("abcdefghij"), squashed(32)), torch.zeros(3), torch.ones(3))
        others, first = parameter_groups(model, 0.03)
    assert first["lr"] == pytest.approx(0.03 / 49) and others["lr"] == 0.03
    assert [tuple(parameter.shape) for parameter in first["params"]] == [(4096, 25088), (4096,)]
    assert len(first["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_momentum_zero_is_plain_descent(tiny: Dataset) -> None:
    for momentum, nesterov in ((0.0, False), (0.9, True)):
        options = TrainConfig(momentum=momentum, learning_rate=0.1, optimizer="sgd")
        assert make_optimizer(build_tiny(tiny), options, steps=10)[0].defaults["nesterov"] is nesterov


def test_adamw_lets_only_the_weights_of_layers_decay(tiny: Dataset) -> None:
    model = build_tiny(tiny)
    options = settle_options(TrainConfig(optimizer="adamw"), "p", model)
    optimizer, _ = make_optimizer(model, options, 100)
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert set(decays) == {id(one) for one in model.parameters()}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.05 if parameter.dim() > 1 else 0.0), name
