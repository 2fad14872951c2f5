"""A PostgreSQL server of one's own, from Debian's package: made in a folder, started on 127.0.0.1, stopped at the end.

It is nobody's service: whoever starts it is the one that stops it. Its superuser has a password, since every user of a
machine can reach 127.0.0.1, and a superuser of PostgreSQL can start programs.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qexp.errors import InputError, StageError

PROGRAMS = Path("/usr/lib/postgresql")  # Debian: one folder a major version
SERVICE_USER = "postgres"  # comes with the package; the programs refuse to run as root
PASSWORD = "qexp-password"  # file in the cluster's folder
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
START_S, STOP_S = 60, 30


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_cluster(folder: Path, port: int | None = None, durable: bool = True) -> Iterator[str]:
    """Make the cluster in `folder` unless it is there, start it, yield the URL of its database `qexp`, and stop it.

    Root hands the folder to the user postgres, who must be able to reach it. Should this process be killed, the server
    ends too. What the server says is in `<folder>.log`.

    Args:
        port: of 127.0.0.1; None takes a free one.
        durable: False does not wait for the disk: for a cluster that is thrown away.

    Raises:
        InputError: PostgreSQL is not installed, or the folder is no place for a cluster.
        StageError: the server does not start; the message ends with what it said.
    """
    folder = folder.resolve()
    programs = _programs(folder)
    if not (folder / "PG_VERSION").exists():
        _make_cluster(programs, folder)
    port = port or free_port()
    command = [str(programs / "postgres"), "-D", str(folder), "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    command += [] if durable else ["-c", "fsync=off", "-c", "full_page_writes=off"]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as lines:
        server = subprocess.Popen(
            command, stdout=lines, stderr=lines, start_new_session=True, preexec_fn=_end_with_parent, **_unprivileged()
        )
    try:
        address = ["-h", "127.0.0.1", "-p", str(port), "-U", SERVICE_USER]
        _wait_until_ready([str(programs / "pg_isready"), "-q", *address], server, log)
        password = (folder / PASSWORD).read_text().strip()
        _make_database([str(programs / "createdb"), *address, "qexp"], password)
        yield f"postgresql://{SERVICE_USER}:{password}@127.0.0.1:{port}/qexp"
    finally:
        _stop(server)


def _programs(folder: Path) -> Path:
    """The folder of PostgreSQL's programs: those that made the cluster, or the newest."""
    wanted = (folder / "PG_VERSION").read_text().strip() if (folder / "PG_VERSION").exists() else "*"
    found = sorted(PROGRAMS.glob(f"{wanted}/bin/initdb"), key=lambda file: int(file.parent.parent.name))
    if not found:
        version = "" if wanted == "*" else f"-{wanted}, which made {folder},"
        raise InputError(f"PostgreSQL{version} is not installed in {PROGRAMS}: apt-get install postgresql{version[:3]}")
    return found[-1].parent


def _unprivileged() -> dict[str, Any]:
    """How to start PostgreSQL's programs: root does it as the package's own user."""
    as_user = {"user": SERVICE_USER, "group": SERVICE_USER, "extra_groups": []} if os.geteuid() == 0 else {}
    return {"cwd": "/", "stdin": subprocess.DEVNULL, **as_user}


def _make_cluster(programs: Path, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: neither empty nor a PostgreSQL cluster")
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(folder, SERVICE_USER, SERVICE_USER)
    folder.chmod(0o700)
    if subprocess.run(["ls", str(folder)], capture_output=True, **_unprivileged()).returncode:
        raise InputError(
            f"{folder}: the user {SERVICE_USER}, who runs PostgreSQL for root, cannot reach this folder; set "
            "POSTGRES_DIR to one that it can"
        )
    password = folder.with_name(f".{folder.name}.password")
    options = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync", "-U", SERVICE_USER]
    try:
        password.touch(mode=0o600)
        password.write_text(f"{secrets.token_hex(16)}\n")
        if os.geteuid() == 0:
            shutil.chown(password, SERVICE_USER)
        command = [str(programs / "initdb"), "-D", str(folder), *options, f"--pwfile={password}"]
        done = subprocess.run(command, capture_output=True, text=True, **_unprivileged())
        if done.returncode:
            raise StageError(f"{folder}: PostgreSQL's initdb failed: {' '.join(done.stderr.split())}")
        password.replace(folder / PASSWORD)
    finally:
        password.unlink(missing_ok=True)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _wait_until_ready(question: list[str], server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while subprocess.run(question, **_unprivileged()).returncode:
        if server.poll() is not None or time.monotonic() > end:
            said = [line for line in log.read_text().splitlines() if "FATAL" in line or "HINT" in line]
            raise StageError(f"PostgreSQL does not start ({' '.join(said) or 'no answer'}); see {log}")
        time.sleep(0.1)


def _make_database(command: list[str], password: str) -> None:
    environment = os.environ | {"PGPASSWORD": password, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **_unprivileged())
    if done.returncode and "already exists" not in done.stderr:
        raise StageError(f"PostgreSQL makes no database: {' '.join(done.stderr.split())}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """At once for its clients, with everything on disk; without that, if it does not come to an end."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        server.send_signal(number)
        try:
            server.wait(STOP_S)
            return
        except subprocess.TimeoutExpired:
            continue
