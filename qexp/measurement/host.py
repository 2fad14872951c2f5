"""The machine that a measurement belongs to: CPU model, its int8 and bf16 features, threads, library versions."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from qexp.errors import InputError
from qexp.foundation.quantities import NotNegative, Some

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
LIBRARIES = (
    "torch",
    "torchvision",
    "torchao",
    "onnx",
    "onnxruntime",
    "openvino",
    "mlflow",
    "optuna",
    "torchinfo",
    "numpy",
)


@dataclass(frozen=True)
class Cpus:
    """What a process may compute on.

    `logical` are the CPUs of its affinity, of which hyper-threads of one core are several; `physical` are the cores
    that these lie on. `quota` is the CPU time that its control groups grant it, in CPUs (2.0 is two seconds of CPU time
    a second); None where there is no limit.
    """

    logical: int
    physical: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """How many threads compute fastest: one a physical core, and no more than the quota can run at once."""
        return min(self.physical, self.most_busy)

    @property
    def most_busy(self) -> int:
        """How many threads can compute at once, hyper-threads included."""
        return self.logical if self.quota is None else max(1, min(self.logical, int(self.quota)))


@dataclass(frozen=True)
class Host:
    """Facts about the machine; `threads` is what the stages use.

    `cores` are the logical CPUs that this process may run on, `physical_cores` the cores that they lie on, `cpu_quota`
    the CPUs that its control groups grant it, None for no limit. In results of earlier versions `physical_cores` is
    None, and quotas were not looked for.
    """

    cpu: str
    cores: Some
    threads: Some
    memory_gb: NotNegative
    features: tuple[str, ...]
    system: str
    python: str
    libraries: dict[str, str]
    physical_cores: Some | None = None
    cpu_quota: NotNegative | None = None

    @property
    def has_int8_dot_product(self) -> bool:
        """Whether int8 products are summed in 32 bits; without it (AVX2) pairs of products saturate at 16 bits."""
        return bool(INT8_DOT_PRODUCTS & set(self.features))

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 numbers."""
        return bool({"AVX512-BF16", "AMX-bf16"} & set(self.features))


def read_cpus(root: Path = Path("/")) -> Cpus:
    """The CPUs of this process. Off Linux: all of the machine, hyper-threads taken for cores, and no quota.

    Args:
        root: where /proc/self and /sys/devices are read; mount points in /proc/self/mountinfo count from there, too.
    """
    cores = physical_cores(root)
    return Cpus(sum(map(len, cores)), len(cores), _cpu_quota(root))


def physical_cores(root: Path = Path("/")) -> tuple[tuple[int, ...], ...]:
    """The cores that this process may compute on, each as the numbers of its logical CPUs; where the kernel does not
    say, each CPU counts as one core."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: dict[str, list[int]] = {}
    for cpu in sorted(logical):
        names = ("core_cpus_list", "thread_siblings_list")  # the second is what kernels before 5.3 called it
        texts = (_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/{name}") for name in names)
        cores.setdefault(next(filter(None, texts), str(cpu)), []).append(cpu)
    return tuple(map(tuple, cores.values()))


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU limit of the control groups that this process is in, in CPUs, None without any.

    Version 2 has it in cpu.max ("200000 100000" or "max 100000": microseconds of CPU time a period), version 1 in
    cpu.cfs_quota_us (-1: no limit) and cpu.cfs_period_us; a limit holds for all groups below. In a container, groups
    above its own cannot be seen: its own is what is mounted, under whatever path /proc/self/cgroup names.
    See https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    limits = (_limit_of(group, is_v2) for group, is_v2 in _groups(root))
    return min((limit for limit in limits if limit is not None), default=None)


def throttled_s(root: Path = Path("/")) -> float:
    """Seconds that the control groups of this process have waited for their next period of CPU quota; 0 where the
    kernel does not say. It is in cpu.stat: throttled_usec in version 2, throttled_time (nanoseconds) in version 1."""
    unit_s = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
    lines = (line.split() for group, _ in _groups(root) for line in _read(group / "cpu.stat").splitlines())
    return sum(unit_s[name] * int(value) for name, value in lines if name in unit_s)


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still take: what the system has available, and no more than its control groups
    leave it. None where the kernel does not say."""
    lines = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    found = [1024 * int(lines["MemAvailable"].split()[0])] if "MemAvailable" in lines else []
    for group, is_v2 in _groups(root, "memory"):
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read(group / name) for name in names)
        if limit.isdigit() and used.isdigit():  # not "max"
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _groups(root: Path, controller: str = "cpu") -> Iterator[tuple[Path, bool]]:
    """The folders of the control groups that this process is in, outer ones first; and whether each is version 2."""
    for mount_root, mount_point, is_v2 in _cgroup_mounts(_read(root / "proc/self/mountinfo"), controller):
        path = _path_of_group(_read(root / "proc/self/cgroup"), is_v2, controller)
        if path is None:
            continue
        below = PurePosixPath(path)
        if below.is_relative_to(mount_root):  # else the path is that of another namespace: the mount is our group
            below = below.relative_to(mount_root)
        parts = [part for part in below.parts if part not in ("/", "..")]
        top = root / mount_point.lstrip("/")
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), is_v2


