"""A real `mlflow server` for tests, on a free port, that can be killed and started again."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from forked import REPOSITORY, Forked, start_python
from postgres import free_port
from stores import new_store

START_S, STOP_S = 180, 20
# `mlflow server` starts uvicorn as a program of its own: here, in the process that has MLflow, which takes ten seconds.
UVICORN_IN_PLACE = """
import os, runpy, sys
import uvicorn  # before MLflow, which then knows that it serves
import mlflow.server

def run(command, extra_env=None, **options):
    os.environ.update(extra_env or {})
    sys.argv = command[2:]
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)

mlflow.server._exec_cmd = run
"""


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
        arguments = f"server --host 127.0.0.1 --port {self.port} --workers 1 --artifacts-destination".split()
        words = ("-m", "mlflow", *arguments, str(self.artifacts or self.folder / "artifacts"), *self.options)
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment["MLFLOW_BACKEND_STORE_URI"] = self.store or new_store(self.folder)
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        log = str(self.folder / "server.log")
        process = start_python(self.folder, words, environment, UVICORN_IN_PLACE, written=(log, log))
        self.pid = process.pid
        stack.callback(_end, process)
        wait_until_it_answers(self.url, process)

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


def command_of_make(port: int) -> list[str]:
    """`make server`, without `setup`, which would make an environment; in any folder."""
    return [
        "make",
        "--no-print-directory",
        "--file",
        str(REPOSITORY / "Makefile"),
        "--assume-old",
        "setup",
        "server",
        f"PORT={port}",
    ]


@contextmanager
def make_server(folder: Path, **variables: str) -> Iterator[str]:
    """The address of `make server`, which runs in `folder` as its users start it, with these variables in its
    environment. Ctrl-C ends it and leaves no process."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"SERVER_OPTIONS": "--workers 1", "MLFLOW_DISABLE_TELEMETRY": "true", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "server.log").open("w") as log:
        command = command_of_make(port)
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_it_answers(f"http://127.0.0.1:{port}", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop_group(server, signal.SIGINT)  # as the terminal does: to all of the group
    left = [line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if line.exists()]
    assert not [line for line in left if str(port).encode() in line]


def _end(process: Forked) -> None:
    """End it, and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def wait_until_it_answers(url: str, process: "subprocess.Popen[bytes] | Forked") -> None:
    """Until a server of MLflow answers at all: one that asks who we are does."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert (code := process.poll()) is None, f"the server has ended with exit code {code}"
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
