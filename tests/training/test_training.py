"""Training: the same seed gives the same bits, early stopping, which weights are kept, resuming after a stop."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import EXECUTION, build_tiny, equal_weights
from pydantic import TypeAdapter
from torch import Tensor, nn

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.foundation.waiting import DEFAULT, PASSIVE, VARIABLES, waiting
from qexp.measurement.accuracy import measure_accuracy, predict_logits
from qexp.models.classifier import Classifier, load_classifier
from qexp.training import execution as fastest
from qexp.training import loop
from qexp.training import train as training
from qexp.training.checkpoint import best_file
from qexp.training.train import EpochResult, TrainResult, train_model


def _ignore(epoch: EpochResult) -> None:
    pass


def _train(
    dataset: Dataset, folder: Path, seed: int = 0, on_epoch: Callable[[EpochResult], None] = _ignore, **options: object
) -> tuple[Classifier, TrainResult]:
    """In a new folder below `folder`: a training of its own."""
    model = build_tiny(dataset)
    config = TrainConfig(**{"epochs": 2, "batch_size": 64, **EXECUTION, **options})
    return model, train_model(model, dataset, config, seed, on_epoch, Path(tempfile.mkdtemp(dir=folder)))


def test_same_seed_gives_equal_weights_bit_for_bit(tiny: Dataset, tmp_path: Path) -> None:
    first, result = _train(tiny, tmp_path, seed=5)
    torch.rand(7)  # what the process drew before must not matter
    second, again = _train(tiny, tmp_path, seed=5)
    other, _ = _train(tiny, tmp_path, seed=6)
    assert equal_weights(first, second)
    assert [epoch.train_loss for epoch in result.epochs] == [epoch.train_loss for epoch in again.epochs]
    assert not equal_weights(first, other)


def test_how_threads_wait_changes_no_bit(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    few = replace(tiny, train=tiny.train.subset(torch.arange(32)), validation=tiny.validation.subset(torch.arange(8)))
    models, before = [], waiting()
    for how in (PASSIVE, DEFAULT):
        folder, seen = tmp_path / how, list[str]()
        folder.mkdir()
        kept = fastest.Settled(False, 2, True, waiting=how)
        (folder / fastest.FILE).write_bytes(TypeAdapter(fastest.Settled).dump_json(kept))
        models.append(build_tiny(few))
        note = lambda epoch, seen=seen: seen.append(waiting())  # noqa: E731
        result = train_model(models[-1], few, TrainConfig(epochs=1, batch_size=16), 5, note, folder)
        assert seen == [result.waiting] == [how] and waiting() == before
    assert equal_weights(*models)


def test_training_learns(trained: tuple[Classifier, TrainResult], digits: Dataset) -> None:
    model, result = trained
    accuracy = measure_accuracy(predict_logits(model, digits.test.images), digits.test.labels)
    assert accuracy.top1_percent > 70  # chance is 10
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert not model.training
    assert result.duration_s > 0


def _script(monkeypatch: pytest.MonkeyPatch, *validation: tuple[float, float]) -> None:
    """Let validation find these (loss, top-1) pairs, epoch by epoch."""
    left = list(validation)
    monkeypatch.setattr(loop, "validate", lambda loop, split: (*left.pop(0), 99.0))


def test_best_weights_are_those_of_the_best_epoch(tiny: Dataset, tmp_path: Path) -> None:
    """Evaluated again, the kept weights give what was noted for that epoch; so the last ones were not kept instead."""
    snapshots: list[dict[str, Tensor]] = []
    model = build_tiny(tiny)

    def keep(epoch: EpochResult) -> None:
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    options = TrainConfig(epochs=6, batch_size=64, learning_rate=1.0, **EXECUTION)  # validation goes up and down
    result = train_model(model, tiny, options, 0, keep, tmp_path)
    best = max(result.epochs, key=lambda epoch: (epoch.validation_top1_percent, -epoch.validation_loss))
    assert result.best_epoch == best.epoch
    kept = model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in snapshots[result.best_epoch - 1].items())
    assert equal_weights(load_classifier(best_file(tmp_path, best.epoch)), model)
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
    assert not equal_weights(model, last)


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


@pytest.mark.parametrize(("images", "epochs"), [(40, 1), (40, 4), (70, 2), (200, 1)])
def test_runs_of_few_steps_work(tiny: Dataset, tmp_path: Path, images: int, epochs: int) -> None:
    """One step in all, and four: a quarter of them is one, so the warm-up has no length."""
    few = replace(tiny, train=tiny.train.subset(torch.arange(images) % 160))
    _, result = _train(few, tmp_path, epochs=epochs)
    assert len(result.epochs) == epochs


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


def test_weights_with_an_exploded_validation_loss_are_told_of(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "validate", lambda given, split: (1e4, 10.0, 30.0))
    _train(tiny, tmp_path, epochs=1)
    assert "warning: the validation loss of the weights kept is 1e+04" in capsys.readouterr().err


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_as_asked(tiny: Dataset, tmp_path: Path, bf16: bool) -> None:
    model, result = _train(tiny, tmp_path, epochs=1, bf16=bf16)
    assert result.bf16 is bf16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_best_weights_and_a_checkpoint_are_on_disk_after_every_epoch(tiny: Dataset, tmp_path: Path) -> None:
    def look(epoch: EpochResult) -> None:
        assert (tmp_path / "checkpoint.pt").is_file()
        assert len(list(tmp_path.glob("best-*.safetensors"))) == 1
        assert {file.suffix for file in tmp_path.iterdir()} == {".pt", ".safetensors"}  # nothing half written

    train_model(build_tiny(tiny), tiny, TrainConfig(epochs=3, batch_size=64, **EXECUTION), 0, look, tmp_path)


def test_exploding_loss_stops_training(tiny: Dataset, tmp_path: Path) -> None:
    model = build_tiny(tiny)
    with torch.no_grad():
        model.network[-1].weight.mul_(1e5)  # type: ignore[index,union-attr,operator]
    with pytest.raises(StageError, match=r"epoch 1: the loss is [\d.e+]+, more than 100 times that of guessing"):
        train_model(model, tiny, TrainConfig(epochs=1, **EXECUTION), 0, _ignore, tmp_path)


def _train_with_stops(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch, every: int, number: int, **options: object
) -> tuple[Classifier, TrainResult, int]:
    """Start again and again, with a signal at every so many steps, until the training is through."""
    steps, stops, step = 0, 0, loop._step

    def step_and_signal(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            os.kill(os.getpid(), number)
        step(*arguments)

    monkeypatch.setattr(loop, "_step", step_and_signal)
    while True:
        model = build_tiny(dataset)
        torch.rand(stops + 3)  # another process has another past
        try:
            config = TrainConfig(**{"epochs": 3, "batch_size": 32, **EXECUTION, **options})
            return model, train_model(model, dataset, config, 5, _ignore, folder), stops
        except (KeyboardInterrupt, SystemExit) as stopped:
            assert isinstance(stopped, KeyboardInterrupt) == (number == signal.SIGINT)
            stops += 1


@pytest.mark.slow
@pytest.mark.parametrize(("every", "number"), [(2, signal.SIGINT), (4, signal.SIGTERM)])
def test_training_stopped_by_signals_gives_the_same_bits(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, number: int
) -> None:
    """Every 4 of 5 steps; every 2 gives also stops at the last step of an epoch."""
    whole, expected = _train(tiny, tmp_path, seed=5, epochs=3, batch_size=32)
    model, result, stops = _train_with_stops(tiny, tmp_path / "stopped", monkeypatch, every, number)
    assert stops == 15 // every == result.times_resumed
    assert equal_weights(model, whole)
    timeless = {"images_per_second": 0.0}
    assert [replace(e, **timeless) for e in result.epochs] == [replace(e, **timeless) for e in expected.epochs]  # type: ignore[arg-type]


def test_checkpoints_inside_an_epoch_come_with_time(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    save = training.save_checkpoint

    def note(folder: Path, state: dict[str, dict[str, int]]) -> None:
        steps.append(state["position"]["step"])
        save(folder, state)

    monkeypatch.setattr(training, "save_checkpoint", note)
    _train(tiny, tmp_path, epochs=1, batch_size=32, checkpoint_minutes=1e-9)
    assert steps == [1, 2, 3, 4, 5, 0]
    steps.clear()
    _train(tiny, tmp_path, epochs=2, batch_size=32)
    assert steps == [0, 0]


def test_early_stopping_is_remembered(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch and the wait since are in the checkpoint: patience does not start again."""
    folder = tmp_path / "own"
    told: list[int] = []
    for scores in ([(1.0, 50.0), (0.9, 60.0), (1.0, 40.0)], [(1.0, 40.0)]):
        _script(monkeypatch, *scores)
        try:  # the script ends before the training: an error in the middle of validation
            config = TrainConfig(epochs=9, batch_size=64, patience=2, **EXECUTION)
            result = train_model(build_tiny(tiny), tiny, config, 0, lambda e: told.append(e.epoch), folder)
        except IndexError:
            continue
    assert [epoch.validation_top1_percent for epoch in result.epochs] == [50.0, 60.0, 40.0, 40.0]
    assert result.best_epoch == 2 and result.stopped_early
    assert told == [1, 2, 3, 1, 2, 3, 4]  # those of the checkpoint again


