"""The machine that a measurement belongs to: CPU model, its int8 and bf16 features, threads, library versions."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512F",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-int8",
    "amx_bf16": "AMX-bf16",
    "asimddp": "NEON-dotprod",
    "i8mm": "NEON-i8mm",
}
# Without AVX-VNNI: torch's x86 kernels do not use it, those of AVX2 saturate.
INT8_DOT_PRODUCTS = {"AVX512-VNNI", "AMX-int8", "NEON-dotprod"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # names and numbers of glibc's malloc.h
LIBRARIES = ("torch", "torchvision", "torchao", "onnx", "onnxruntime", "mlflow", "optuna", "torchinfo", "numpy")


@dataclass(frozen=True)
class Host:
    """Facts about the machine; `threads` is what the stages use."""

    cpu: str
    cores: int
    threads: int
    memory_gb: float
    features: tuple[str, ...]
    system: str
    python: str
    libraries: dict[str, str]

    @property
    def has_int8_dot_product(self) -> bool:
        """Whether int8 products are summed in 32 bits; without it (AVX2) pairs of products saturate at 16 bits."""
        return bool(INT8_DOT_PRODUCTS & set(self.features))

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 numbers."""
        return bool({"AVX512-BF16", "AMX-bf16"} & set(self.features))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_host(threads: int | None, cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """Read the facts; `threads` None means one a core. Off Linux the features are unknown, and the tuple is empty."""
    facts = _first_processor(cpuinfo)
    flags = facts.get("flags", facts.get("Features", "")).split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Host(
        cpu=facts.get("model name") or platform.processor() or platform.machine(),
        cores=available_cores(),
        threads=threads or available_cores(),
        memory_gb=round(pages / 1e9, 1),
        features=tuple(name for flag, name in FEATURES.items() if flag in flags),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=sys.version.split()[0],
        libraries={name: version(name) for name in LIBRARIES},
    )


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@contextmanager
def freed_memory_reused() -> Iterator[None]:
    """`reuse_freed_memory` for a while, then `give_back_freed_memory`."""
    changed = reuse_freed_memory()
    try:
        yield
    finally:
        if changed:
            give_back_freed_memory()


def give_back_freed_memory() -> bool:
    """Let glibc give back what is free now, and blocks above 32 MiB as they are freed; False without glibc.

    That is what glibc does by itself once a process has used large blocks.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
    changed = [libc.mallopt(parameter, value) for parameter, value in settings.items()]
    libc.malloc_trim(0)
    return all(changed)


def reuse_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next allocation instead of giving them back; False without glibc.

    A training step frees and allocates gradients and bf16 copies of all weights. By default each is a mapping of its
    own, whose pages the kernel must clear again every step: a third of VGG16's step (benchmarks/training.py).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
