"""A temporary PostgreSQL server for tests, from Debian's package."""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path("/usr/lib/postgresql")  # Debian: one folder a major version
USER = "postgres"  # comes with the package; the programs refuse to run as root
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
START_S, STOP_S = 60, 30
# Nothing of it is kept: no waiting for the disk.
OPTIONS = ["-h", "127.0.0.1", "-k", "", "-c", "fsync=off", "-c", "full_page_writes=off"]


def installed() -> bool:
    """Whether PostgreSQL is there."""
    return any(PROGRAMS.glob("*/bin/initdb"))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def start_postgres(folder: Path) -> Iterator[str]:
    """The URL (postgresql://…) of a new database on a free port; the server is stopped and removed at the end.

    `folder` is where the cluster is made, but for root: PostgreSQL then runs as the user postgres, who cannot reach
    pytest's folders, and the cluster is in a temporary folder of the system. Its superuser has a password, since every
    user of a machine can reach 127.0.0.1. Should this process be killed, the server ends too. The test is skipped where
    PostgreSQL is not installed.
    """
    if not installed():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    programs = max(PROGRAMS.glob("*/bin/initdb"), key=lambda file: int(file.parent.parent.name)).parent
    place = Path(tempfile.mkdtemp(prefix="qexp-postgres-", dir=None if os.geteuid() == 0 else folder))
    password, port = secrets.token_hex(16), free_port()
    try:
        cluster = _make_cluster(programs, place, password)
        command = [str(programs / "postgres"), "-D", str(cluster), "-p", str(port), *OPTIONS]
        with (place / "server.log").open("a") as log:
            server = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent, **_unprivileged()
            )
        try:
            address = ["-h", "127.0.0.1", "-p", str(port), "-U", USER]
            _wait_until_ready([str(programs / "pg_isready"), "-q", *address], server, place / "server.log")
            _run([str(programs / "createdb"), *address, "qexp"], env=os.environ | {"PGPASSWORD": password})
            yield f"postgresql://{USER}:{password}@127.0.0.1:{port}/qexp"
        finally:
            _stop(server)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _make_cluster(programs: Path, place: Path, password: str) -> Path:
    cluster, file = place / "cluster", place / "password"
    cluster.mkdir(mode=0o700)
    file.touch(mode=0o600)
    file.write_text(f"{password}\n")
    if os.geteuid() == 0:
        place.chmod(0o755)
        for path in (cluster, file):
            shutil.chown(path, USER, USER)
    options = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync", "-U", USER]
    _run([str(programs / "initdb"), "-D", str(cluster), *options, f"--pwfile={file}"])
    file.unlink()
    return cluster


def _unprivileged() -> dict[str, Any]:
    """How to start PostgreSQL's programs: root does it as the package's own user."""
    as_user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    return {"cwd": "/", "stdin": subprocess.DEVNULL, **as_user}


def _run(command: list[str], **more: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **_unprivileged(), **more)
    assert done.returncode == 0, done.stderr


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _wait_until_ready(question: list[str], server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while subprocess.run(question, **_unprivileged()).returncode:
        assert server.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """At once for its clients, with everything on disk; without that, if it does not come to an end."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        server.send_signal(number)
        try:
            server.wait(STOP_S)
            return
        except subprocess.TimeoutExpired:
            continue
