"""Training: the same seed gives the same bits, schedule, early stopping, which weights are kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qexp import training
from qexp.augmentation import augment
from qexp.config import DataConfig, TrainConfig
from qexp.data import Dataset, load_dataset
from qexp.errors import StageError
from qexp.evaluation import measure_accuracy, predict_logits
from qexp.models import Classifier, ModelSpec, build_classifier, load_classifier
from qexp.training import EpochResult, TrainResult, default_peak, train_model


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    """Digits at 8 px: 160 to train with and 60 to validate."""
    dataset = load_dataset(DataConfig(image_size=8), seed=0)
    train, validation = dataset.train.subset(torch.arange(160)), dataset.validation.subset(torch.arange(60))
    return replace(dataset, train=train, validation=validation)


def _ignore(epoch: EpochResult) -> None:
    pass


def _build(dataset: Dataset) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ModelSpec("smallnet", dataset.classes, 8), dataset.train.images)


def _train(
    dataset: Dataset, folder: Path, seed: int = 0, on_epoch: Callable[[EpochResult], None] = _ignore, **options: object
) -> tuple[Classifier, TrainResult]:
    model = _build(dataset)
    config = TrainConfig(**{"epochs": 2, "batch_size": 64, **options})
    return model, train_model(model, dataset, config, seed, on_epoch, folder / "best.safetensors")


def _equal_weights(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_same_seed_gives_equal_weights_bit_for_bit(tiny: Dataset, tmp_path: Path) -> None:
    first, result = _train(tiny, tmp_path, seed=5)
    torch.rand(7)  # what the process drew before must not matter
    second, again = _train(tiny, tmp_path, seed=5)
    other, _ = _train(tiny, tmp_path, seed=6)
    assert _equal_weights(first, second)
    assert [epoch.train_loss for epoch in result.epochs] == [epoch.train_loss for epoch in again.epochs]
    assert not _equal_weights(first, other)


def test_dropout_follows_the_seed_too(tiny: Dataset, tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        model = _build(tiny)
        model.network.add_module("drop", nn.Dropout(0.5))
        torch.rand(len(losses) + 1)
        epoch = training._train_epoch(training._prepare(model, tiny, TrainConfig(batch_size=64)), tiny.train, 0, 1)
        losses.append(epoch[0])
    assert losses[0] == losses[1]


def test_training_learns(trained: tuple[Classifier, TrainResult], digits: Dataset) -> None:
    model, result = trained
    accuracy = measure_accuracy(predict_logits(model, digits.test.images), digits.test.labels)
    assert accuracy.top1_percent > 70  # chance is 10
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert not model.training
    assert result.duration_s > 0


@pytest.mark.parametrize(
    ("name", "flip", "expected"),
    [("digits", None, False), ("pets", None, True), ("digits", True, True), ("p", False, False)],
)
def test_digits_are_not_mirrored_unless_asked(tiny: Dataset, name: str, flip: bool | None, expected: bool) -> None:
    loop = training._prepare(_build(tiny), replace(tiny, name=name), TrainConfig(flip=flip))
    assert loop.flip is expected


def _script(monkeypatch: pytest.MonkeyPatch, *validation: tuple[float, float]) -> None:
    """Let validation find these (loss, top-1) pairs, epoch by epoch."""
    left = list(validation)
    monkeypatch.setattr(training, "_evaluate", lambda loop, split: (*left.pop(0), 99.0))


def test_best_weights_are_those_of_the_best_epoch(tiny: Dataset, tmp_path: Path) -> None:
    """Evaluated again, the kept weights give what was noted for that epoch; so the last ones were not kept instead."""
    snapshots: list[dict[str, Tensor]] = []
    model = _build(tiny)

    def keep(epoch: EpochResult) -> None:
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    options = TrainConfig(
        epochs=6, batch_size=64, bf16=False, learning_rate=1.0
    )  # too high: validation goes up and down
    result = train_model(model, tiny, options, 0, keep, tmp_path / "best")
    best = max(result.epochs, key=lambda epoch: (epoch.validation_top1_percent, -epoch.validation_loss))
    assert result.best_epoch == best.epoch
    kept = model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in snapshots[result.best_epoch - 1].items())
    assert _equal_weights(load_classifier(tmp_path / "best"), model)
    logits = predict_logits(model, tiny.validation.images)
    assert measure_accuracy(logits, tiny.validation.labels).top1_percent == pytest.approx(best.validation_top1_percent)
    loss = nn.functional.cross_entropy(logits, tiny.validation.labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(best.validation_loss, rel=1e-4)


def test_earlier_epoch_is_kept_when_later_ones_are_worse(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _script(monkeypatch, (1.0, 50.0), (0.9, 80.0), (0.1, 70.0), (0.1, 79.0))
    model, result = _train(tiny, tmp_path, epochs=4)
    assert result.best_epoch == 2 and len(result.epochs) == 4 and not result.stopped_early
    _script(monkeypatch, (1.0, 50.0), (0.9, 80.0), (0.1, 70.0), (0.1, 90.0))
    last, result = _train(tiny, tmp_path, epochs=4)
    assert result.best_epoch == 4
    assert not _equal_weights(model, last)


def test_equal_accuracy_is_decided_by_the_loss(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(monkeypatch, (1.0, 50.0), (0.8, 50.0), (0.9, 50.0), (0.8, 50.0))
    assert _train(tiny, tmp_path, epochs=4)[1].best_epoch == 2


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4)])
def test_training_stops_after_so_many_epochs_without_a_better_one(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, epochs: int
) -> None:
    _script(monkeypatch, (1.0, 50.0), (0.9, 60.0), (1.1, 55.0), (1.1, 54.0), (0.1, 99.0))
    _, result = _train(tiny, tmp_path, epochs=9, patience=patience)
    assert len(result.epochs) == epochs
    assert result.stopped_early and result.best_epoch == 2


def test_learning_rate_rises_for_a_quarter_then_falls(tiny: Dataset, tmp_path: Path) -> None:
    _, result = _train(tiny, tmp_path, epochs=12, patience=12, batch_size=160, learning_rate=0.05)
    rates = [epoch.learning_rate for epoch in result.epochs]
    top = rates.index(max(rates))
    assert top in (2, 3)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0.04 < max(rates) <= 0.05 and rates[-1] < 0.001
    assert result.peak_learning_rate == 0.05


@pytest.mark.parametrize(("images", "epochs"), [(40, 1), (40, 4), (70, 2), (200, 1)])
def test_runs_of_few_steps_work(tiny: Dataset, tmp_path: Path, images: int, epochs: int) -> None:
    """One step in all, and four: a quarter of them is one, so the warm-up has no length."""
    few = replace(tiny, train=tiny.train.subset(torch.arange(images) % 160))
    _, result = _train(few, tmp_path, epochs=epochs)
    assert len(result.epochs) == epochs


def test_default_peak_depends_on_batch_norm(tiny: Dataset, tmp_path: Path) -> None:
    assert default_peak(_build(tiny)) == 0.2
    assert default_peak(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))) == 0.03
    assert _train(tiny, tmp_path, epochs=1)[1].peak_learning_rate == 0.2


def test_layer_that_sees_49_copies_gets_a_49th_of_the_rate() -> None:
    with torch.device("meta"):
        model = Classifier(ModelSpec("vgg16", tuple("abcdefghij"), 32), torch.zeros(3), torch.ones(3))
        others, first = training._parameter_groups(model, 0.03)
    assert first["lr"] == pytest.approx(0.03 / 49) and others["lr"] == 0.03
    assert [tuple(parameter.shape) for parameter in first["params"]] == [(4096, 25088), (4096,)]
    assert len(first["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_loss_that_is_no_number_stops_training(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"epoch 1: the loss is (nan|inf); lower --learning-rate"):
        _train(tiny, tmp_path, learning_rate=1e30)


def test_loss_that_is_no_number_after_the_last_step_stops_training(tiny: Dataset, tmp_path: Path) -> None:
    """Only validation sees what the only step did to the weights."""
    with pytest.raises(StageError, match=r"the loss is (nan|inf)"):
        _train(tiny, tmp_path, epochs=1, batch_size=256, learning_rate=1e38)


def test_on_epoch_is_told_of_each_epoch_in_order(tiny: Dataset, tmp_path: Path) -> None:
    told: list[EpochResult] = []
    _, result = _train(tiny, tmp_path, epochs=3, on_epoch=told.append)
    assert tuple(told) == result.epochs
    assert [epoch.epoch for epoch in told] == [1, 2, 3]
    for epoch in told:
        assert 0 <= epoch.train_top1_percent <= epoch.train_top3_percent <= 100
        assert 0 <= epoch.validation_top1_percent <= epoch.validation_top3_percent <= 100
        assert epoch.train_loss > 0 and epoch.validation_loss > 0 and epoch.images_per_second > 0


def test_best_weights_are_on_disk_after_every_epoch(tiny: Dataset, tmp_path: Path) -> None:
    seen: list[bool] = []

    def look(epoch: EpochResult) -> None:
        seen.append((tmp_path / "best.safetensors").is_file())

    _train(tiny, tmp_path, epochs=3, on_epoch=look)
    assert seen[1:] == [True, True]


def test_last_batch_of_one_image_is_left_out(tiny: Dataset, tmp_path: Path) -> None:
    odd = replace(tiny, train=tiny.train.subset(torch.arange(2 * 64 + 1)))
    assert len(_train(odd, tmp_path)[1].epochs) == 2


def test_only_a_last_batch_of_one_is_left_out(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm cannot take the statistics of one value."""
    sizes: list[int] = []
    step = training._step

    def note(loop: object, images: Tensor, labels: Tensor, epoch: int) -> Tensor:
        sizes.append(len(images))
        return step(loop, images, labels, epoch)

    monkeypatch.setattr(training, "_step", note)
    for count in (129, 130):
        part = tiny.train.subset(torch.arange(count))
        loop = training._prepare(_build(tiny), replace(tiny, train=part), TrainConfig(batch_size=64))
        training._train_epoch(loop, part, 0, 1)
    assert sizes == [64, 64, 64, 64, 2]


def test_every_image_is_seen_once_an_epoch(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
        seen.append(images)
        return augment(images, padding, flip, generator)

    monkeypatch.setattr(training, "augment", note)
    loop = training._prepare(_build(tiny), tiny, TrainConfig(batch_size=64))
    training._train_epoch(loop, tiny.train, 0, 1)
    assert sorted(image.numpy().tobytes() for image in torch.cat(seen)) == sorted(
        image.numpy().tobytes() for image in tiny.train.images
    )
    assert not torch.equal(torch.cat(seen), tiny.train.images)  # in another order


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_as_asked(tiny: Dataset, tmp_path: Path, bf16: bool) -> None:
    model, result = _train(tiny, tmp_path, epochs=1, bf16=bf16)
    assert result.bf16 is bf16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_momentum_zero_is_plain_descent(tiny: Dataset) -> None:
    optimizer = training._prepare(_build(tiny), tiny, TrainConfig(momentum=0.0)).optimizer
    assert optimizer.defaults["nesterov"] is False
    assert training._prepare(_build(tiny), tiny, TrainConfig()).optimizer.defaults["nesterov"] is True
