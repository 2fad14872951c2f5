"""Python programs in processes that need not import torch and MLflow first, which takes seconds.

They are forks of two that have: one that knows qexp too, for its commands and its latency sweep, and one that does not,
for the bare processes in which qexp verifies a model. As a program, this is such a one: `forked.py SOCKET MODULE...`.
"""

import atexit
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# None of these computes when it is imported: threads do not survive a fork.
BARE = (
    "mlflow.pyfunc", "mlflow.pytorch", "mlflow.onnx", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store", "onnxruntime", "torch.export.pt2_archive", "torch.export._trace",
    "sqlalchemy.dialects.sqlite",
)  # fmt: skip
WITH_QEXP = (
    *BARE, "qexp.pipeline.jobs", "qexp.search", "qexp.pipeline.predict", "qexp.pipeline.promote",
    "qexp.pipeline.verify",
    "qexp.models.vision", "matplotlib.figure", "sklearn.datasets", "torchvision.models",
    "torch.distributed.elastic.multiprocessing", "entrypoints.options",
)  # fmt: skip
_files = tempfile.TemporaryDirectory(prefix="qexp-")


@dataclass
class Forked:
    """A process that runs `qexp`; what it writes is in files of `folder`."""

    arguments: tuple[str, ...]
    folder: Path
    connection: socket.socket
    pid: int
    _code: int | None = field(default=None, repr=False)
    _read: int = field(default=0, repr=False)

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as the process runs."""
        if self._code is None and select.select([self.connection], [], [], 0)[0]:
            self._code = _number(self.connection)
        return self._code

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code; after `timeout_s`, the process and all that it has started are killed."""
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["qexp", *self.arguments], timeout_s, self.stdout, self.stderr)
            time.sleep(0.01)
        return code

    def wait_for_line(self, text: str) -> str:
        """The next line on standard error that has `text` in it, after the one that the last call returned."""
        while True:
            ended, said = self.poll() is not None, self.stderr
            while (end := said.find("\n", self._read)) >= 0:
                line, self._read = said[self._read : end], end + 1
                if text in line:
                    return line
            assert not ended, f"ended without {text!r}: {said}"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL, and wait until it is gone."""
        self.send_signal(signal.SIGKILL)
        return self.wait()


def start_forked(folder: Path, arguments: tuple[str, ...], environment: dict[str, str], before: str = "") -> Forked:
    """Start `qexp ARGUMENTS` in `folder`; `before` is Python that the process runs first."""
    files, servers = Path(tempfile.mkdtemp(dir=_files.name)), _started()
    connection = _ask(
        servers["QEXP_SERVER"], folder=str(folder), command=["-m", "entrypoints.cli", *arguments], before=before,
        environment=environment | servers, out=str(files / "out"), err=str(files / "err"),
    )  # fmt: skip
    return Forked(arguments, files, connection, _number(connection))


@lru_cache
def _started() -> dict[str, str]:
    """The sockets of both servers, by the variables that name them; they are started here."""
    places = {name: str(Path(_files.name, name)) for name in ("QEXP_SERVER", "BARE_SERVER")}
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    given |= {"MLFLOW_DISABLE_TELEMETRY": "true", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(REPOSITORY)}
    processes = []
    for name, imports in (("QEXP_SERVER", WITH_QEXP), ("BARE_SERVER", BARE)):
        command = [sys.executable, str(Path(__file__).resolve()), places[name], *imports]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=given, cwd=_files.name))
        atexit.register(processes[-1].kill)
    for process in processes:
        assert process.stdout and process.stdout.readline() == b"ready\n"
    return places


def _ask(server: str, **request: Any) -> socket.socket:
    """A connection on which the process id and, later, the exit code come, a line each."""
    for name in ("out", "err"):
        Path(request[name]).touch()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def _number(connection: socket.socket) -> int:
    line = b""
    while not line.endswith(b"\n") and (more := connection.recv(1)):
        line += more
    return int(line) if line else -signal.SIGKILL


def children_are_forks() -> None:
    """What qexp starts from this process, for sweeps and verifications, is a fork as well."""
    ours = SimpleNamespace(run=_run_forked, DEVNULL=subprocess.DEVNULL)
    for module in ("qexp.measurement.sweep", "qexp.tracking.clean_process"):
        importlib.import_module(module).subprocess = ours  # type: ignore[attr-defined]


def run_apart(test: Callable[..., None], *arguments: object) -> None:
    """Call a function of a test module in a process of its own, whose memory ends with it; what it raises is an
    AssertionError here. Arguments are plain values."""
    call = f"import {test.__module__}; {test.__module__}.{test.__name__}(*{arguments!r})"
    folders = [str(Path(inspect.getfile(test)).parent), str(REPOSITORY / "tests")]
    words = ["-c", f"import sys; sys.path[:0] = {folders!r}; {call}"]
    with tempfile.TemporaryDirectory() as name:
        out, err = f"{name}/out", f"{name}/err"
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(importlib.import_module("torch").get_num_threads())}
        connection = _ask(
            _started()["QEXP_SERVER"], folder=os.getcwd(), command=words, environment=environment, before="",
            out=out, err=err,
        )  # fmt: skip
        _, code_of_exit = _number(connection), _number(connection)
        assert code_of_exit == 0, Path(err).read_text()


def _run_forked(command: list[str], env: dict[str, str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Stands for `subprocess.run` of a Python program."""
    words = command[3:]  # without the interpreter, which is told to give no warnings
    name = "QEXP_SERVER" if words[0] == "-m" else "BARE_SERVER"
    server = os.environ.get(name) or _started()[name]
    with tempfile.TemporaryDirectory() as name:
        ours = f"/proc/{os.getpid()}/fd/2"
        out, err = (f"{name}/out", f"{name}/err") if options.get("capture_output") else (ours, ours)
        connection = _ask(server, folder=os.getcwd(), command=words, environment=env, before="", out=out, err=err)
        _, code = _number(connection), _number(connection)
        captured = [Path(file).read_text() for file in (out, err)] if out != ours else [None, None]
    return subprocess.CompletedProcess(command, code, *captured)


