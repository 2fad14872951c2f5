"""`qexp hosts`."""

from typing import Annotated, Any

import typer

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import with_options
from .program import run_alone

Name = Annotated[
    str,
    typer.Argument(
        help="registered int8 model, for instance smallnet-digits-int8, or one of its versions, models:/NAME/VERSION",
        metavar="NAME",
    ),
]


@with_options("gate")
def hosts(config: Config, *, name: Name) -> dict[str, Any]:
    """Show what is known of an int8 model on each kind of machine: speed-up, agreement of logits, the gate's verdict.

    `qexp latency --model-uri URI` on another machine with the same tracking server adds that machine. Into a pipe or a
    file goes one line of JSON, while the table is on standard error; with --json, there is no table.
    """
    with importing():
        from qexp.pipeline.hosts import run_hosts

    return run_hosts(config, name)


if __name__ == "__main__":
    run_alone(hosts)
