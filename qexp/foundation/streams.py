"""The standard streams, which may be closed, full or read by nobody: what is said there never ends the work.

The first thing that a command does is `guard_streams`. Whether its result could be written, it asks at the end.
"""

import errno
import io
import os
import sys
from typing import Any

NOBODY_READS = 128 + 13  # the exit code of a program that SIGPIPE ends


class _Guarded(io.TextIOWrapper):
    """A stream that keeps its error instead of raising it, and escapes what its encoding lacks."""

    problem: OSError | None = None
    original: io.TextIOWrapper  # would close the buffer that both have, if nobody held it

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            return self._keep(error, len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._keep(error, 0)

    def _keep(self, error: OSError, count: int) -> int:
        if self.problem is None:
            self.problem = error
            nowhere = os.open(os.devnull, os.O_WRONLY)  # what is still buffered goes there
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        return count


def guard_streams() -> None:
    """Let standard output and standard error take whatever is written. A closed one leads nowhere from here on: else
    the next file that is opened, a database perhaps, would get its number and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


def _guarded(stream: Any) -> Any:
    if type(stream) is not io.TextIOWrapper:  # it is guarded, or belongs to whoever has called the command from Python
        return stream
    guarded = _Guarded(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
    guarded.original = stream
    return guarded


def output_problem() -> OSError | None:
    """Why standard output has not taken all that was written; None: it has."""
    sys.stdout.flush()
    return getattr(sys.stdout, "problem", None)


def nobody_reads(problem: OSError) -> bool:
    """Whether the other end of a pipe has been closed, as `head` does when it has seen enough."""
    return problem.errno == errno.EPIPE
