"""One pass over the images, in training steps or for validation; train.py calls the passes of an epoch in order."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset, Split
from qexp.errors import StageError
from qexp.measurement.accuracy import to_float, top_k_credit
from qexp.models.classifier import Classifier
from qexp.progress import say, track
from qexp.training.augmentation import augment
from qexp.training.checkpoint import Position
from qexp.training.distributed import Group
from qexp.training.interrupts import StopRequest
from qexp.training.recipe import make_optimizer, steps_of
from qexp.training.spinning import Spinning

EVALUATION_BATCH_SIZE = 256
EXPLODED = 100  # times the loss of guessing
STATISTICS_IMAGES = 1024  # from which batch norm's mean and variance are estimated
STEADY_AVERAGES = 10  # times that batch norm's running averages must fit into an epoch to be kept
STEPS_BETWEEN_LOOKS = 25  # at the figures on a GPU, which has to be waited for


@dataclass
class Loop:
    """The state that lasts from one step to the next, and what every step needs. `options` must be settled."""

    model: Classifier
    module: nn.Module  # `model`, or what adds up its gradients over several processes
    options: TrainConfig
    seed: int
    group: Group
    stop: StopRequest
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    position: Position = field(default_factory=Position)
    random_states: dict[str, Tensor] | None = None  # those at `position`, where it came from a checkpoint
    generator: torch.Generator = field(default_factory=torch.Generator)
    asked_to_stop: int = 0  # by which signal; all processes have agreed on it
    spinning: Spinning = field(default_factory=Spinning)
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))  # steps without a finite gradient, not yet counted
    figures: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))  # since the last look

    @property
    def device(self) -> str:
        return self.options.device or "cpu"

    @property
    def largest_loss(self) -> float:
        """Where a loss counts as exploded."""
        return EXPLODED * math.log(max(2, len(self.model.spec.classes)))

    def count_skipped(self) -> None:
        """Add the steps skipped to those of `position`."""
        skipped = round(self.skipped.item())
        self.position.skipped_steps += skipped
        self.position.skipped_in_epoch += skipped
        self.skipped.zero_()


def layout_of(options: TrainConfig) -> torch.memory_format:
    """Memory layout of images and weights."""
    return torch.contiguous_format if options.channels_last is False else torch.channels_last


def prepare(
    model: Classifier,
    module: nn.Module,
    dataset: Dataset,
    options: TrainConfig,
    seed: int,
    group: Group,
    stop: StopRequest,
) -> Loop:
    """The loop at its beginning, for a model that is on its device."""
    optimizer, schedule = make_optimizer(model, options, steps_of(len(dataset.train), options))
    loop = Loop(model, module, options, seed, group, stop, optimizer, schedule)
    loop.figures, loop.skipped = loop.figures.to(loop.device), loop.skipped.to(loop.device)
    return loop


def train_pass(loop: Loop, train: Split, after_step: Callable[[], None]) -> None:
    """The steps of the epoch at `loop.position` that are still to do; `after_step` is called after each
    (on a GPU, after every so many).

    Raises:
        StageError: the loss is not a finite number, or has exploded.
    """
    position = loop.position
    loop.model.train()
    batches = _batches(loop, len(train))
    started, before = time.perf_counter(), position.epoch_s
    for batch in track(batches[position.step :], f"epoch {position.epoch}", len(batches), position.step):
        position.step += 1
        every = 1 if loop.device == "cpu" else STEPS_BETWEEN_LOOKS
        asked = loop.group.size == 1 and loop.stop.signal != 0  # several processes must look at the same step
        look = asked or position.step % every == 0 or position.step == len(batches)
        position.learning_rate = float(loop.schedule.get_last_lr()[0])
        loop.spinning.run(partial(_step, loop, train, batch, look))
        position.epoch_s = before + time.perf_counter() - started
        if look:
            after_step()


def _batches(loop: Loop, count: int) -> list[Tensor]:
    """Indices of the epoch's batches; leaves the random states where the next step needs them."""
    loop.generator = _seed_epoch(loop.seed, loop.position.epoch)
    batches = list(torch.randperm(count, generator=loop.generator).split(loop.options.batch_size))
    # Batch norm cannot take the statistics of one image, and every process must have one.
    if len(batches) > 1 and len(batches[-1]) < max(2, loop.group.size):
        batches.pop()
    if loop.random_states:
        set_random_states(loop, loop.random_states)
        loop.random_states = None
    return batches


