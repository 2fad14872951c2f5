"""Training: whole-batch augmentation, SGD with a one-cycle schedule, early stopping by validation, best weights kept.

Everything random in an epoch follows from (seed, epoch) alone, so an epoch can be repeated exactly.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.augmentation import augment
from qexp.config import TrainConfig
from qexp.data import Dataset, Split
from qexp.errors import StageError
from qexp.evaluation import to_float, top_k_correct
from qexp.host import reuse_freed_memory
from qexp.models import Classifier, load_classifier, repeated_inputs, save_classifier
from qexp.progress import say, track

WARM_UP_SHARE = 0.25  # of the steps, in which the learning rate rises to its peak
PEAK_WITH_BATCH_NORM, PEAK_WITHOUT_BATCH_NORM = 0.2, 0.03
SHORTEST_CYCLE = 5  # steps; in a shorter one torch's warm-up has no length, and it divides by that
EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True)
class EpochResult:
    """One epoch. Training figures are running means over its augmented images, taken while the weights change."""

    epoch: int
    train_loss: float
    train_top1_percent: float
    train_top3_percent: float
    validation_loss: float
    validation_top1_percent: float
    validation_top3_percent: float
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """All epochs in order (numbered from 1), which of them gave the weights that were kept, and the time taken."""

    epochs: tuple[EpochResult, ...]
    best_epoch: int
    stopped_early: bool
    bf16: bool
    peak_learning_rate: float
    duration_s: float


def settle_options(options: TrainConfig, dataset_name: str, network: nn.Module) -> TrainConfig:
    """The options with every `auto` replaced by what it stands for with this data set and network."""
    settled = {
        "learning_rate": options.learning_rate or default_peak(network),
        # A mirrored digit is no digit.
        "flip": dataset_name != "digits" if options.flip is None else options.flip,
        "bf16": _cpu_has_bf16() if options.bf16 is None else options.bf16,
    }
    return options.model_copy(update=settled)


def train_model(
    model: Classifier,
    dataset: Dataset,
    options: TrainConfig,
    seed: int,
    on_epoch: Callable[[EpochResult], None],
    best_weights: Path,
) -> TrainResult:
    """Train `model` in place and leave it in evaluation mode with its best weights by validation top-1, then loss.

    Args:
        on_epoch: told of every epoch as it ends.
        best_weights: file that holds the best weights so far after every epoch, whatever happens to the process.

    Raises:
        StageError: the loss is not a finite number.
    """
    started = time.monotonic()
    reuse_freed_memory()
    loop = _prepare(model, dataset, options)
    epochs: list[EpochResult] = []
    best = (-math.inf, -math.inf)
    best_epoch = 0
    for epoch in range(1, options.epochs + 1):
        train = _train_epoch(loop, dataset.train, seed, epoch)
        result = EpochResult(epoch, *train[:3], *_evaluate(loop, dataset.validation), *train[3:])
        _check_finite(result.validation_loss, epoch)
        epochs.append(result)
        on_epoch(result)
        say(_epoch_line(result, options.epochs))
        rank = (result.validation_top1_percent, -result.validation_loss)
        if rank > best:
            best, best_epoch = rank, epoch
            save_classifier(model, best_weights)
        elif epoch - best_epoch >= options.patience:
            break
    model.load_state_dict(load_classifier(best_weights).state_dict())
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    stopped_early = len(epochs) < options.epochs
    return TrainResult(tuple(epochs), best_epoch, stopped_early, loop.bf16, loop.peak, time.monotonic() - started)


@dataclass(frozen=True)
class _Loop:
    """What every epoch needs, settled before the first."""

    model: Classifier
    options: TrainConfig
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    peak: float
    flip: bool
    bf16: bool


def _prepare(model: Classifier, dataset: Dataset, options: TrainConfig) -> _Loop:
    options = settle_options(options, dataset.name, model)
    peak = options.learning_rate or 0.0
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = _parameter_groups(model, peak)
    optimizer = torch.optim.SGD(
        groups,
        lr=peak,
        momentum=options.momentum,
        nesterov=options.momentum > 0,
        weight_decay=options.weight_decay,
        fused=True,
    )
    # One cycle: Smith and Topin, "Super-Convergence", arXiv 1708.07120. Momentum stays as configured.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=max(SHORTEST_CYCLE, options.epochs * math.ceil(len(dataset.train) / options.batch_size)),
        pct_start=WARM_UP_SHARE,
        cycle_momentum=False,
    )
    return _Loop(model, options, optimizer, schedule, peak, bool(options.flip), bool(options.bf16))


def _parameter_groups(model: Classifier, peak: float) -> list[dict[str, Any]]:
    """All parameters at the peak rate; where the first linear layer sees copies, its own rate is divided by them."""
    copies = repeated_inputs(model)
    if copies == 1:
        return [{"params": list(model.parameters()), "lr": peak}]
    first = list(model.network.get_submodule("classifier.0").parameters())
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in first)]
    return [{"params": others, "lr": peak}, {"params": first, "lr": peak / copies}]


def default_peak(model: nn.Module) -> float:
    """The learning rate's peak: networks without batch norm diverge at the rate that serves those with it."""
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return PEAK_WITH_BATCH_NORM if has_norm else PEAK_WITHOUT_BATCH_NORM


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _train_epoch(loop: _Loop, train: Split, seed: int, epoch: int) -> tuple[float, float, float, float, float]:
    """Loss, top-1 and top-3 in percent over the epoch, learning rate of its last step, images a second."""
    started = time.perf_counter()
    generator = _seed_epoch(seed, epoch)
    loop.model.train()
    batches = torch.randperm(len(train), generator=generator).split(loop.options.batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches = batches[:-1]  # batch norm cannot take the statistics of one image
    sums, learning_rate = torch.zeros(3, dtype=torch.float64), 0.0
    for batch in track(batches, f"epoch {epoch}", len(batches)):
        images = augment(train.images[batch], loop.options.crop_padding, loop.flip, generator)
        learning_rate = float(loop.schedule.get_last_lr()[0])
        sums += _step(loop, images, train.labels[batch], epoch)
    loss_mean, top1, top3 = (sums / sum(len(batch) for batch in batches)).tolist()
    return loss_mean, 100 * top1, 100 * top3, learning_rate, len(train) / (time.perf_counter() - started)


def _step(loop: _Loop, images: Tensor, labels: Tensor, epoch: int) -> Tensor:
    """One optimiser step on a uint8 batch; the sums of loss, hits and top-3 hits over it."""
    logits, loss = _forward(loop, images, labels)
    _check_finite(loss.item(), epoch)
    loop.optimizer.zero_grad()
    loss.backward()
    loop.optimizer.step()
    loop.schedule.step()
    return _sums(loss, logits, labels)


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise StageError(f"training stopped in epoch {epoch}: the loss is {loss}; lower --learning-rate")


def _forward(loop: _Loop, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=loop.bf16):
        logits = loop.model(to_float(images).contiguous(memory_format=torch.channels_last)).float()
    return logits, nn.functional.cross_entropy(logits, labels, label_smoothing=loop.options.label_smoothing)


def _seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed dropout (torch's global generator) and return the generator of order and augmentation."""
    torch.manual_seed(seed * 100_003 + epoch)
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, hits and top-3 hits summed over the batch, float64 [3]."""
    hits = [top_k_correct(logits.detach(), labels, k).sum().double() for k in (1, 3)]
    return torch.stack([loss.detach().double() * len(labels), *hits])


def _evaluate(loop: _Loop, split: Split) -> tuple[float, float, float]:
    """Loss, top-1 and top-3 in percent, on un-augmented images."""
    loop.model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in torch.arange(len(split)).split(EVALUATION_BATCH_SIZE):
            labels = split.labels[batch]
            logits, loss = _forward(loop, split.images[batch], labels)
            sums += _sums(loss, logits, labels)
    loss_mean, top1, top3 = (sums / len(split)).tolist()
    return loss_mean, 100 * top1, 100 * top3


def _epoch_line(result: EpochResult, epochs: int) -> str:
    values = asdict(result)
    return (
        "epoch {epoch}/{epochs}: train loss {train_loss:.3f} top-1 {train_top1_percent:.2f} %, "
        "validation loss {validation_loss:.3f} top-1 {validation_top1_percent:.2f} %, "
        "{images_per_second:.0f} images/s"
    ).format(**values, epochs=epochs)
