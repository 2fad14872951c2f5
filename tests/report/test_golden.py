"""Whole reports, as a person reads them: golden/*.md. `UPDATE_GOLDEN=1 python -m pytest tests/report/test_golden.py`
writes them anew; read the difference before it is committed."""

import os
from pathlib import Path

import pytest
from cases import CASES, ORIGIN

from qexp.report.page import render_markdown
from qexp.report.results import Evidence

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", CASES)
def test_report_is_the_one_that_was_read(evidence: Evidence, name: str) -> None:
    file, text = GOLDEN / f"{name}.md", render_markdown(CASES[name](evidence), ORIGIN)
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_each_golden_file_has_a_case() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)