def test_checkpoint_of_another_training_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    train_model(build_tiny(tiny), tiny, TrainConfig(epochs=1, **EXECUTION), 0, _ignore, tmp_path)
    for seed, options in ((1, {}), (0, {"momentum": 0.5})):
        with pytest.raises(InputError, match="of another training"):
            train_model(build_tiny(tiny), tiny, TrainConfig(epochs=1, **EXECUTION, **options), seed, _ignore, tmp_path)


def test_a_finished_training_gives_its_result_when_resumed(tiny: Dataset, tmp_path: Path) -> None:
    first, second = build_tiny(tiny), build_tiny(tiny)
    result = train_model(first, tiny, TrainConfig(epochs=2, **EXECUTION), 0, _ignore, tmp_path)
    again = train_model(second, tiny, TrainConfig(epochs=2, **EXECUTION), 0, _ignore, tmp_path)
    assert again.epochs == result.epochs and equal_weights(first, second)


def test_a_training_on_the_same_images_is_resumed_whatever_form_their_digest_had(tiny: Dataset, tmp_path: Path) -> None:
    class Renewed(Dataset):
        def has_digest(self, recorded: str) -> bool:
            return recorded in (tiny.digest, self.digest)

    of_tiny = {one.name: getattr(tiny, one.name) for one in fields(tiny)}
    config = TrainConfig(epochs=1, **EXECUTION)
    result = train_model(build_tiny(tiny), tiny, config, 0, _ignore, tmp_path)
    renewed = Renewed(**of_tiny | {"digest": "0" * 20})
    assert train_model(build_tiny(tiny), renewed, config, 0, _ignore, tmp_path).epochs == result.epochs
    other = replace(tiny, digest="1" * 20)
    with pytest.raises(InputError, match="of another training: data_digest differ"):
        train_model(build_tiny(tiny), other, config, 0, _ignore, tmp_path)


def test_what_auto_stood_for_is_recorded_and_kept_when_training_is_resumed(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[fastest.Execution] = []

    def time_steps(*given: object) -> tuple[fastest.Execution, tuple[fastest.Trial, ...]]:
        timed.append(fastest.Execution(bf16=False, threads=1, channels_last=False))
        return timed[-1], (fastest.Trial(False, 1, False, 123.0),)

    monkeypatch.setattr(fastest, "fastest_execution", time_steps)
    for _ in range(2):
        result = train_model(build_tiny(tiny), tiny, TrainConfig(epochs=1), 0, _ignore, tmp_path)
        assert result.execution == {"bf16": False, "train_threads": 1, "channels_last": False}
        assert result.trials == (fastest.Trial(False, 1, False, 123.0),) and result.optimizer == "sgd"
    assert len(timed) == 1
    given = TrainConfig(epochs=1, channels_last=True)
    with pytest.raises(InputError, match="of another training"):
        train_model(build_tiny(tiny), tiny, given, 0, _ignore, tmp_path)
