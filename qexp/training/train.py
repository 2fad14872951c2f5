"""Training: whole-batch augmentation, SGD with a one-cycle schedule, early stopping by validation, best weights kept.

All randomness of an epoch follows from (seed, epoch), and a checkpoint holds the rest of the state: a training that was
stopped anywhere, even by `kill -9`, and resumed ends with the same bits as one that was not. Takes a classifier and a
data set (data/), feeds the train stage (pipeline/).

The same seed gives the same bits on the same CPU with the same libraries, precision, number of threads and memory
layout: these decide in which order numbers are added and how they are rounded. `auto` is settled by timing for each
training, so two trainings that must be equal have to give `bf16`, `train_threads` and `channels_last`. How
threads wait changes no bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qexp.config import HOW_TO_TRAIN, TrainConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError
from qexp.foundation.quantities import Finite, NotNegative, Number, Percent, Some
from qexp.foundation.waiting import waiting, waiting_as
from qexp.measurement.host import freed_memory_reused
from qexp.models.classifier import Classifier, load_classifier, save_classifier
from qexp.progress import say
from qexp.training import loop as passes
from qexp.training.bf16 import padding_seen_in_fp32
from qexp.training.checkpoint import Position, best_file, checkpoint_exists, load_checkpoint, save_checkpoint
from qexp.training.distributed import joined, shared, threads_each
from qexp.training.execution import Settled, Trial, settle_execution
from qexp.training.interrupts import stop_requests
from qexp.training.loop import Loop
from qexp.training.recipe import settle_options


@dataclass(frozen=True)
class EpochResult:
    """One epoch. Training figures are running means over its augmented images, taken while the weights change."""

    epoch: Some
    train_loss: Finite
    train_top1_percent: Percent
    train_top3_percent: Percent
    validation_loss: Finite
    validation_top1_percent: Percent
    validation_top3_percent: Percent
    learning_rate: NotNegative
    images_per_second: NotNegative


@dataclass(frozen=True)
class TrainResult:
    """All epochs in order (numbered from 1), which of them gave the weights that were kept, and the time taken.

    `duration_s` is the time spent training, without the time between a stop and its resumption. `threads` is the number
    of CPU threads of all processes of one machine; `waiting` is how they waited in the end: "passive" (they slept at
    once), "default" (they spun for a while before), or what else OMP_WAIT_POLICY was. `trials` are the timings by which
    precision, threads, layout and waiting were chosen; empty where nothing was left to choose. `skipped_steps` counts
    the steps without a finite gradient. Results of earlier versions have 0 threads, no optimizer and no `clip_norm`.
    """

    epochs: tuple[EpochResult, ...]
    best_epoch: Number
    stopped_early: bool
    bf16: bool
    peak_learning_rate: Finite
    duration_s: NotNegative
    device: str = "cpu"
    processes: Some = 1
    times_resumed: Number = 0
    threads: Number = 0
    channels_last: bool = True
    waiting: str = ""
    optimizer: str = ""
    clip_norm: NotNegative | None = None
    skipped_steps: Number = 0
    trials: tuple[Trial, ...] = ()

    @property
    def execution(self) -> dict[str, bool | int]:
        """How the steps were computed, as options of training."""
        return Settled(self.bf16, self.threads, self.channels_last).options() if self.threads else {}


def train_model(
    model: Classifier,
    dataset: Dataset,
    options: TrainConfig,
    seed: int,
    on_epoch: Callable[[EpochResult], None],
    folder: Path,
) -> TrainResult:
    """Train `model` in place and leave it in evaluation mode with its best weights by validation top-1, then loss.

    Under torchrun all processes call this together; only that of rank 0 writes to `folder` and gets the best weights.

    Args:
        on_epoch: called with every epoch as it ends, after its checkpoint is written; a resumed training first calls
            it again with the epochs before.
        folder: of the checkpoint; if it holds one, training resumes from it.

    Raises:
        StageError: the loss is not finite or has exploded; a checkpoint cannot be written; another process has ended.
        InputError: the checkpoint in `folder` is of another training.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came, and the checkpoint is written.
    """
    options, given_threads = settle_options(options, dataset.name, model), options.train_threads
    threads, device = torch.get_num_threads(), options.device or "cpu"
    with stop_requests() as stop, freed_memory_reused(), joined(device) as group:
        settled = settle_execution(options, device, model, dataset.train, folder) if group.leads else None
        settled = group.from_leader(settled)
        options = options.model_copy(update=settled.options())
        # Other machines may have fewer cores than the leader's, where the steps were timed.
        total = settled.train_threads if given_threads or group.leads else min(threads, settled.train_threads)
        torch.set_num_threads(threads_each(total, group))
        if options.batch_size < 2 * group.size:
            raise InputError(
                f"--batch-size {options.batch_size}: must be at least 2 for each of {group.size} processes"
            )
        in_bf16_here = bool(options.bf16) and device == "cpu"
        layout = passes.layout_of(options)
        with (
            padding_seen_in_fp32(model, in_bf16_here),
            waiting_as(settled.waiting),
            shared(model, group, device, layout) as module,
        ):
            loop = passes.prepare(model, module, dataset, options, seed, group, stop)
            identity = {"seed": seed, "data_digest": dataset.digest, "options": _lasting(options)}
            result = _train(loop, dataset, on_epoch, _Keeper(loop, folder, identity, dataset))
        del loop, module
    torch.set_num_threads(threads)
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    if group.leads:
        model.load_state_dict(load_classifier(best_file(folder, result.best_epoch)).state_dict())
    return replace(result, trials=settled.trials)


def _train(loop: Loop, dataset: Dataset, on_epoch: Callable[[EpochResult], None], keeper: "_Keeper") -> TrainResult:
    for result in keeper.load():
        on_epoch(result)
    while not _finished(loop):
        on_epoch(_run_epoch(loop, dataset, keeper))
    loss = loop.position.epochs[loop.position.best_epoch - 1]["validation_loss"]
    if loss > loop.largest_loss:  # no error: after few steps batch norm's running means are far off
        say(f"warning: the validation loss of the weights kept is {loss:.4g}; lower --learning-rate or raise --epochs")
    return _result(loop)


def _finished(loop: Loop) -> bool:
    position = loop.position
    return position.epoch > loop.options.epochs or (
        position.best_epoch > 0 and position.epoch - 1 - position.best_epoch >= loop.options.patience
    )


def _run_epoch(loop: Loop, dataset: Dataset, keeper: "_Keeper") -> EpochResult:
    """The rest of the epoch under way; ends with a checkpoint at the beginning of the next."""
    position = loop.position
    passes.train_pass(loop, dataset.train, keeper.after_step)
    loop.count_skipped()
    passes.check_skipped(position)
    passes.estimate_batch_norm(loop, dataset.train)
    validation = passes.validate(loop, dataset.validation)
    if loop.group.size == 1:
        keeper.stop_if(loop.stop.signal)
    passes.check_loss(validation[0], position.epoch)  # may be large, where batch norm's running averages lag
    train = passes.means(position.sums)
    pace = len(dataset.train) / position.epoch_s
    result = EpochResult(position.epoch, *train, *validation, position.learning_rate, pace)
    best_epoch = position.best_epoch
    if not best_epoch or _rank(result) > _rank(EpochResult(**position.epochs[best_epoch - 1])):
        best_epoch = position.epoch
        keeper.save_best()
    epochs, times = [*position.epochs, asdict(result)], position.times_resumed
    skipped = position.skipped_steps
    loop.position = Position(
        position.epoch + 1, epochs=epochs, best_epoch=best_epoch, times_resumed=times, skipped_steps=skipped
    )
    keeper.save()
    say(_epoch_line(result, loop.options.epochs))
    return result


def _rank(result: EpochResult) -> tuple[float, float]:
    return result.validation_top1_percent, -result.validation_loss


@dataclass
class _Keeper:
    """Writes and reads the checkpoints of a loop; `identity` must be equal in the checkpoint that is resumed."""

    loop: Loop
    folder: Path
    identity: dict[str, Any]
    dataset: Dataset
    before_s: float = 0.0  # trained in earlier processes
    started: float = 0.0
    saved: float = 0.0

    def load(self) -> list[EpochResult]:
        """Resume from the checkpoint, if there is one; returns the epochs that it holds."""
        self.started = self.saved = time.monotonic()
        loop = self.loop
        state = load_checkpoint(self.folder) if loop.group.leads and checkpoint_exists(self.folder) else None
        if state and self.dataset.has_digest(state["identity"]["data_digest"]):  # of an earlier version's form, perhaps
            state["identity"]["data_digest"] = self.identity["data_digest"]
        leader, state = loop.group.from_leader((self.identity, state))
        self._check(leader, f"process {loop.group.rank}")
        if state is None:
            return []
        self._check(state["identity"], f"checkpoint in {self.folder}")
        loop.model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
        loop.schedule.load_state_dict(state["schedule"])
        loop.random_states = state["random"] or None
        loop.position = Position(**state["position"])
        loop.position.times_resumed += 1
        self.before_s = loop.position.total_s
        say(f"resuming in epoch {loop.position.epoch} after step {loop.position.step}")
        return [EpochResult(**values) for values in loop.position.epochs]

    def _check(self, identity: dict[str, Any], owner: str) -> None:
        different = [name for name, value in self.identity.items() if identity[name] != value]
        if different:
            raise InputError(f"{owner}: of another training: {' and '.join(different)} differ")

    def after_step(self) -> None:
        """A checkpoint if its time has come, or if a signal asks to stop."""
        alone = self.loop.group.size == 1  # several processes stop where all have seen the request
        self.stop_if(self.loop.stop.signal if alone else self.loop.asked_to_stop)
        if time.monotonic() - self.saved > 60 * self.loop.options.checkpoint_minutes:
            self.save()

    def stop_if(self, number: int) -> None:
        """Checkpoint, then end as this signal ends a process; 0 is no signal."""
        if number:
            self.save()
            self.loop.stop.signal = number
            self.loop.stop.act()

    def save(self) -> None:
        loop = self.loop
        now = time.monotonic()
        loop.count_skipped()
        loop.position.total_s = self.before_s + now - self.started
        if loop.group.leads:
            state = {name: getattr(loop, name).state_dict() for name in ("model", "optimizer", "schedule")}
            position, random = asdict(loop.position), passes.random_states(loop) if loop.position.step else {}
            save_checkpoint(self.folder, state | {"identity": self.identity, "position": position, "random": random})
        self.saved = time.monotonic()

    def save_best(self) -> None:
        if self.loop.group.leads:
            save_classifier(self.loop.model, best_file(self.folder, self.loop.position.epoch))


def _lasting(options: TrainConfig) -> dict[str, Any]:
    """The options that must not change when a training is resumed, on this machine or another."""
    return options.model_dump(exclude=set(HOW_TO_TRAIN))


def _result(loop: Loop) -> TrainResult:
    options, position = loop.options, loop.position
    epochs = tuple(EpochResult(**values) for values in position.epochs)
    return TrainResult(
        epochs=epochs,
        best_epoch=position.best_epoch,
        stopped_early=len(epochs) < options.epochs,
        bf16=bool(options.bf16),
        peak_learning_rate=options.learning_rate or math.nan,
        duration_s=position.total_s,
        device=loop.device,
        processes=loop.group.size,
        times_resumed=position.times_resumed,
        threads=options.train_threads or 0,
        channels_last=options.channels_last is not False,
        waiting=waiting(),
        optimizer=options.optimizer or "",
        clip_norm=options.clip_norm,
        skipped_steps=position.skipped_steps,
    )


def _epoch_line(result: EpochResult, epochs: int) -> str:
    values = asdict(result)
    return (
        "epoch {epoch}/{epochs}: train loss {train_loss:.3f} top-1 {train_top1_percent:.2f} %, "
        "validation loss {validation_loss:.3f} top-1 {validation_top1_percent:.2f} %, "
        "{images_per_second:.0f} images/s"
    ).format(**values, epochs=epochs)
