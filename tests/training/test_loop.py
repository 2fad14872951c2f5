"""One pass over the images: which images, in which batches, with which random states."""

from dataclasses import replace

import pytest
import torch
from conftest import EXECUTION, build_tiny
from torch import Tensor, nn

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset
from qexp.errors import StageError
from qexp.models.classifier import Classifier
from qexp.training import loop as passes
from qexp.training.augmentation import augment
from qexp.training.checkpoint import Position
from qexp.training.distributed import Group
from qexp.training.interrupts import StopRequest
from qexp.training.loop import Loop
from qexp.training.recipe import settle_options


def _loop(dataset: Dataset, model: Classifier | None = None, **options: object) -> Loop:
    model = model or build_tiny(dataset)
    settled = settle_options(TrainConfig(**{"batch_size": 64, **EXECUTION, **options}), dataset.name, model)
    return passes.prepare(model, model, dataset, settled, 0, Group(), StopRequest())


def _pass(dataset: Dataset, model: Classifier | None = None, **options: object) -> Loop:
    loop = _loop(dataset, model, **options)
    passes.train_pass(loop, dataset.train, lambda: None)
    return loop


def test_dropout_follows_the_seed_too(tiny: Dataset) -> None:
    sums = []
    for _ in range(2):
        model = build_tiny(tiny)
        model.network.add_module("drop", nn.Dropout(0.5))
        torch.rand(len(sums) + 1)
        sums.append(_pass(tiny, model).position.sums)
    assert sums[0] == sums[1]


