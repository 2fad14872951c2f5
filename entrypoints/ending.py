"""The one way in which every command ends: its result, or one line on standard error and an exit code."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from qexp.errors import InputError, StageError, first_line
from qexp.files import own_temporary_folder
from qexp.foundation.last_resort import choose_folder, explain
from qexp.foundation.processes import end_with
from qexp.foundation.text import hide_secrets, printable
from qexp.progress import announce, clean_logs, clear_line

BAD_INPUT = 2
Summary = dict[str, Any]


def finish(action: Callable[[], Summary | None], as_json: bool = False) -> None:
    """Run a command to its end, and show its result (nothing if another process has): a table on a terminal, one line
    of JSON into a pipe or a file, or if `as_json`. Or else a line on standard error and an exit code.

    2 for bad input, 1 for a stage that failed, or for an error that nobody has foreseen, whose traceback is in the log
    that the line names, 130, 143 and 129 for SIGINT, SIGTERM and SIGHUP.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: loading int8 weights warns of a deprecation
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that is closed; under nohup it stays ignored
        signal.signal(signal.SIGHUP, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    if "TORCHELASTIC_RUN_ID" in os.environ:  # when the launcher is killed, its processes stop, with a checkpoint
        end_with(os.getppid(), signal.SIGTERM)
    os.environ["PYTHONSAFEPATH"] = "1"  # Python processes that a library starts import nothing from the current folder
    choose_folder()
    clean_logs()
    announce("starting")  # importing torch takes seconds
    try:
        with own_temporary_folder():
            summary = action()
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except StageError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except SystemExit as stopped:
        fail("terminated", int(stopped.code or 0))
    except Exception as error:
        fail(f"MLflow: {first_line(error)}" if type(error).__module__.startswith("mlflow.") else explain(error), 1)
    else:
        if summary is not None:
            table = summary.pop("table", None)
            _show(_fit_to_show(summary), table, as_json)


def _show(summary: Summary, table: Any, as_json: bool) -> None:
    clear_line()
    into_pipe = not sys.stdout.isatty()
    if into_pipe and not as_json and summary["command"] == "hosts":  # a list, for people too, as that of models
        print(table.text(), file=sys.stderr)
    if into_pipe or as_json:
        print(json.dumps(summary), flush=True)
    else:
        from .table import show  # rich takes a while

        show(summary, table)


def _fit_to_show(value: Any) -> Any:
    """Without secrets, and with four decimals, which are more than any measurement here holds."""
    if isinstance(value, dict):
        return {key: _fit_to_show(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fit_to_show(inner) for inner in value]
    if isinstance(value, str):
        return hide_secrets(value)
    return round(value, 4) if isinstance(value, float) else value


def fail(message: str, code: int) -> None:
    """End with one line and an exit code; a run that MLflow has started for this command keeps the line as a tag."""
    line = printable(message)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the launcher shows it, and ends the other processes
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it sends to this one too, that is ending already
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    else:
        clear_line()
        print(f"error: {line}", file=sys.stderr, flush=True)
        if code in (1, BAD_INPUT) and "MLFLOW_RUN_ID" in os.environ:  # no stage has taken it
            from qexp.tracking.refused import end_refused

            end_refused(os.environ["MLFLOW_RUN_ID"], line)
    raise typer.Exit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """A signal as an exception, so that runs end as KILLED on the way out."""
    sys.exit(128 + number)
