"""The tracking server of `make server`: MLflow on 127.0.0.1, with a database and an artifact folder behind it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO

from qexp.errors import InputError, StageError
from qexp.postgres import running_cluster
from qexp.progress import say

START_S, STOP_S = 180, 20  # the first start makes the tables


def serve(port: int, backend_store_uri: str | None, cluster: Path, artifacts: str, options: Sequence[str] = ()) -> None:
    """Serve until SIGINT or SIGTERM comes, or until the server ends by itself.

    Args:
        backend_store_uri: a database that is there; None: a PostgreSQL cluster in the folder `cluster`, made if need
            be, started now and stopped at the end.
        artifacts: the folder, or the s3:// address, where the server keeps artifacts.
        options: more options of `mlflow server`.

    Raises:
        InputError: the port is in use, or there is no PostgreSQL.
        StageError: database or server do not start, or the server has ended.
    """
    _check_port(port)  # before the database, which another of these servers may have
    database: AbstractContextManager[str] = running_cluster(cluster) if not backend_store_uri else nullcontext("")
    try:
        with (
            database as own,
            running_server(own or backend_store_uri or "", artifacts, port, options) as (url, process),
        ):
            say(f"MLflow is at {url}; artifacts are in {artifacts}, the database is {'yours' if not own else cluster}")
            say(f"In another shell: export MLFLOW_TRACKING_URI={url}")
            say("Ctrl-C stops it" + (", and the database." if own else "."))
            code = process.wait()
            raise StageError(f"mlflow server has ended with exit code {code}; see the lines above")
    except (KeyboardInterrupt, SystemExit):
        say("stopped")


@contextmanager
def running_server(
    backend_store_uri: str, artifacts: str, port: int, options: Sequence[str] = (), log: IO[str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`mlflow server` on 127.0.0.1, answering: its URL and process. All of its processes end with the block.

    `log` takes what it says; None: standard error.

    Raises:
        InputError: the port is in use.
        StageError: it does not start.
    """
    _check_port(port)
    command = [sys.executable, *f"-m mlflow server --host 127.0.0.1 --port {port}".split()]
    command += ["--artifacts-destination", artifacts, *options]
    # The URI has a password: other users of the machine can read command lines, but not environments.
    own = {"MLFLOW_BACKEND_STORE_URI": backend_store_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | own
    process = subprocess.Popen(
        command, env=environment, stdout=log or sys.stderr, stderr=log or sys.stderr, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(f"{url}/health", process)
        yield url, process
    finally:
        stop_group(process)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used on 127.0.0.1 ({error.strerror}); name another") from None


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise StageError(f"mlflow server has ended with exit code {process.returncode}; see the lines above")
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError:  # it asks who we are
            return
        except OSError:
            time.sleep(0.3)
    raise StageError(f"mlflow server does not answer at {url} after {START_S} s")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
