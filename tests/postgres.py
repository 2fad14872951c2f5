"""A temporary PostgreSQL server for tests, from Debian's package."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qexp.postgres import PROGRAMS, running_cluster


def installed() -> bool:
    """Whether PostgreSQL is there."""
    return any(PROGRAMS.glob("*/bin/initdb"))


def skip_unless_installed() -> None:
    """Skip the test that calls it, with a word on what is missing, where PostgreSQL is not there."""
    if not installed():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")


@contextmanager
def start_postgres(folder: Path) -> Iterator[str]:
    """The URL (postgresql://…) of a new database on a free port; the server is stopped and removed at the end.

    `folder` is where the cluster is made, but for root: PostgreSQL then runs as the user postgres, who cannot reach
    pytest's folders, and the cluster is in a temporary folder of the system. The test is skipped where PostgreSQL is
    not installed.
    """
    skip_unless_installed()
    place = Path(tempfile.mkdtemp(prefix="qexp-postgres-", dir=None if os.geteuid() == 0 else folder))
    place.chmod(0o755)
    try:
        with running_cluster(place / "cluster", durable=False) as url:
            yield url
    finally:
        shutil.rmtree(place, ignore_errors=True)
