"""The report on a job, as files: written from what the stages have found, and copied to `output_dir`."""

import shutil
from pathlib import Path

from qexp.report.page import write_report
from qexp.report.results import Evidence
from qexp.tracking import runs as tracking
from qexp.tracking.results import WrittenReport


def report(evidence: Evidence, folder: Path, output_dir: str | None) -> WrittenReport:
    """Write the report to `folder`/report and copy it to `output_dir`, if that is set."""
    place = folder / "report"
    shutil.rmtree(place, ignore_errors=True)
    write_report(evidence, place)
    if output_dir:  # it is there whatever becomes of the store
        shutil.copytree(place, output_dir, dirs_exist_ok=True)
    return WrittenReport(evidence.int8.version_uri)


def copy_report(report_uri: str, output_dir: str | None) -> None:
    """Copy a report that is logged already to `output_dir`, if that is set."""
    if output_dir:
        with tracking.downloaded(report_uri.rpartition("/")[0]) as folder:
            shutil.copytree(folder, output_dir, dirs_exist_ok=True)
