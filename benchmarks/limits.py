"""What holds an int8 model back on this machine: rates of arithmetic and memory, and where the time of a pass goes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PASSES = 30
MOST_ROWS = 8  # of a profile


@dataclass(frozen=True)
class Limits:
    """What the machine can do: int8 multiply-accumulates in a large matrix product, bytes read from memory.

    `call_us` is what a call of torch's int8 convolution takes that has next to nothing to compute.
    """

    int8_gmacs_per_s: float
    read_gb_per_s: float
    call_us: float


@dataclass(frozen=True)
class Operation:
    """Calls of one operation with inputs of one shape, in one pass of a model; `share_percent` of the pass's time."""

    name: str
    input_shape: tuple[int, ...]
    calls: int
    time_us: float
    share_percent: float


def measure_limits() -> Limits:
    """The best passes: 2048 x 4096 x 4096 in int8 by oneDNN, the sum of a gigabyte, a convolution of one pixel."""
    rows, width = 2048, 4096
    x = torch.randint(0, 255, (rows, width), dtype=torch.uint8)
    ones, zeros = torch.full((width,), 0.01), torch.zeros(width, dtype=torch.int32)
    weight = torch.randint(-127, 127, (width, width), dtype=torch.int8).t()
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, width])
    arguments: tuple[Any, ...] = (x, 0.01, 0, packed, ones, zeros, None, 0.01, 0, torch.uint8, "none", [], "")
    product = _fastest_s(lambda: torch.ops.onednn.qlinear_pointwise(*arguments))
    memory = torch.ones(2**28)
    read = _fastest_s(lambda: memory.sum())
    call = _fastest_s(_smallest_convolution(), passes=2000)
    return Limits(rows * width * width / product / 1e9, 4 * 2**28 / read / 1e9, 1e6 * call)


def _smallest_convolution() -> Callable[[], Any]:
    weight = torch.quantize_per_channel(
        torch.ones(16, 16, 1, 1), torch.ones(16), torch.zeros(16, dtype=torch.int64), 0, torch.qint8
    )
    packed = torch.ops.quantized.conv2d_prepack(weight, torch.zeros(16), [1, 1], [0, 0], [1, 1], 1)
    pixel = torch.quantize_per_tensor(torch.ones(1, 16, 1, 1), 1.0, 0, torch.quint8)
    return lambda: torch.ops.quantized.conv2d_relu(pixel, packed, 1.0, 0)


def _fastest_s(run: Callable[[], Any], passes: int = PASSES) -> float:
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def profile_pass(model: Callable[[Tensor], object], images: Tensor) -> tuple[Operation, ...]:
    """Where the time of a pass goes, by torch's profiler: the operations that take most, the rest as one."""
    for _ in range(PASSES):
        model(images)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(PASSES):
            model(images)
    own = [one for one in found.key_averages(group_by_input_shape=True) if one.self_cpu_time_total > 0]
    own.sort(key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in own)
    rows = [
        Operation(
            one.key,
            tuple(one.input_shapes[0]) if one.input_shapes else (),
            round(one.count / PASSES),
            one.self_cpu_time_total / PASSES,
            100 * one.self_cpu_time_total / whole,
        )
        for one in own
    ]
    rest = rows[MOST_ROWS:]
    others = Operation(
        "others",
        (),
        sum(one.calls for one in rest),
        *(sum(getattr(one, name) for one in rest) for name in ("time_us", "share_percent")),
    )
    return (*rows[:MOST_ROWS], others) if rest else tuple(rows)
