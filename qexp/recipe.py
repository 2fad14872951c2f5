"""The recipe of training: what `auto` stands for, the optimiser and its one-cycle schedule."""

import math
from typing import Any

import torch
from torch import nn

from qexp.config import TrainConfig
from qexp.errors import InputError
from qexp.models import Classifier, repeated_inputs

WARM_UP_SHARE = 0.25  # of the steps, in which the learning rate rises to its peak
PEAK_WITH_BATCH_NORM, PEAK_WITHOUT_BATCH_NORM = 0.2, 0.03
SHORTEST_CYCLE = 5  # steps; in a shorter one torch's warm-up has no length, and it divides by that


def settle_options(options: TrainConfig, dataset_name: str, network: nn.Module) -> TrainConfig:
    """The options with every `auto` replaced by what it stands for with this data set, network and machine.

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
    settled = {
        "device": device,
        "learning_rate": options.learning_rate or default_peak(network),
        # A mirrored digit is no digit.
        "flip": dataset_name != "digits" if options.flip is None else options.flip,
        "bf16": _has_bf16(device) if options.bf16 is None else options.bf16,
    }
    return options.model_copy(update=settled)


def default_peak(model: nn.Module) -> float:
    """The learning rate's peak: networks without batch norm diverge at the rate that serves those with it."""
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return PEAK_WITH_BATCH_NORM if has_norm else PEAK_WITHOUT_BATCH_NORM


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_optimizer(
    model: Classifier, options: TrainConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with Nesterov momentum for a model on its device, and its schedule over `steps`; settled options only.

    One cycle: Smith and Topin, "Super-Convergence", arXiv 1708.07120. Momentum stays as configured.
    """
    peak = options.learning_rate or 0.0
    groups = parameter_groups(model, peak)
    optimizer = torch.optim.SGD(
        groups,
        lr=peak,
        momentum=options.momentum,
        nesterov=options.momentum > 0,
        weight_decay=options.weight_decay,
        fused=True,
    )
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


def steps_of(images: int, options: TrainConfig) -> int:
    """Optimiser steps of a whole training."""
    return options.epochs * math.ceil(images / options.batch_size)