def _become(request: dict[str, Any], made: dict[str, str]) -> None:
    """In the fork: what a process started for this would find; `made` are variables that importing has set."""
    os.setsid()
    os.chdir(request["folder"])
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], write), (2, request["err"], write)):
        descriptor = os.open(file, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(made | request["environment"])
    if threads := os.environ.get("OMP_NUM_THREADS"):  # which OpenMP reads when torch is imported
        sys.modules["torch"].set_num_threads(int(threads))
    kind, what, *arguments = request["command"]
    sys.argv = [{"-m": what, "-c": "-c"}[kind], *arguments]
    sys.path[0] = ""


def _run(request: dict[str, Any], made: dict[str, str]) -> int:
    try:
        _become(request, made)
        if "qexp.measurement.sweep" in sys.modules:
            children_are_forks()
        exec(request["before"], {"__name__": "before"})
        kind, what, *_ = request["command"]
        if what in sys.modules:
            warnings.simplefilter("ignore")  # as the command says, and of its being there already
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _keep(connection: socket.socket, made: dict[str, str]) -> None:
    """The fork's parent: says its process id, waits for it, and says how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.makefile("rb").readline())
    child = os.fork()
    if child == 0:
        connection.close()
        code = _run(request, made)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    connection.sendall(f"{child}\n".encode())
    connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())


def _serve(place: str, imports: list[str]) -> None:
    before = set(os.environ)
    for name in imports:
        importlib.import_module(name)
    made = {name: value for name, value in os.environ.items() if name not in before}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                try:
                    listener.close()
                    _keep(connection, made)
                finally:
                    os._exit(0)  # libraries wait at their end for threads that no fork has
            connection.close()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
