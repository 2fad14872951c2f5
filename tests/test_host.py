"""Facts about the machine, read from files as x86 and ARM Linux write them."""

from pathlib import Path

import pytest

from qexp.host import LIBRARIES, available_cores, read_host

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
    assert host.threads == host.cores == available_cores() >= 1
    assert host.memory_gb > 0
    assert set(host.libraries) == set(LIBRARIES)
    assert host.libraries["torch"].startswith("2.")
    assert host.system and host.python.count(".") == 2
