"""`qexp models`."""

import sys
from typing import Annotated, Any

import typer

from qexp.foundation.imports import importing

from .ending import finish
from .options import Json, given_or_none
from .program import run_alone

Pattern = Annotated[str, typer.Argument(help="only this registered model, or a pattern: 'smallnet-*'", metavar="NAME")]


def models(name: Pattern = "auto", json: Json = False) -> None:
    """List registered versions with aliases, accuracy, size, latency and lineage, the newest first.

    On a terminal it is a table. Into a pipe or a file go the same versions as one line of JSON, while the table is on
    standard error; with --json, there is no table.
    """

    def action() -> dict[str, Any] | None:
        with importing():
            from qexp.tracking.catalog import as_table, list_models

        rows = list_models(given_or_none(name))
        terminal = not json and sys.stdout.isatty()
        if not json:
            print(as_table(rows), file=sys.stdout if terminal else sys.stderr)
        return None if terminal else {"command": "models", "models": rows}

    finish(action, json)


if __name__ == "__main__":
    run_alone(models)