def test_only_a_last_batch_of_one_is_left_out(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm cannot take the statistics of one value."""
    sizes: list[int] = []
    step = passes._step
    monkeypatch.setattr(passes, "_step", lambda *given: (sizes.append(len(given[2])), step(*given)))
    for count in (129, 130):
        part = tiny.train.subset(torch.arange(count))
        _pass(replace(tiny, train=part))
    assert sizes == [64, 64, 64, 64, 2]


def test_every_image_is_seen_once_an_epoch(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
        seen.append(images)
        return augment(images, padding, flip, generator)

    monkeypatch.setattr(passes, "augment", note)
    loop = _pass(tiny)
    assert sorted(image.numpy().tobytes() for image in torch.cat(seen)) == sorted(
        image.numpy().tobytes() for image in tiny.train.images
    )
    assert not torch.equal(torch.cat(seen), tiny.train.images)  # in another order
    assert loop.position.sums[3] == len(tiny.train) and loop.position.step == 3


def test_random_states_are_put_back(tiny: Dataset) -> None:
    loop = _pass(tiny)
    states = passes.random_states(loop)
    drawn = torch.rand(3), torch.rand(3, generator=loop.generator)
    passes.set_random_states(loop, states)
    assert torch.equal(torch.rand(3), drawn[0]) and torch.equal(torch.rand(3, generator=loop.generator), drawn[1])


@pytest.mark.parametrize(("loss", "said"), [(float("nan"), "nan;"), (float("inf"), "inf;"), (231.0, "231, more than")])
def test_loss_that_is_no_good(loss: float, said: str) -> None:
    with pytest.raises(StageError, match=rf"epoch 7: the loss is {said}.* lower --learning-rate"):
        passes.check_loss(loss, 7, limit=230.0)
    passes.check_loss(229.0, 7, limit=230.0)
    passes.check_loss(1e9, 7)


def test_means_are_in_percent() -> None:
    assert passes.means([8.0, 1.0, 3.0, 4.0]) == (2.0, 25.0, 75.0)
    assert passes.means([0.0] * 4) == (0.0, 0.0, 0.0)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_large_gradient_moves_the_weights_no_further_than_a_clipped_one(tiny: Dataset) -> None:
    """However steep the loss: plain SGD moves them by at most learning rate times norm."""
    moved = []
    for steepness in (1e-3, 1e6):
        loop = _loop(tiny, momentum=0.0, weight_decay=0.0, learning_rate=0.25, clip_norm=2.0)
        before = _weights(loop.model)
        rate = loop.schedule.get_last_lr()[0]
        for parameter in loop.model.parameters():
            parameter.grad = torch.full_like(parameter, steepness)
        passes._update(loop)
        moved.append(float((_weights(loop.model) - before).norm()) / rate)
    norm = 1e-3 * len(before) ** 0.5
    assert moved[0] == pytest.approx(norm, rel=1e-2) and norm < 2  # left as it is
    assert moved[1] == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_no_weight(tiny: Dataset, optimizer: str, value: float) -> None:
    loop = _loop(tiny, optimizer=optimizer)
    before = _weights(loop.model)
    for bad in (True, False):
        for parameter in loop.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if bad:
            next(loop.model.parameters()).grad.view(-1)[0] = value  # type: ignore[union-attr]
        passes._update(loop)
        assert torch.equal(_weights(loop.model), before) is bad
    assert torch.isfinite(_weights(loop.model)).all()
    loop.count_skipped()
    loop.count_skipped()
    assert loop.position.skipped_steps == 1


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_batch_norm_is_estimated_from_the_images_as_they_pass_now(tiny: Dataset) -> None:
    loop = _loop(tiny, crop_padding=0)
    first = _batch_norms(loop.model)[0]
    with torch.no_grad():
        first.running_mean.fill_(1e6)  # type: ignore[union-attr]  # of weights that have long changed
    weights, momentum = _weights(loop.model), first.momentum
    passes.estimate_batch_norm(loop, tiny.train)
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loop.model.eval()
    with torch.no_grad():
        loop.model(tiny.train.images.float() / 255)
    hook.remove()
    assert torch.allclose(first.running_mean, seen[0].mean((0, 2, 3)), atol=2e-2)  # type: ignore[arg-type]
    assert torch.allclose(first.running_var, seen[0].var((0, 2, 3)), rtol=0.1)  # type: ignore[arg-type]
    assert first.momentum == momentum and torch.equal(_weights(loop.model), weights)


def test_batch_norm_keeps_averages_that_an_epoch_has_many_of(tiny: Dataset) -> None:
    """160 steps an epoch, and a tenth of each: it forgets what is older than a few of them."""
    loop = _loop(tiny, batch_size=2)
    many = replace(tiny.train, images=tiny.train.images.repeat(2, 1, 1, 1), labels=tiny.train.labels.repeat(2))
    before = [norm.running_mean.clone() for norm in _batch_norms(loop.model)]  # type: ignore[union-attr]
    passes.estimate_batch_norm(loop, many)
    assert all(map(torch.equal, before, [norm.running_mean for norm in _batch_norms(loop.model)]))
    for norm in _batch_norms(loop.model):
        norm.momentum = 0.01  # as mobilenet_v3 has it
    passes.estimate_batch_norm(loop, many)
    assert not any(map(torch.equal, before, [norm.running_mean for norm in _batch_norms(loop.model)]))


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_layout_is_as_asked(tiny: Dataset, channels_last: bool) -> None:
    seen: list[Tensor] = []
    model = build_tiny(tiny)
    model.normalize.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _pass(tiny, model, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.is_contiguous(memory_format=layout) for images in seen)


@pytest.mark.parametrize("batch_size", [2, 3, 11, 31, 53])
def test_batch_norm_is_never_estimated_from_one_image(tiny: Dataset, batch_size: int) -> None:
    """On maps of 1x1, one image has no variance: torch refuses it."""

    class Map(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert len(images) >= 2
            return images

    model = build_tiny(tiny)
    model.network.insert(0, Map())
    loop = _loop(tiny, model, batch_size=batch_size)
    for norm in _batch_norms(model):
        norm.momentum = 1e-6  # so that its averages lag at any number of steps
    passes.estimate_batch_norm(loop, tiny.train)
    assert all(norm.running_var.isfinite().all() for norm in _batch_norms(model))


def test_skipped_steps_are_said_and_an_epoch_of_nothing_else_fails(capsys: pytest.CaptureFixture[str]) -> None:
    passes.check_skipped(Position(step=4))
    assert capsys.readouterr().err == ""
    passes.check_skipped(Position(step=4, skipped_in_epoch=1))
    assert "warning: 1 of 4 steps had no finite gradient and were skipped" in capsys.readouterr().err
    with pytest.raises(StageError, match="training stopped in epoch 1: no step had a finite gradient"):
        passes.check_skipped(Position(step=4, skipped_in_epoch=4))
