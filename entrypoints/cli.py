"""The console command `qexp`: the entry points as sub-commands."""

from collections.abc import Callable

import typer

from entrypoints.latency import latency
from entrypoints.main import main
from entrypoints.models import models
from entrypoints.options import run_app
from entrypoints.predict import predict
from entrypoints.promote import promote
from entrypoints.quantize import quantize
from entrypoints.report import report
from entrypoints.search import search
from entrypoints.sync import sync
from entrypoints.train import train
from entrypoints.verify import verify

app = typer.Typer(
    help="Can this image classifier ship as int8 on this CPU? Every command ends with one line of JSON.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its table cuts long names of options off
)
COMMANDS: dict[str, Callable[..., None]] = {
    "run": main,
    "train": train,
    "quantize": quantize,
    "latency": latency,
    "search": search,
    "report": report,
    "predict": predict,
    "promote": promote,
    "models": models,
    "verify": verify,
    "sync": sync,
}
for name, command in COMMANDS.items():
    app.command(name, short_help=(command.__doc__ or "").partition("\n\n")[0])(command)  # in full


def main_program() -> None:
    """The console command."""
    run_app(app)


if __name__ == "__main__":
    main_program()
