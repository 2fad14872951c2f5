"""Measurements in processes of their own: a module that is asked by one file and answers by another, and forks.

`ask` is called by the process that wants to know, `answer` by the module that runs as a program (sweep.py, load.py).
`in_fork` is for what must not leave a trace in that one.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from qexp.errors import StageError, first_line
from qexp.files import from_json, to_json
from qexp.foundation.last_resort import explain
from qexp.foundation.processes import end_with, run_python
from qexp.foundation.streams import guard_streams
from qexp.progress import say

STANDARD_ERROR = 2

Q = TypeVar("Q")
A = TypeVar("A")


def ask(module: str, request: object, kind: type[A], environment: dict[str, str], what: str) -> A:
    """Run `module` with `environment`, wait for it, and return its answer, a result of this kind.

    Args:
        module: it calls `answer`.
        request: a dataclass that JSON can hold.
        what: is measured, for the message.

    Raises:
        StageError: the child failed; its own message is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, found = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(to_json(request))
        status = run_python(["-m", module, str(question), str(found)], environment, stdout=_standard_error()).returncode
        if status != 0:
            raise StageError(f"{what} failed with exit code {status}; see the lines above")
        return from_json(kind, found.read_text())


def _standard_error() -> int:
    """The file of standard error. In some notebooks `sys.stderr` has none of its own."""
    try:
        return sys.stderr.fileno()
    except (OSError, AttributeError):  # io.UnsupportedOperation among them
        return STANDARD_ERROR


def answer(kind: type[Q], measure: Callable[[Q], object]) -> None:
    """The whole program of a module that `ask` runs: read a request of this kind, and write what `measure` returns.

    It ends with exit code 1, and one line on standard error, if that fails.
    """
    guard_streams()
    question, found = map(Path, sys.argv[1:])
    try:
        found.write_text(to_json(measure(from_json(kind, question.read_text()))))
    except StageError as error:
        say(str(error))
        sys.exit(1)
    except Exception as error:  # of a model's file, of memory: any library's
        say(explain(error))
        sys.exit(1)


def in_fork(work: Callable[..., Any]) -> Any:
    """What `work` returns in a copy of this process.

    Raises:
        StageError: it raised, or the copy was killed, for instance for its memory.
    """
    return begin_in_fork(work)()


def begin_in_fork(work: Callable[..., Any]) -> Callable[[], Any]:
    """Begin what `in_fork` does; what it returns waits for the end, and returns or raises the same."""
    parent = os.getpid()

    def send(end: Connection) -> None:
        end_with(parent)
        try:
            with torch.no_grad():
                end.send((work(), ""))
        except Exception as error:  # of an exporter, of the store, of a model's file: any library's
            end.send((None, first_line(error)))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=send, args=(theirs,))
    child.start()
    theirs.close()

    def wait() -> Any:
        try:
            result, problem = ours.recv()
        except EOFError:
            child.join()
            raise StageError(f"the process that loads it ended with exit code {child.exitcode}") from None
        child.join()
        if problem:
            raise StageError(problem)
        return result

    return wait
