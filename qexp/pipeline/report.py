"""The report on a job, as files: written from what the stages have found, and copied to `output_dir`."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from qexp.progress import say
from qexp.report.page import Origin, write_report
from qexp.report.results import Evidence
from qexp.tracking import runs as tracking
from qexp.tracking.results import WrittenReport


def report(evidence: Evidence, folder: Path, output_dir: str | None, run_id: str | None) -> WrittenReport:
    """Write the report to `folder`/report and copy it to `output_dir`, if that is set.

    `run_id` is the job's run, which the report names; None: the active run.
    """
    place = folder / "report"
    shutil.rmtree(place, ignore_errors=True)
    date, owner = datetime.now(UTC).date().isoformat(), run_id or tracking.active_run_id()
    write_report(evidence, place, Origin(date, owner, tracking.run_page(owner)))
    if output_dir:  # it is there whatever becomes of the store
        _copy(place, output_dir)
    return WrittenReport(evidence.int8.version_uri)


def copy_report(report_uri: str, output_dir: str | None) -> None:
    """Copy a report that is logged already to `output_dir`, if that is set."""
    if output_dir:
        with tracking.downloaded(report_uri.rpartition("/")[0]) as folder:
            _copy(folder, output_dir)


def _copy(folder: Path, output_dir: str) -> None:
    """Under `mlflow run` a relative path leads to the project's folder, so the whole one is said."""
    target = Path(output_dir).absolute()
    shutil.copytree(folder, target, dirs_exist_ok=True)
    say(f"a copy of the report is in {target}")
