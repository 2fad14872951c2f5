"""`qexp models`."""

import sys
from typing import Annotated, Any

import typer

from entrypoints.options import given_or_none, is_true, run_alone, with_options
from qexp.config import Config

Pattern = Annotated[str, typer.Argument(help="only this registered model, or a pattern: 'smallnet-*'", metavar="NAME")]

Json = Annotated[str, typer.Option(help="JSON alone, without the table", metavar="true|false")]


@with_options()
def models(
    config: Config,
    *,
    name: Pattern = "auto",
    json: Json = "auto",
) -> dict[str, Any] | None:
    """List registered versions with aliases, accuracy, size, latency and lineage, the newest first.

    On a terminal it is a table. Into a pipe or a file go the same versions as one line of JSON, while the table is on
    standard error.
    """
    from qexp.store.catalog import as_table, list_models

    rows = list_models(given_or_none(name))
    shown = not is_true("--json", json)
    terminal = shown and sys.stdout.isatty()
    if shown:
        print(as_table(rows), file=sys.stdout if terminal else sys.stderr)
    return None if terminal else {"command": "models", "models": rows}


if __name__ == "__main__":
    run_alone(models)
