"""Processes for tests that are forks of one that has imported torch, MLflow and qexp already, which takes seconds.

`start_forking` makes that process before anything is computed: threads do not survive a fork. Commands, latency sweeps,
training processes, MLflow's servers and the verification of registered models run as its forks. Real processes prove
what a clean subprocess does: those that `mlflow run` and `make server` start in tests/test_mlflow_run.py, the one in
tests/tracking/test_registry.py, and the training processes of one test in tests/training/test_launch.py
(`real_workers`).
"""

import atexit
import gc
import importlib
import inspect
import multiprocessing
import os
import pickle
import pkgutil
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.utils import requirements_utils
from sqlalchemy import event
from sqlalchemy.engine import Engine
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

REPOSITORY = Path(__file__).resolve().parent.parent
# Beside qexp's own modules. None of these computes when it is imported.
FIRST = (
    "mlflow.pyfunc", "mlflow.pytorch", "mlflow.onnx", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store", "onnxruntime", "torch.export.pt2_archive", "torch.export._trace",
    "sqlalchemy.dialects.sqlite", "matplotlib.figure", "sklearn.datasets", "torchvision.models",
    "torch.distributed.elastic.multiprocessing", "entrypoints.options",
)  # fmt: skip
# By the process that forks alone, as tests themselves need few of them.
ITS_OWN = (
    "alembic.command", "git", "markdown.extensions.codehilite", "matplotlib.backends.backend_agg",
    "mlflow.pyfunc.scoring_server", "onnx.reference.ops", "onnxscript.function_libs.torch_lib.ops",
    "opentelemetry.sdk.metrics", "sympy.combinatorics", "sympy.tensor.tensor", "torch._inductor.fx_passes.quantization",
    "torch.fx.experimental.validator", "torch.onnx._internal.exporter._core",
    "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",
)  # fmt: skip
# What a training process finds: its launcher as its parent, and its rank when qexp is imported.
WORKER = """
import os, qexp.progress
os.getppid = lambda: {launcher}
qexp.progress.QUIET = os.environ["RANK"] != "0"
"""
MADE = ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")  # what importing qexp sets
_forking: "list[Forking]" = []
_start_real_worker = SubprocessHandler._popen
_before_workers = [""]


@dataclass(frozen=True)
class Request:
    """A Python program, as `command` after the interpreter: `-m module` or `-c code`, and arguments."""

    command: tuple[str, ...]
    environment: dict[str, str]
    folder: str  # to run in
    files: Path  # the folder of its exit code, `code`, and of what it writes, unless that goes elsewhere
    before: str = ""  # Python to run first
    clean: bool = False  # without what qexp has imported of itself
    written: tuple[str, ...] = ("out", "err")
    given: str = os.devnull  # the file that it reads as its standard input


@dataclass
class Forked:
    """A process that runs; what it writes is in files of `folder`."""

    arguments: tuple[str, ...]
    folder: Path
    pid: int
    _read: int = field(default=0, repr=False)

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as the process runs."""
        code = self.folder / "code"
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code; after `timeout_s`, the process and all that it has started are killed."""
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired([*self.arguments], timeout_s, self.stdout, self.stderr)
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


class Forking:
    """The process that forks; it ends with the one that has made it. It calls `prepare` first."""

    def __init__(self, files: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._lock, self._files = threading.Lock(), files
        if os.fork() == 0:
            self._ours.close()
            try:
                prepare()
                _serve(theirs)
            finally:
                os._exit(0)  # libraries wait at their end for threads that no fork has
        theirs.close()

    def start(
        self, folder: str, command: tuple[str, ...], environment: dict[str, str], before: str = "", **more: Any
    ) -> Forked:
        """Start a Python program in `folder`."""
        files = Path(tempfile.mkdtemp(dir=self._files))
        for name in ("out", "err"):
            (files / name).touch()
        with self._lock:
            self._ours.send_bytes(pickle.dumps(Request(command, environment, folder, files, before, **more)))
            return Forked(command, files, int(self._ours.recv_bytes()))


def start_forking() -> None:
    """Once, in a process that has computed nothing yet; what qexp starts from it, too, are forks from now on."""
    for name in (*_modules_of("qexp"), *FIRST):
        importlib.import_module(name)
    # MLflow asks the store before each tag whether the model is a prompt, which takes longer than to write the tag.
    MlflowClient._raise_if_prompt = lambda self, name: None
    event.listen(Engine, "connect", _without_waiting_for_the_disk)
    # torch's launcher looks through all modules for the names of its own methods, for events that nobody reads.
    dynamic_rendezvous.get_method_name = lambda *depth: "method"
    files = Path(tempfile.mkdtemp(prefix="qexp-"))
    atexit.register(shutil.rmtree, files, ignore_errors=True)
    _children_are_forks(files, _find_out_once)


def _without_waiting_for_the_disk(connection: Any, record: object) -> None:
    """A commit of SQLite then survives a kill as before, but not a power cut, which no test has."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


def _modules_of(package: str) -> list[str]:
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    return [module.name for module in found]


def _find_out_once() -> None:
    """What each fork would do anew: import, ask for all installed packages when it logs a model, make torch's table of
    ONNX functions, and look for garbage in what is imported, which takes a third of a second and copies it."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        for name in (*ITS_OWN, *_modules_of("entrypoints")):
            importlib.import_module(name)
    requirements_utils._init_modules_to_packages_map()
    # A block of a sweep is long enough for the models of tests, whose times nobody reads.
    latency = sys.modules["qexp.measurement.latency"]
    latency.SETTLE_S, latency.BLOCK_S = 0.005, 0.012  # type: ignore[attr-defined]
    onnx_file = sys.modules["qexp.models.onnx_file"]
    with onnx_file.with_table_kept() as make_table:
        make_table(opset_version=onnx_file.OPSET)
    gc.collect()
    gc.freeze()


def _children_are_forks(files: Path, prepare: Callable[[], None] = lambda: None) -> None:
    _forking[:] = [Forking(files, prepare)]
    for module in ("qexp.measurement.child", "qexp.tracking.clean_process"):
        sys.modules[module].run_python = _run_forked  # type: ignore[attr-defined]
    sys.modules["qexp.tracking.clean_process"].start_python = _Later  # type: ignore[attr-defined]
    SubprocessHandler._popen = _start_worker


def real_workers() -> None:
    """In a fork: the training processes that it starts are no forks."""
    SubprocessHandler._popen = _start_real_worker


def start_forked(folder: Path, arguments: tuple[str, ...], environment: dict[str, str], before: str = "") -> Forked:
    """Start `qexp ARGUMENTS` in `folder`; `before` is Python that the process runs first."""
    return start_python(folder, ("-m", "entrypoints.cli", *arguments), environment, before)


def start_python(
    folder: Path, command: tuple[str, ...], environment: dict[str, str], before: str = "", **more: Any
) -> Forked:
    """Start a Python program, `-m module` or `-c code` and arguments; `more` are fields of `Request`."""
    assert _forking, "a test that starts a process is marked slow"
    return _forking[0].start(str(folder), command, environment, before, **more)


def run_apart(test: Callable[..., None], *arguments: object) -> None:
    """Call a function of a test module in a process of its own, whose memory ends with it; what it raises is an
    AssertionError here. Arguments are plain values."""
    call = f"import {test.__module__}; {test.__module__}.{test.__name__}(*{arguments!r})"
    folders = [str(Path(inspect.getfile(test)).parent), str(REPOSITORY / "tests")]
    code = f"import sys; sys.path[:0] = {folders!r}; {call}"
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(sys.modules["torch"].get_num_threads())}
    process = _forking[0].start(os.getcwd(), ("-c", code), environment)
    assert process.wait() == 0, process.stderr


