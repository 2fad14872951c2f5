"""Facts about the machine, read from files as x86 and ARM Linux write them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.measurement.host import LIBRARIES, Cpus, read_cpus, read_host, too_many_threads

X86 = """processor\t: 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 avx512vbmi

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n"


def _cpuinfo(folder: Path, text: str) -> Path:
    file = folder / "cpuinfo"
    file.write_text(text)
    return file


def test_x86_features_of_the_first_processor(tmp_path: Path) -> None:
    host = read_host(3, _cpuinfo(tmp_path, X86))
    assert host.cpu == "AMD EPYC 9R14"
    assert host.features == ("AVX2", "AVX512F", "AVX512-VNNI", "AVX512-BF16")
    assert host.threads == 3


def test_arm_features_have_another_key(tmp_path: Path) -> None:
    host = read_host(None, _cpuinfo(tmp_path, ARM))
    assert host.features == ("NEON-dotprod", "NEON-i8mm")
    assert host.cpu


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("avx2 avx512f", False),
        ("avx2 avx_vnni", False),  # torch's x86 kernels do not use it
        ("avx512_vnni", True),
        ("amx_int8", True),
        ("avx512_vnnix", False),
    ],
)
def test_int8_dot_product_follows_from_the_flags(tmp_path: Path, flags: str, has: bool) -> None:
    assert read_host(1, _cpuinfo(tmp_path, f"flags: {flags}\n")).has_int8_dot_product is has


def test_without_cpuinfo_the_features_are_unknown(tmp_path: Path) -> None:
    host = read_host(1, tmp_path / "absent")
    assert host.features == ()
    assert not host.has_int8_dot_product
    assert host.cpu


def test_this_machine() -> None:
    host = read_host(None)
    cpus = read_cpus()
    assert (host.cores, host.physical_cores, host.cpu_quota) == (cpus.logical, cpus.physical, cpus.quota)
    assert 1 <= host.threads == cpus.threads <= cpus.physical <= cpus.logical
    assert too_many_threads(host) is None
    assert host.memory_gb > 0
    assert set(host.libraries) == set(LIBRARIES)
    assert host.libraries["torch"].startswith("2.")
    assert host.system and host.python.count(".") == 2


def _lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "\n".join(
    [
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct",
        "33 31 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory",
    ]
)
V1_GROUPS = "5:memory:/elsewhere\n4:cpu,cpuacct:/pod/box\n0::/"
ON_V1 = {"proc/self/mountinfo": V1, "proc/self/cgroup": V1_GROUPS}
CPU_V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        pytest.param({}, None, id="no files"),
        pytest.param({"proc/self/mountinfo": V2, "proc/self/cgroup": "0::/"}, None, id="v2, the root has no cpu.max"),
        pytest.param(
            {
                "proc/self/mountinfo": V2,
                "proc/self/cgroup": "0::/user.slice/job",
                "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
                "sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000",
                "sys/fs/cgroup/other/cpu.max": "10000 100000",
            },
            1.5,
            id="v2, its own group",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": V2,
                "proc/self/cgroup": "0::/pod/box/inner",
                "sys/fs/cgroup/pod/cpu.max": "200000 50000",
                "sys/fs/cgroup/pod/box/cpu.max": "800000 100000",
                "sys/fs/cgroup/pod/box/inner/cpu.max": "max 100000",
            },
            4.0,
            id="v2, a group above",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": V2,
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/cpu.max": "200000 100000",
            },
            2.0,
            id="v2, a container with a namespace of its own",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": V2.replace(" / /sys", " /docker/abc /sys"),
                "proc/self/cgroup": "0::/docker/abc",
                "sys/fs/cgroup/cpu.max": "50000 100000",
            },
            0.5,
            id="v2, a container that sees the path of the host",
        ),
        pytest.param(
            ON_V1 | {f"{CPU_V1}/pod/box/cpu.cfs_quota_us": "-1", f"{CPU_V1}/pod/box/cpu.cfs_period_us": "100000"},
            None,
            id="v1, no limit",
        ),
        pytest.param(
            ON_V1
            | {
                f"{CPU_V1}/pod/box/cpu.cfs_quota_us": "-1",
                f"{CPU_V1}/pod/box/cpu.cfs_period_us": "100000",
                f"{CPU_V1}/pod/cpu.cfs_quota_us": "300000",
                f"{CPU_V1}/pod/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/elsewhere/cpu.cfs_quota_us": "1",
                "sys/fs/cgroup/memory/elsewhere/cpu.cfs_period_us": "100000",
            },
            3.0,
            id="v1, a group above",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": V1 + "\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
                "proc/self/cgroup": V1_GROUPS,
                f"{CPU_V1}/pod/box/cpu.cfs_quota_us": "100000",
                f"{CPU_V1}/pod/box/cpu.cfs_period_us": "100000",
            },
            1.0,
            id="both versions, the limit in v1",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": V1.replace(" / /sys/fs/cgroup/cpu", " /pod/box /sys/fs/cgroup/cpu"),
                "proc/self/cgroup": V1_GROUPS,
                f"{CPU_V1}/cpu.cfs_quota_us": "250000",
                f"{CPU_V1}/cpu.cfs_period_us": "100000",
            },
            2.5,
            id="v1, a container",
        ),
        pytest.param(
            {
                "proc/self/mountinfo": "garbage\n" + V2 + "\n - ",
                "proc/self/cgroup": "garbage\n0::/",
                "sys/fs/cgroup/cpu.max": "",
            },
            None,
            id="unreadable lines",
        ),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert read_cpus(_lay_out(tmp_path, files)).quota == quota


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyper_threads_share_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Four CPUs on two cores, as the kernel numbers them; only those of the affinity count."""
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    _lay_out(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in siblings.items()})
    for affinity, physical in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 3}, 2), ({2}, 1), ({0, 1, 2}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=affinity: cpus, raising=False)
        assert read_cpus(tmp_path) == Cpus(len(affinity), physical)


def test_without_affinity_and_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert read_cpus(tmp_path) == Cpus(6, 6)


@pytest.mark.parametrize(
    ("cpus", "threads", "most"),
    [
        (Cpus(64, 32), 32, 64),
        (Cpus(64, 32, 2.0), 2, 2),
        (Cpus(64, 32, 40.0), 32, 40),
        (Cpus(2, 2, 1.5), 1, 1),
        (Cpus(2, 1, 0.2), 1, 1),
        (Cpus(2, 2, 8.0), 2, 2),
    ],
)
def test_threads_within_cores_and_quota(cpus: Cpus, threads: int, most: int) -> None:
    assert (cpus.threads, cpus.most_busy) == (threads, most)
    host = read_host(None, cpus=cpus)
    assert host.threads == threads and (host.cores, host.physical_cores) == (cpus.logical, cpus.physical)
    assert too_many_threads(replace(host, threads=most)) is None
    warning = too_many_threads(replace(host, threads=most + 1))
    assert warning and f"{most + 1} threads are more than" in warning and f"--threads {threads} " in warning
    limited = cpus.quota is not None and cpus.quota < cpus.logical
    assert ("the CPU quota of" in warning) is limited
