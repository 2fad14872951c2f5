"""`qexp` in processes that need not import torch and MLflow first, which takes seconds: forks of one that has.

As a program, this is that one: it reads a request a line and answers with the exit code.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
_lock = threading.Lock()
_server: list[subprocess.Popen[str]] = []


def run_forked(
    folder: Path, arguments: tuple[str, ...], environment: dict[str, str], timeout_s: float
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `qexp ARGUMENTS` in `folder`."""
    with _lock, tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        request = {"folder": str(folder), "arguments": arguments, "environment": environment, "timeout_s": timeout_s}
        server = _started()
        assert server.stdin and server.stdout
        print(json.dumps(request | {"out": str(out), "err": str(err)}), file=server.stdin, flush=True)
        code = json.loads(server.stdout.readline())
        found = int(code), out.read_text(), err.read_text()
    if found[0] == -signal.SIGKILL:
        raise subprocess.TimeoutExpired(["qexp", *arguments], timeout_s, found[1], found[2])
    return found


def _started() -> subprocess.Popen[str]:
    if not _server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": str(REPOSITORY),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        command = [sys.executable, str(Path(__file__).resolve())]
        _server.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
            )
        )
        atexit.register(_server[0].kill)
    return _server[0]


def _become(request: dict[str, object], made: dict[str, str]) -> None:
    """In the fork: what a process started for this command would find; `made` are variables that importing has set."""
    os.setsid()
    os.chdir(str(request["folder"]))
    for number, file, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], 0), (2, request["err"], 0)):
        descriptor = os.open(str(file), flags or os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(made | request["environment"])  # type: ignore[operator]
    sys.argv = ["qexp", *request["arguments"]]  # type: ignore[misc]


def _serve() -> None:
    before = set(os.environ)
    import qexp.pipeline  # noqa: F401
    from entrypoints.cli import main_program

    made = {name: value for name, value in os.environ.items() if name not in before}
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _become(request, made)
                main_program()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
            except BaseException:
                traceback.print_exc()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # libraries wait at their end for threads that no fork has
        end = time.monotonic() + request["timeout_s"]
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(found[1]), flush=True)


if __name__ == "__main__":
    _serve()
