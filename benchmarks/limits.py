"""What holds an int8 model back on this machine: rates of arithmetic and memory, and where the time of a pass goes."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.profiler import ProfilerActivity, profile

PASSES = 30
CALLS = (8, 40)  # convolutions of two traces, whose difference is that of so many calls
MOST_ROWS = 8  # of a profile


@dataclass(frozen=True)
class Limits:
    """What the machine can do: int8 multiply-accumulates in a large matrix product, bytes read from memory.

    `trace_call_us` is what torch's int8 convolution takes inside a trace if it has next to nothing to compute; None in
    results of earlier versions, which measured a call from Python.
    """

    int8_gmacs_per_s: float
    read_gb_per_s: float
    trace_call_us: float | None = None


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
    return Limits(rows * width * width / product / 1e9, 4 * 2**28 / read / 1e9, 1e6 * _call_s())


def _call_s() -> float:
    """Seconds of one int8 convolution of one pixel inside a frozen trace, as a model runs it: called from Python, each
    takes as long again."""
    few, many = (_trace_of_convolutions(count) for count in CALLS)
    pixel = torch.ones(1, 16, 1, 1)
    difference = _fastest_s(lambda: many(pixel), passes=1000) - _fastest_s(lambda: few(pixel), passes=1000)
    return difference / (CALLS[1] - CALLS[0])


def _trace_of_convolutions(count: int) -> torch.jit.ScriptModule:
    """So many convolutions of one pixel, one after the other."""
    layers = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 1) for _ in range(count))).eval()
    pixel = torch.ones(1, 16, 1, 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization announces its successor
        prepared = prepare_fx(layers, get_default_qconfig_mapping("x86"), (pixel,))
        prepared(pixel)
        return torch.jit.freeze(torch.jit.trace(convert_fx(prepared), pixel, check_trace=False).eval())


def _fastest_s(run: Callable[[], Any], passes: int = PASSES) -> float:
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def profile_pass(model: Callable[[Tensor], object], images: Tensor) -> tuple[Operation, ...]:
    """Where the time of a pass goes, by torch's profiler: the operations that take most, the rest as one.

    Each time is the median of the passes, so that a stall of the machine is no operation's.
    """
    for _ in range(PASSES):
        model(images)
    passes = [_profile_once(model, images) for _ in range(PASSES)]
    times = {key: statistics.median(one.get(key, (0, 0.0))[1] for one in passes) for key in passes[0]}
    whole = sum(times.values())
    rows = [
        Operation(name, shape, passes[0][name, shape][0], time_us, 100 * time_us / whole)
        for (name, shape), time_us in sorted(times.items(), key=lambda found: -found[1])
    ]
    rest = rows[MOST_ROWS:]
    others = Operation(
        "others",
        (),
        sum(one.calls for one in rest),
        *(sum(getattr(one, name) for one in rest) for name in ("time_us", "share_percent")),
    )
    return (*rows[:MOST_ROWS], others) if rest else tuple(rows)


def _profile_once(model: Callable[[Tensor], object], images: Tensor) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Calls and µs of one pass by operation and shape of its first input."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        model(images)
    return {
        (one.key, tuple(one.input_shapes[0]) if one.input_shapes else ()): (one.count, one.self_cpu_time_total)
        for one in found.key_averages(group_by_input_shape=True)
        if one.self_cpu_time_total > 0
    }
