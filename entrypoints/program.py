"""A command line from its words to its exit code: what may be written, how help looks, what is refused.

Flags may stand alone, for true, be told `true`, `false` or `auto`, and be turned round: `--flip`, `--flip false`,
`--no-flip`. MLproject passes all options that are no parameters of its own as one: `--options "--observer minmax"`.
"""

import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import typer
import typer.core
import typer.exceptions

from qexp.errors import InputError
from qexp.foundation.last_resort import explain
from qexp.foundation.streams import NOBODY_READS, guard_streams, nobody_reads, output_problem

from .ending import BAD_INPUT, fail
from .options import fields_of, is_flag

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 200}
FLAGS = {
    f"--{name.replace('_', '-')}": f"--no-{name.replace('_', '-')}"
    for name, (_, field, _) in fields_of(
        ("", "data", "preprocess", "train", "quantize", "latency", "throughput", "gate", "search")
    ).items()
    if is_flag(field)
}
OWN_FLAGS = ("--force", "--json")  # they are false unless given
WORDS = {"true": True, "false": False, "auto": None}
MORE_WORDS = WORDS | {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False, "": None}


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help has its options in groups, and cuts no name off."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            argument = param.param_type_name == "argument"
            title = "Arguments" if argument else getattr(param, "rich_help_panel", None) or "Common options"
            if record := param.get_help_record(ctx):
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


def add_command(app: typer.Typer, command: Callable[..., None], name: str | None = None) -> None:
    """Make `command` one of the program's."""
    short = (command.__doc__ or "").partition("\n\n")[0]  # in full
    app.command(name, cls=GroupedCommand, short_help=short, context_settings=SETTINGS)(command)


def run_app(app: typer.Typer, words: list[str] | None = None, name: str | None = None) -> None:
    """Run a command line; what Typer refuses (unknown or missing options) is one line too, and exit code 2.

    Where standard output cannot be written, the exit code is 1, or 141 if nobody reads it any more.
    """
    guard_streams()
    words = sys.argv[1:] if words is None else words
    code: Any = None
    try:
        code = app(list(_with_plain_flags(words)), prog_name=name, standalone_mode=False)
    except typer.exceptions.TyperException as error:
        code = _refused(f"{error.format_message()} (see --help)", error.exit_code)
    except InputError as error:
        code = _refused(str(error))
    except Exception as error:
        code = _refused(explain(error), 1)
    code = code if isinstance(code, int) else 0
    if (problem := output_problem()) and code == 0:
        why = f"standard output cannot be written ({problem.strerror}); the command itself has done its work"
        code = NOBODY_READS if nobody_reads(problem) else _refused(why, 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may abort a process that Python tears down around them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # all memory goes back to the system anyway: Python need not look through it at the end
    sys.exit(code)


def run_alone(command: Callable[..., None]) -> None:
    """Run one command by itself, as MLproject does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    add_command(app, command)
    try:
        words = list(_with_options_unpacked(sys.argv[1:]))
    except InputError as error:
        sys.exit(_refused(str(error)))
    run_app(app, words)


def _refused(message: str, code: int = BAD_INPUT) -> int:
    try:
        fail(message, code)
    except typer.Exit as ended:
        return ended.exit_code
    return code


def _with_options_unpacked(words: Iterable[str]) -> Iterator[str]:
    """The words with what `--options` holds in its place, split as a shell would, and with `-` for `_` in names:
    `mlflow run` passes on a parameter that MLproject does not declare as it is written."""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--options":
            yield name.replace("_", "-") + equals + value if word.startswith("--") else word
            continue
        try:
            value = value if equals else next(rest, "")
            yield from [] if value == "auto" else shlex.split(value)
        except ValueError as error:
            raise InputError(f"--options {value}: {str(error).lower()}; quote it as for a shell") from None


def _with_plain_flags(words: list[str]) -> Iterator[str]:
    """The words with every flag that has a value as one without."""
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        name, equals, value = word.partition("=")
        if name not in FLAGS and name not in OWN_FLAGS:
            yield word
            continue
        if not equals:
            value = "true"
            # Commands with words of their own (NAME, URI) have --quick and OWN_FLAGS alone.
            own = name in OWN_FLAGS or name == "--quick"
            if rest and (rest[-1].lower() in WORDS or not (own or rest[-1].startswith("-"))):
                value = rest.pop()
        if value.lower() not in MORE_WORDS:
            raise InputError(f"{name} {value}: must be true or false")
        if (told := MORE_WORDS[value.lower()]) is not None:
            yield from [name] if told else [FLAGS[name]] if name in FLAGS else []
