"""`qexp models`."""

import sys
from typing import Annotated, Any

import typer

from entrypoints.options import finish, given_or_none, is_true, run_alone

Pattern = Annotated[str, typer.Argument(help="only this registered model, or a pattern: 'smallnet-*'", metavar="NAME")]

Json = Annotated[str, typer.Option(help="JSON alone, without the table", metavar="true|false")]


def models(name: Pattern = "auto", json: Json = "auto") -> None:
    """List registered versions with aliases, accuracy, size, latency and lineage, the newest first.

    On a terminal it is a table. Into a pipe or a file go the same versions as one line of JSON, while the table is on
    standard error.
    """

    def action() -> dict[str, Any] | None:
        from qexp.tracking.catalog import as_table, list_models

        shown, rows = not is_true("--json", json), list_models(given_or_none(name))
        terminal = shown and sys.stdout.isatty()
        if shown:
            print(as_table(rows), file=sys.stdout if terminal else sys.stderr)
        return None if terminal else {"command": "models", "models": rows}

    finish(action)


if __name__ == "__main__":
    run_alone(models)
