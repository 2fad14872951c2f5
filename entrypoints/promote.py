"""`qexp promote`."""

from typing import Annotated, Any

import typer

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import COMMON_GROUP, given_or_none, with_options
from .program import run_alone

Name = Annotated[str, typer.Argument(help="registered int8 model, for instance smallnet-digits-int8")]
Number = Annotated[
    str,
    typer.Option(help="its version; auto: the challenger, or the newest", metavar="N", rich_help_panel=COMMON_GROUP),
]
Force = Annotated[
    bool, typer.Option("--force", help="move the alias even if rejected; recorded", rich_help_panel=COMMON_GROUP)
]


@with_options("threads", "quick", "data_dir", "labels", "classes", "gate", "latency")
def promote(config: Config, *, name: Name, version: Number = "auto", force: Force = False) -> dict[str, Any]:
    """Make a version `champion` if it passes the gate and beats the present champion.

    Both are measured side by side. The version must be shown to be better, and not worse by more than margins.
    """
    with importing():
        from qexp.pipeline.promote import run_promote

    return run_promote(config, name, given_or_none(version), force)


if __name__ == "__main__":
    run_alone(promote)
