"""What holds an int8 model back on this machine: rates of arithmetic and memory, and where the time of a pass goes."""

import ctypes
import mmap
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.profiler import ProfilerActivity, profile

from qexp.measurement.host import Host

PASSES = 30
CALLS = (8, 40)  # convolutions of two traces, whose difference is that of so many calls
MOST_ROWS = 8  # of a profile


@dataclass(frozen=True)
class Limits:
    """What the machine can do: int8 multiply-accumulates in a large matrix product, bytes read from memory.

    `trace_call_us` is what torch's int8 convolution takes inside a trace if it has next to nothing to compute; None in
    results of earlier versions, which measured a call from Python. `clock_ghz` is the clock at which a core runs a loop
    of its own, `int8_macs_a_cycle` what a core's instructions can multiply and add in a cycle; None where not known.
    """

    int8_gmacs_per_s: float
    read_gb_per_s: float
    trace_call_us: float | None = None
    clock_ghz: float | None = None
    int8_macs_a_cycle: int | None = None

    def peak_gmacs_per_s(self, cores: int) -> float | None:
        """What so many cores can do at most, by clock and instructions."""
        if self.clock_ghz is None or self.int8_macs_a_cycle is None:
            return None
        return cores * self.clock_ghz * self.int8_macs_a_cycle


@dataclass(frozen=True)
class Operation:
    """Calls of one operation with inputs of one shape, in one pass of a model; `share_percent` of the pass's time."""

    name: str
    input_shape: tuple[int, ...]
    calls: int
    time_us: float
    share_percent: float


def measure_limits(host: Host) -> Limits:
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
    return Limits(
        rows * width * width / product / 1e9,
        4 * 2**28 / read / 1e9,
        1e6 * _call_s(),
        _clock_ghz(),
        _int8_macs_a_cycle(host),
    )


def _clock_ghz() -> float | None:
    """Clock of a busy core: the time of a loop whose step, one subtraction that needs the one before, takes a cycle.

    The clock in /proc/cpuinfo is the nominal one where the machine is virtual. None where the CPU is no x86.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    steps = 1_000_000  # so few that some passes are not interrupted
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("4889f9 48ffc9 75fb c3"))  # mov rcx, rdi; again: dec rcx; jnz again; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    count = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(address)
    return steps / _fastest_s(lambda: count(steps), passes=500) / 1e9


def _int8_macs_a_cycle(host: Host) -> int | None:
    """Multiply-accumulates of a core in a cycle, by the tables of https://uops.info and the makers' manuals.

    TDPBUSD of AMX does 16 x 16 x 64 in 16 cycles. VPDPBUSD does 64 with 512 bits: Intel's servers have two units, Zen 4
    has one of that width (two halves), Zen 5 two.
    """
    if "AMX-int8" in host.features:
        return 1024
    if "AVX512-VNNI" in host.features:
        return 64 if _is_zen_4() else 128
    return None


def _is_zen_4() -> bool:
    """Family 25 of AMD that has VNNI: Zen 3, of the same family, has none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return found.get("vendor_id") == "AuthenticAMD" and found.get("cpu family") == "25"


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
