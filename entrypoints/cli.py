"""The console command `qexp`: the entry points as sub-commands."""

from collections.abc import Callable
from typing import Annotated

import typer

from qexp import __version__

from .check import check
from .hosts import hosts
from .import_model import import_model
from .latency import latency
from .main import main
from .models import models
from .predict import predict
from .program import SETTINGS, add_command, run_app
from .promote import promote
from .quantize import quantize
from .report import report
from .search import search
from .sync import sync
from .throughput import throughput
from .train import train
from .verify import verify

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=SETTINGS)
COMMANDS: dict[str, Callable[..., None]] = {
    "check": check,
    "run": main,
    "train": train,
    "import": import_model,
    "quantize": quantize,
    "latency": latency,
    "throughput": throughput,
    "search": search,
    "report": report,
    "predict": predict,
    "promote": promote,
    "models": models,
    "hosts": hosts,
    "verify": verify,
    "sync": sync,
}
for name, command in COMMANDS.items():
    add_command(app, command, name)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"qexp {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and end")
    ] = False,
) -> None:
    """Can this image classifier ship as int8 on this CPU?

    Every command ends with its result: a table on a terminal, one line of JSON into a pipe or a file, or with --json.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def main_program() -> None:
    """The console command."""
    run_app(app, name="qexp")


if __name__ == "__main__":
    main_program()