def _seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed dropout (torch's global generator) and return the generator of order and augmentation."""
    torch.manual_seed(seed * 100_003 + epoch)
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def random_states(loop: Loop) -> dict[str, Tensor]:
    """The states of all generators that a step draws from."""
    states = {"global": torch.get_rng_state(), "epoch": loop.generator.get_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if loop.device == "cuda" else {})


def set_random_states(loop: Loop, states: dict[str, Tensor]) -> None:
    """Put the generators back to what `random_states` found."""
    torch.set_rng_state(states["global"])
    loop.generator.set_state(states["epoch"])
    if "cuda" in states and loop.device == "cuda":
        torch.cuda.set_rng_state(states["cuda"])


def _step(loop: Loop, train: Split, batch: Tensor, look: bool) -> None:
    """One optimiser step on these images; with `look`, the figures since the last look are added up and checked."""
    share = slice(loop.group.rank, None, loop.group.size)
    loop.group.batch_size = len(batch)
    labels = _on_device(loop, train.labels[batch])[share]
    logits, loss = _forward(loop, loop.module, _augmented(loop, train, batch, loop.generator)[share], labels)
    loop.figures += _figures(loss, logits, labels)
    if look:
        _look(loop)
    loop.optimizer.zero_grad()
    # Gradients are averaged over processes, which have a different number of images where the batch does not divide.
    (loss * (len(labels) * loop.group.size / len(batch))).backward()
    _update(loop)


def _update(loop: Loop) -> None:
    """One step of the optimiser and its schedule, with the gradient scaled down to norm `clip_norm` where it is larger.

    Without that, one large gradient at a high learning rate throws the weights of a network so far off that it does not
    learn again (Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", arXiv
    1211.5063). A gradient that is not finite moves no weight: it would make all of them NaN.
    """
    norm = nn.utils.clip_grad_norm_(loop.model.parameters(), loop.options.clip_norm)
    not_finite = (~norm.isfinite()).float()
    loop.skipped += not_finite
    loop.optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # a fused optimiser then leaves the weights
    loop.optimizer.step()
    loop.schedule.step()


def _look(loop: Loop) -> None:
    """Add the figures of all processes to those of the epoch; all stop where one is asked to or a loss is no good."""
    asked = torch.tensor([float(loop.stop.signal)], dtype=torch.float64, device=loop.figures.device)
    *sums, count, signals = loop.group.total(torch.cat([loop.figures, asked])).tolist()
    loop.figures = torch.zeros_like(loop.figures)
    check_loss(sums[0] / count, loop.position.epoch, loop.largest_loss)
    loop.position.sums = [old + new for old, new in zip(loop.position.sums, [*sums, count], strict=True)]
    if signals:
        loop.asked_to_stop = loop.stop.signal or signal.SIGTERM


def check_loss(loss: float, epoch: int, limit: float = math.inf) -> None:
    """Raise StageError where training cannot recover: the loss is not a finite number, or above `limit`."""
    if math.isfinite(loss) and loss <= limit:
        return
    why = f", more than {EXPLODED} times that of guessing" if math.isfinite(loss) else ""
    raise StageError(f"training stopped in epoch {epoch}: the loss is {loss:.4g}{why}; lower --learning-rate")


def _on_device(loop: Loop, values: Tensor) -> Tensor:
    return values.pin_memory().to(loop.device, non_blocking=True) if loop.device == "cuda" else values


def _augmented(loop: Loop, train: Split, batch: Tensor, generator: torch.Generator) -> Tensor:
    """The images of a batch, cropped and flipped at random."""
    images = _on_device(loop, train.images[batch])
    return augment(images, loop.options.crop_padding, bool(loop.options.flip), generator)


def _forward(loop: Loop, module: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(loop.device, torch.bfloat16, enabled=bool(loop.options.bf16)):
        logits = module(to_float(images).contiguous(memory_format=layout_of(loop.options))).float()
    return logits, nn.functional.cross_entropy(logits, labels, label_smoothing=loop.options.label_smoothing)


def _figures(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, hits and top-3 hits summed over the images, and their number, float64 [4]."""
    hits = [top_k_credit(logits.detach(), labels, k).sum() for k in (1, 3)]
    return torch.stack([loss.detach().double() * len(labels), *hits, torch.full_like(hits[0], len(labels))])


def estimate_batch_norm(loop: Loop, train: Split) -> None:
    """Mean and variance of every batch norm anew, from augmented training images that pass through the network as it
    is now.

    The running averages reach back 1 / momentum steps. Where that is much of an epoch, they are those of weights that
    have long changed: after one epoch of few steps, resnet18 had a validation loss of 928, and mobilenet_v3_small, with
    a momentum of 0.01, guessed while it fitted its training images. Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576, section 3. Where an epoch is long beside them, they are kept.
    """
    steps = math.ceil(len(train) / loop.options.batch_size)
    norms = [module for module in loop.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    lagging = [norm for norm in norms if norm.momentum is not None and norm.momentum * steps < STEADY_AVERAGES]
    if not lagging:
        return
    momenta = [norm.momentum for norm in lagging]
    generator = torch.Generator().manual_seed(loop.seed)
    chosen = torch.randperm(len(train), generator=generator)[:STATISTICS_IMAGES]
    loop.model.eval()  # without dropout, as in validation
    for norm in lagging:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        # Of equal size: batch norm cannot take the statistics of one image, and every process must have one.
        for batch in chosen.tensor_split(max(1, len(chosen) // loop.options.batch_size)):
            share = slice(loop.group.rank, None, loop.group.size)
            images = _augmented(loop, train, batch, generator)[share]
            _forward(loop, loop.model, images, _on_device(loop, train.labels[batch])[share])
    for norm, momentum in zip(lagging, momenta, strict=True):
        norm.momentum = momentum


def check_skipped(position: Position) -> None:
    """Say how many steps of the epoch had no finite gradient; raise StageError if none had one."""
    skipped = position.skipped_in_epoch
    if skipped and skipped >= position.step:
        raise StageError(
            f"training stopped in epoch {position.epoch}: no step had a finite gradient; lower --learning-rate, or "
            "--bf16 false"
        )
    if skipped:
        say(f"warning: {skipped} of {position.step} steps had no finite gradient and were skipped")


def validate(loop: Loop, split: Split) -> tuple[float, float, float]:
    """Loss, top-1 and top-3 in percent, on un-augmented images."""
    loop.model.eval()
    figures = torch.zeros_like(loop.figures)
    with torch.no_grad():
        for batch in torch.arange(len(split)).split(EVALUATION_BATCH_SIZE):
            if loop.stop.signal and loop.group.size == 1:  # several processes must stop at the same step
                break
            share = batch[loop.group.rank :: loop.group.size]
            if len(share):
                labels = _on_device(loop, split.labels[share])
                logits, loss = _forward(loop, loop.model, _on_device(loop, split.images[share]), labels)
                figures += _figures(loss, logits, labels)
    return means(loop.group.total(figures).tolist())


def means(figures: list[float]) -> tuple[float, float, float]:
    """Loss, top-1 and top-3 in percent, from sums and the number of images; 0 of none."""
    loss, top1, top3, count = figures
    return (loss / count, 100 * top1 / count, 100 * top3 / count) if count else (0.0, 0.0, 0.0)