def _run_forked(words: Sequence[str], env: dict[str, str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Stands for `run_python` of qexp.foundation.processes."""
    ours = f"/proc/{os.getpid()}/fd/2"
    written = {} if options.get("capture_output") else {"written": (ours, ours)}
    given = {"given": options["given"]} if "given" in options else {}
    process = _forking[0].start(os.getcwd(), tuple(words), env, clean=words[0] == "-c", **given, **written)
    code = process.wait(600)
    return subprocess.CompletedProcess(words, code, process.stdout, process.stderr)


class _Later:
    """Stands for `start_python`: a fork has nothing to import, and starts when it is told what to do."""

    def __init__(self, words: Sequence[str], env: dict[str, str], **options: Any) -> None:
        self._words, self._env = words, env

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def kill(self) -> None: ...

    def communicate(self, said: str) -> tuple[str, str]:
        with tempfile.NamedTemporaryFile("w") as given:
            given.write(said)
            given.flush()
            done = _run_forked(self._words, self._env, capture_output=True, given=given.name)
        self.returncode = done.returncode
        return done.stdout, done.stderr


def _start_worker(handler: SubprocessHandler, command: Sequence[str], environment: dict[str, str]) -> Forked:
    """Stands for `Popen` in torch's launcher; `command` is Python's, with `-m module`."""
    before = WORKER.format(launcher=os.getpid()) + _before_workers[0]
    written = (f"/proc/{os.getpid()}/fd/1", f"/proc/{os.getpid()}/fd/2")
    words = tuple(command[command.index("-m") :])
    return _forking[0].start(os.getcwd(), words, environment, before, written=written)


def before_workers(code: str) -> None:
    """In a fork: Python that its training processes run first."""
    _before_workers[0] = code


def _serve(requests: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while True:
        try:
            request: Request = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        if os.fork() == 0:
            _keep(requests, request)
            return


def _keep(requests: Connection, request: Request) -> None:
    """The fork's parent: says its process id, waits for it, and writes how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        requests.close()
        code = _run(request)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    requests.send_bytes(str(child).encode())
    requests.close()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (request.files / "new").write_text(str(code))
    (request.files / "new").rename(request.files / "code")


def _run(request: Request) -> int:
    kind, what, *arguments = request.command
    try:
        _become(request)
        sys.argv = [what if kind == "-m" else kind, *arguments]
        exec(request.before, {"__name__": "before"})
        warnings.simplefilter("ignore")  # a module that is run is there already
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


def _become(request: Request) -> None:
    """In the fork: what a process started for this would find."""
    atexit._clear()
    os.setsid()
    os.chdir(request.folder)
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file, flags in (
        (0, request.given, os.O_RDONLY),
        (1, request.files / request.written[0], write),
        (2, request.files / request.written[1], write),
    ):
        descriptor = os.open(file, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # pytest's before
    made = {name: os.environ[name] for name in MADE if name in os.environ}
    os.environ.clear()
    os.environ.update(made | request.environment)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # which OpenMP reads when torch is imported
        sys.modules["torch"].set_num_threads(int(threads))
    sys.path[0] = ""
    if request.clean:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("qexp", "entrypoints")]:
            del sys.modules[name]
    else:
        _children_are_forks(request.files)
