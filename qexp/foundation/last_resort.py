"""An error that nobody has foreseen, as one line: its traceback goes into a log file."""

import os
import shlex
import sys
import tempfile
import traceback

from qexp.errors import first_line
from qexp.foundation.text import hide_secrets

FOLDER = "QEXP_LOG_DIR"  # in the environment: where a command and its child processes write their logs


def choose_folder() -> None:
    """Let this process and those that it starts write their logs to the folder for temporary files of this moment."""
    os.environ.setdefault(FOLDER, tempfile.gettempdir())


def explain(error: BaseException) -> str:
    """What the error says, and the path of a new log with its traceback, in one line."""
    text = "".join(traceback.format_exception(error))
    said = f"{type(error).__name__}: {first_line(error)}"
    try:
        descriptor, file = tempfile.mkstemp(".log", "qexp-error-", os.environ.get(FOLDER))
        with os.fdopen(descriptor, "w", errors="backslashreplace") as log:
            log.write(hide_secrets(f"{shlex.join(sys.argv)}\n\n{text}"))
    except OSError as problem:  # a full disk may have been the reason
        return f"{said} (unexpected; its traceback cannot be kept: {problem.strerror})"
    return f"{said} (unexpected; its traceback is in {file})"
