"""A real `mlflow server` for tests, on a free port, that can be killed and started again."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from postgres import free_port
from stores import new_store

START_S, STOP_S = 180, 20


@dataclass
class Server:
    """SQLite in its folder unless `store` names a database, artifacts in `artifacts` there."""

    folder: Path
    store: str = ""
    artifacts: Path | None = None
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, stack: ExitStack) -> None:
        """Start it, or start it again; it ends with `stack`."""
        log = stack.enter_context((self.folder / "server.log").open("a"))
        store = self.store or new_store(self.folder)
        artifacts = str(self.artifacts or self.folder / "artifacts")
        running = _running_server(store, artifacts, self.port, ["--workers", "1", *self.options], log)
        self.pid = stack.enter_context(running)[1].pid

    def kill(self) -> None:
        """SIGKILL for it and all that it has started."""
        os.killpg(self.pid, signal.SIGKILL)


@contextmanager
def start_server(folder: Path, store: str = "", artifacts: Path | None = None, *options: str) -> Iterator[Server]:
    """A server that answers."""
    server = Server(folder, store, artifacts, options)
    with ExitStack() as stack:
        server.start(stack)
        yield server


@contextmanager
def _running_server(
    store: str, artifacts: str, port: int, options: Sequence[str], log: IO[str]
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """`mlflow server` on 127.0.0.1, answering: its URL and process. All of its processes end with the block."""
    command = [sys.executable, *f"-m mlflow server --host 127.0.0.1 --port {port}".split()]
    command += ["--artifacts-destination", artifacts, *options]
    own = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | own
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(url, process)
        yield url, process
    finally:
        stop_group(process)


def wait_until_it_answers(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Until a server of MLflow answers at all: one that asks who we are does."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the server has ended with exit code {process.returncode}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no answer at {url} after {START_S} s")


def stop_group(process: "subprocess.Popen[bytes]", first: signal.Signals = signal.SIGTERM) -> None:
    """End a process that leads a session, and all that it has started."""
    for number in (first, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
