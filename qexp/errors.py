"""The errors that a user can meet: each is one line, which the command line turns into an exit code."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qexp.foundation.text import hide_secrets

NO_ANSWER = re.compile(r"API request to \S+ failed with (?:timeout )?exception")
NOBODY = re.compile(r"(?<=\] )[A-Z][^'\")\]]+|timed out")  # nobody is there, as the system says it
# Files that are no model's own: those of libraries and ours.
LIBRARIES = re.compile(r"/site-packages/(torch/(?!nn/modules/(?!module\.py))|torchao|onnx|typing_extensions)|^<")
OURS = str(Path(__file__).parent)
DYNAMOS = re.compile(r'File "(?:[^"]*/)?([^"]+)", line (\d+), in .*\n\s*(.+)')
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# First lines that say nothing: of torch.onnx, whose reason is the cause, and of TorchScript, whose reason comes last.
EMPTY_WORDS = ("Failed to export the model with", "The following operation failed in the TorchScript")
ONE_BATCH = "marked batch as dynamic but your code specialized it"  # of torch.export, with other words in front
# Options of the command line in a message: told with a value, and by their name alone.
OPTION_TOLD = re.compile(r"(?<!\S)--([a-z][a-z0-9-]*) (true|false|[^\s:;]+(?=:))")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
WORDS = {"true": "True", "false": "False", "auto": "None"}
REFUSED, DENIED = "failed with error code 401", "failed with error code 403"
AUTOFLUSH = "(raised as a result of Query-invoked autoflush"  # SQLAlchemy's first line; the reason is in the next one


class InputError(ValueError):
    """What the user gave cannot be used: the message names the option, the value and what is allowed (exit code 2)."""


class StageError(RuntimeError):
    """The input was fine but a stage could not do its work: the message says why (exit code 1)."""


class StoreError(StageError):
    """MLflow's store has failed, or a disk: it is not the stage that cannot do its work."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of one line; its type where it says nothing. No secrets."""
    lines = COLOURS.sub("", str(error)).strip().splitlines()
    lines = [line for line in lines if not line.startswith(AUTOFLUSH)]
    if not lines:
        return type(error).__name__
    if ONE_BATCH in str(error):
        return "its code takes the number of images for a constant, as len(x) does; write x.shape[0]"
    if lines[0].startswith(EMPTY_WORDS):
        return first_line(error.__cause__) if error.__cause__ else lines[-1].strip()[:300]
    if NO_ANSWER.match(lines[0]):  # the reason is at the end of what urllib3 says about its tries
        why = NOBODY.findall(lines[0]) or re.findall(r"(?<=\(')too many \d+ error|Connection \w+", lines[0])
        return (
            f"no answer ({why[-1]})" if NOBODY.search(lines[0]) else f"{(why or ['error'])[-1]}: see the server's log"
        )
    if REFUSED in lines[0]:
        return "401: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user that it knows"
    if DENIED in lines[0]:
        return "403, permission denied: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user who may"
    return hide_secrets(lines[0])[:300]


@contextmanager
def naming_copies(folder: Path | str, name: str) -> Iterator[None]:
    """Within the block, errors call files below the temporary `folder` by `name`, of which they are copies: the folder
    is gone when the message is read."""
    try:
        yield
    except (InputError, StageError) as error:
        found = re.compile(re.escape(str(folder)) + r"[^\s'\":,;)]*")
        if not found.search(str(error)):
            raise
        raise type(error)(found.sub(lambda _: name, str(error))) from error.__cause__


def with_place(error: BaseException) -> str:
    """`first_line`, with the line of the model's own code at which a library that traced it gave up, if it is known."""
    found: BaseException | None = error
    while found:
        frames = [one for one in traceback.extract_tb(found.__traceback__) if _of_a_model(one.filename)]
        told = DYNAMOS.findall(str(found).partition("from user code:")[2])
        places = [(Path(frame.filename).name, frame.lineno, frame.line) for frame in frames] + told
        if places:
            file, number, code = places[-1]
            return f"{first_line(error)} (at {file}:{number}: {code})"
        found = found.__cause__
    return first_line(error)


def _of_a_model(file: str) -> bool:
    return not LIBRARIES.search(file) and not file.startswith(OURS)


def as_arguments(text: str) -> str:
    """A message that names options of the command line, as Python names them: `keep_fp32=a`, for `--keep-fp32 a`."""
    text = text.replace("--no-register", "register=False")
    text = OPTION_TOLD.sub(lambda found: f"{found[1].replace('-', '_')}={WORDS.get(found[2], found[2])}", text)
    return OPTION.sub(lambda found: found[1].replace("-", "_"), text)
