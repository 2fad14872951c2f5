"""One pass over the images: which images, in which batches, with which random states."""

from dataclasses import replace

import pytest
import torch
from conftest import EXECUTION, build_tiny
from torch import Tensor, nn

from qexp import loop as passes
from qexp.augmentation import augment
from qexp.config import TrainConfig
from qexp.data import Dataset
from qexp.distributed import Group
from qexp.errors import StageError
from qexp.interrupts import StopRequest
from qexp.loop import Loop
from qexp.models import Classifier
from qexp.recipe import settle_options


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
