"""What is said where ranges are reduced; the stage itself is in test_jobs.py."""

from pathlib import Path

import pytest

from qexp.measurement.host import read_host
from qexp.pipeline.quantize import warn_of_reduced_range


@pytest.mark.parametrize(("flags", "warned"), [("avx2 avx_vnni", True), ("avx2 avx512f avx512_vnni", False)])
def test_a_cpu_whose_products_saturate_is_named(
    tmp_path: Path, flags: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name: A CPU\nflags: {flags}\n")
    warn_of_reduced_range(read_host(1, file))
    said = capsys.readouterr().err
    assert said.startswith("warning: A CPU has no int8 dot product: sums of two products") is warned
    assert ("so all weights have 7 bits" in said) is warned
