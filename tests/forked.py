"""`qexp` in processes that need not import torch and MLflow first, which takes seconds: forks of one that has.

As a program, this is that one: it reads a request a line and answers with the process id of a fork.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Nothing here computes when it is imported: threads do not survive a fork.
IMPORTS = (
    "qexp.pipeline", "qexp.search", "qexp.prediction", "qexp.promotion", "qexp.sync", "qexp.verification",
    "qexp.vision", "matplotlib.figure", "mlflow.onnx", "mlflow.pytorch", "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store", "sklearn.datasets", "torch.export", "torchvision.models",
    "torch.distributed.elastic.multiprocessing",
)  # fmt: skip
_files = tempfile.TemporaryDirectory(prefix="qexp-")
_lock = threading.Lock()
_server: list[subprocess.Popen[str]] = []


@dataclass
class Forked:
    """A process that runs `qexp`; what it writes, and its exit code, are in files of `folder`."""

    arguments: tuple[str, ...]
    folder: Path
    pid: int = 0
    _read: int = field(default=0, repr=False)

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def returncode(self) -> int:
        code = self.poll()
        assert code is not None, "still running"
        return code

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as the process runs."""
        file = self.folder / "code"
        return int(file.read_text()) if file.exists() else None

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
            ended = self.poll() is not None
            said = self.stderr
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
    process = Forked(arguments, Path(tempfile.mkdtemp(dir=_files.name)))
    for name in ("out", "err"):
        (process.folder / name).touch()
    request = {"folder": str(folder), "arguments": arguments, "environment": environment, "before": before}
    with _lock:
        server = _started()
        assert server.stdin and server.stdout
        print(json.dumps(request | {"files": str(process.folder)}), file=server.stdin, flush=True)
        process.pid = int(server.stdout.readline())
    return process


def _started() -> subprocess.Popen[str]:
    if not _server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": str(REPOSITORY),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        command = [sys.executable, str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _server.append(subprocess.Popen(command, **pipes, text=True, env=environment, cwd=REPOSITORY))  # type: ignore[call-overload]
        atexit.register(_server[0].kill)
    return _server[0]


def _become(request: dict[str, object], made: dict[str, str]) -> None:
    """In the fork: what a process started for this command would find; `made` are variables that importing has set."""
    os.setsid()
    os.chdir(str(request["folder"]))
    files, write = str(request["files"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file, flags in ((0, os.devnull, os.O_RDONLY), (1, f"{files}/out", write), (2, f"{files}/err", write)):
        descriptor = os.open(file, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(made | request["environment"])  # type: ignore[operator]
    sys.argv = ["qexp", *request["arguments"]]  # type: ignore[misc]


def _run(request: dict[str, object], made: dict[str, str]) -> int:
    from entrypoints.cli import main_program

    try:
        _become(request, made)
        exec(str(request["before"]), {"__name__": "before"})
        main_program()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _keep(request: dict[str, object], made: dict[str, str]) -> None:
    """The fork's parent: says its process id, and writes down how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        code = _run(request, made)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    code_file = Path(str(request["files"]), "code")
    code_file.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    code_file.with_suffix(".new").rename(code_file)


def _import_everything() -> dict[str, str]:
    """What commands import on their way; the variables that this sets."""
    before = set(os.environ)
    for name in IMPORTS:
        importlib.import_module(name)
    return {name: value for name, value in os.environ.items() if name not in before}


def _serve() -> None:
    made = _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                _keep(json.loads(line), made)
            finally:
                os._exit(0)  # libraries wait at their end for threads that no fork has


if __name__ == "__main__":
    _serve()
