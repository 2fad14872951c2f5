"""Training in several processes that give what one process gives: the same batches, statistics and masks.

torchrun starts the processes (by launch.py, or by hand on several machines) and sets their ranks in the environment.
Each takes every n-th image of the configured batch; batch norm and dropout act on the whole batch, not on the share.
"""

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qexp.errors import StageError, first_line


@dataclass
class Group:
    """This process among all: rank 0 leads, writes and logs. `batch_size` is the whole batch's, set at every step."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    batch_size: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, float64 on the CPU."""
        if self.size == 1:
            return values.cpu()
        dist.all_reduce(values)
        return values.cpu()

    def from_leader(self, value: Any) -> Any:
        """What the leader has (any object that pickle can carry), in every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]


def read_group() -> Group:
    """Who this process is, by torchrun's environment variables; alone without them."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    return Group(rank, size, local)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of this training: nccl between GPUs, gloo between CPUs.

    Raises:
        StageError: another process has ended, or cannot be reached; the GPU's memory is full.
    """
    group = read_group()
    try:
        if group.size > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        yield group
    except torch.OutOfMemoryError as error:
        raise StageError(f"GPU memory is full ({first_line(error)}); lower --batch-size") from error
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, StageError) or group.size == 1:
            raise
        raise StageError(f"process {group.rank} of {group.size}: {first_line(error)}") from error
    finally:
        gc.collect()  # what `shared` has made must go first: it may abort the process at its end otherwise
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def shared(
    model: nn.Module, group: Group, device: str, layout: torch.memory_format = torch.channels_last
) -> Iterator[nn.Module]:
    """The module to train with on this device: `model` when alone, else one that averages gradients over the processes.

    Within the block, batch norm and dropout of `model` see whole batches.
    """
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    if group.size == 1:
        yield model
        return
    replaced = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = partial(_batch_norm, module)  # type: ignore[method-assign]
        elif type(module) is nn.Dropout:
            module.forward = partial(_dropout, module, group)  # type: ignore[method-assign]
        else:
            continue
        replaced.append(module)
    try:
        yield nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    finally:
        for module in replaced:
            del module.forward


class _Sum(torch.autograd.Function):
    """The sum over all processes, of values on the way forward and of gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _batch_norm(module: Any, values: Tensor) -> Tensor:
    """Batch norm with mean and variance of all processes' values; torch's SyncBatchNorm refuses CPUs."""
    if not module.training:
        return type(module).forward(module, values)
    wide = values if values.dtype == torch.float64 else values.float()
    dims = [0, *range(2, values.dim())]
    count = wide.new_full((1,), values.numel() / values.shape[1])
    sums = _Sum.apply(torch.cat([wide.sum(dims), wide.square().sum(dims), count]))
    channels = values.shape[1]
    total = sums[-1]
    mean = sums[:channels] / total
    variance = (sums[channels:-1] / total - mean.square()).clamp(min=0)
    with torch.no_grad():
        module.num_batches_tracked += 1
        share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        module.running_mean.lerp_(mean, share)
        module.running_var.lerp_(variance * (total / (total - 1).clamp(min=1)), share)
    shape = [1, channels] + [1] * (values.dim() - 2)
    scale = module.weight * torch.rsqrt(variance + module.eps)
    offset = module.bias - mean * scale
    return (wide * scale.view(shape) + offset.view(shape)).to(values.dtype)


def _dropout(module: Any, group: Group, values: Tensor) -> Tensor:
    """Dropout whose mask is this process's part of the one that a single process would draw."""
    if not module.training or module.p == 0:
        return values
    whole = torch.empty((group.batch_size, *values.shape[1:]), dtype=values.dtype, device=values.device)
    mask = whole.bernoulli_(1 - module.p).div_(1 - module.p)
    return values * mask[group.rank :: group.size]


def threads_each(threads: int, group: Group) -> int:
    """CPU threads of one process, when those of this machine share `threads`."""
    return max(1, math.floor(threads / group.local_size))
