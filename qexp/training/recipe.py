"""The recipe of training: what `auto` stands for, the optimiser and its one-cycle schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from qexp.config import TrainConfig
from qexp.errors import InputError
from qexp.models.classifier import Classifier, repeated_inputs

WARM_UP_SHARE = 0.25  # of the steps, in which the learning rate rises to its peak
SHORTEST_CYCLE = 5  # steps; in a shorter one torch's warm-up has no length, and it divides by that


@dataclass(frozen=True)
class Recipe:
    """Optimizer, peak of its one-cycle schedule, and weight decay."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float


SGD_WITH_BATCH_NORM = Recipe("sgd", 0.2, 5e-4)
SGD_FOR_DEEP_NETWORKS = Recipe("sgd", 0.05, 5e-4)
SGD_WITHOUT_NORM = Recipe("sgd", 0.03, 5e-4)
ADAMW = Recipe("adamw", 1e-3, 0.05)
DEEP = 16  # layers with batch norm; more of them are deep


def recipe_for(network: nn.Module) -> Recipe:
    """What trains a network of this kind (benchmarks/classifiers.py has the results).

    Batch norm makes the loss smooth enough for SGD at a high rate: 0.2 for a few layers of it (SmallNet, VGG). From
    resnet18 on that is too high: half-way, the loss rises above that of guessing. Without batch norm, 0.2 diverges.
    Networks with layer norm (ConvNeXt, transformers) are trained with AdamW (Loshchilov and Hutter, arXiv 1711.05101),
    as in the papers that introduced them. So is SqueezeNet, whose logits are means of a ReLU: with SGD they become 0
    for all images, and so do their gradients.
    """
    kinds = {type(module) for module in network.modules()}
    if any(issubclass(kind, nn.LayerNorm) for kind in kinds) or "SqueezeNet" in {kind.__name__ for kind in kinds}:
        return ADAMW
    batch_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    if batch_norms > DEEP:
        return SGD_FOR_DEEP_NETWORKS
    return SGD_WITH_BATCH_NORM if batch_norms else SGD_WITHOUT_NORM


def settle_options(options: TrainConfig, dataset_name: str, network: nn.Module) -> TrainConfig:
    """The options with `auto` replaced by what it stands for with this data set, network and machine; what depends on
    speed (`bf16`, `train_threads`, `channels_last`) is left to training/execution.py.

    Raises:
        InputError: there are not as many GPUs as processes, or too few images a step for them.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and (gpus := torch.cuda.device_count()) < options.processes:
        here = f"this machine has {gpus} GPUs for {options.processes} processes" if gpus else "this machine has no GPU"
        raise InputError(f"--device cuda: {here}; allowed: cpu")
    if options.batch_size < 2 * options.processes:
        raise InputError(
            f"--batch-size {options.batch_size}: must be at least 2 for each of {options.processes} processes"
        )
    recipe = _with_optimizer(recipe_for(network), options.optimizer)
    settled = {
        "device": device,
        "optimizer": recipe.optimizer,
        "learning_rate": options.learning_rate or recipe.learning_rate,
        "weight_decay": recipe.weight_decay if options.weight_decay is None else options.weight_decay,
        # A mirrored digit is no digit.
        "flip": dataset_name != "digits" if options.flip is None else options.flip,
    }
    return options.model_copy(update=settled)


def _with_optimizer(recipe: Recipe, optimizer: str | None) -> Recipe:
    """The recipe with the optimizer asked for; one that is not the network's own gets the values of a careful start."""
    if optimizer in (None, recipe.optimizer):
        return recipe
    return ADAMW if optimizer == "adamw" else SGD_WITHOUT_NORM


def make_optimizer(
    model: Classifier, options: TrainConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer for a model on its device, and its schedule over `steps`; settled options only.

    One cycle: Smith and Topin, "Super-Convergence", arXiv 1708.07120. Momentum stays as configured.
    """
    peak, decay = options.learning_rate or 0.0, options.weight_decay or 0.0
    groups = parameter_groups(model, peak)
    if options.optimizer == "adamw":
        groups = [part for group in groups for part in _by_decay(group)]
    optimizer: torch.optim.Optimizer
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=decay, fused=True)
    else:
        momentum, nesterov = options.momentum, options.momentum > 0
        optimizer = torch.optim.SGD(
            groups, lr=peak, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=True
        )
        if momentum:  # torch would leave it without values if the first step is skipped
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=max(SHORTEST_CYCLE, steps),
        pct_start=WARM_UP_SHARE,
        cycle_momentum=False,
    )
    return optimizer, schedule


def parameter_groups(model: Classifier, peak: float) -> list[dict[str, Any]]:
    """All parameters at the peak rate; where the first linear layer sees copies, its own rate is divided by them."""
    copies = repeated_inputs(model)
    if copies == 1:
        return [{"params": list(model.parameters()), "lr": peak}]
    first = list(model.network.get_submodule("classifier.0").parameters())
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in first)]
    return [{"params": others, "lr": peak}, {"params": first, "lr": peak / copies}]


def _by_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The weights of layers, which decay, and what does not, as those have it who proposed AdamW's networks: biases,
    scales of norms, tokens and position embeddings."""
    decaying = [one for one in group["params"] if one.dim() in (2, 4)]
    others = [one for one in group["params"] if one.dim() not in (2, 4)]
    parts = [group | {"params": decaying}, group | {"params": others, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def steps_of(images: int, options: TrainConfig) -> int:
    """Optimiser steps of a whole training."""
    return options.epochs * math.ceil(images / options.batch_size)