def _cgroup_mounts(mountinfo: str, controller: str) -> Iterator[tuple[str, str, bool]]:
    """Of each mount that may hold limits of this kind: the group at its top, the mount point, and whether it is
    version 2."""
    for line in mountinfo.splitlines():
        fields, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        group, point = (field.replace("\\040", " ") for field in [*fields.split(), *[""] * 5][3:5])
        if kind == "cgroup2":
            yield group, point, True
        elif kind == "cgroup" and controller in options.split(","):
            yield group, point, False


def _path_of_group(cgroup: str, is_v2: bool, controller: str) -> str | None:
    """The path of this process's group from lines `ID:CONTROLLERS:PATH`; version 2 has ID 0 and no controllers."""
    for line in cgroup.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if (number == "0" and not controllers) if is_v2 else controller in controllers.split(","):
            return path
    return None


def _limit_of(group: Path, is_v2: bool) -> float | None:
    names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    numbers = " ".join(_read(group / name) for name in names).split()
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):  # "max", -1, or no such file
        return None
    quota, period = map(int, numbers)
    return quota / period if quota and period else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def read_host(threads: int | None, cpuinfo: Path = Path("/proc/cpuinfo"), cpus: Cpus | None = None) -> Host:
    """Read the facts. Off Linux the features are unknown, and the tuple is empty.

    Args:
        threads: those of the stages; None: one a physical core, and no more than the CPU quota.
        cpus: None: those of this process.
    """
    facts, cpus = _first_processor(cpuinfo), cpus or read_cpus()
    flags = facts.get("flags", facts.get("Features", "")).split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Host(
        cpu=facts.get("model name") or platform.processor() or platform.machine(),
        cores=cpus.logical,
        threads=threads or cpus.threads,
        memory_gb=round(pages / 1e9, 1),
        features=tuple(name for flag, name in FEATURES.items() if flag in flags),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=sys.version.split()[0],
        libraries={name: found for name in LIBRARIES if (found := _version(name))},
        physical_cores=cpus.physical,
        cpu_quota=cpus.quota,
    )


def check_bf16(option: str) -> None:
    """Raise InputError where this CPU does not multiply bf16 numbers, which `option` asks for."""
    if not (host := read_host(1)).has_bf16:
        raise InputError(f"{option}: {host.cpu} has no bf16 instructions")


def _version(library: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def too_many_threads(host: Host) -> str | None:
    """A warning where more threads run than the CPUs or the quota can; None where they fit."""
    cpus = Cpus(host.cores, host.physical_cores or host.cores, host.cpu_quota)
    if host.threads <= cpus.most_busy:
        return None
    what = f"the CPU quota of {host.cpu_quota:g}" if host.cpu_quota and host.cpu_quota < host.cores else "the CPUs"
    return (
        f"{host.threads} threads are more than {what} can run at once ({host.cores} logical CPUs, "
        f"{cpus.physical} cores): they stall, and times are no measure; --threads {cpus.threads} or auto"
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
