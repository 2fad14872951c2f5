"""The recipe: what `auto` stands for, the schedule, each layer's rate."""

import pytest
import torch
from conftest import build_tiny
from torch import nn

from qexp.config import TrainConfig
from qexp.data import Dataset
from qexp.errors import InputError
from qexp.models import Classifier, ModelSpec
from qexp.recipe import default_peak, make_optimizer, parameter_groups, settle_options, steps_of


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


def test_default_peak_depends_on_batch_norm(tiny: Dataset) -> None:
    assert default_peak(build_tiny(tiny)) == 0.2
    assert default_peak(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))) == 0.03


def test_layer_that_sees_49_copies_gets_a_49th_of_the_rate() -> None:
    with torch.device("meta"):
        model = Classifier(ModelSpec("vgg16", tuple("abcdefghij"), 32), torch.zeros(3), torch.ones(3))
        others, first = parameter_groups(model, 0.03)
    assert first["lr"] == pytest.approx(0.03 / 49) and others["lr"] == 0.03
    assert [tuple(parameter.shape) for parameter in first["params"]] == [(4096, 25088), (4096,)]
    assert len(first["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_momentum_zero_is_plain_descent(tiny: Dataset) -> None:
    for momentum, nesterov in ((0.0, False), (0.9, True)):
        options = TrainConfig(momentum=momentum, learning_rate=0.1)
        assert make_optimizer(build_tiny(tiny), options, steps=10)[0].defaults["nesterov"] is nesterov
