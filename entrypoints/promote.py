"""`qexp promote`."""

from typing import Annotated, Any

import typer

from entrypoints.options import given_or_none, is_true, run_alone, with_options
from qexp.config import Config

Name = Annotated[str, typer.Argument(help="registered int8 model, for instance smallnet-digits-int8")]
Number = Annotated[str, typer.Option(help="its version; auto: the challenger, or the newest", metavar="N")]
Force = Annotated[str, typer.Option(help="move the alias even if rejected; recorded", metavar="true|false")]


@with_options("threads", "data_dir", "gate", "latency")
def promote(config: Config, *, name: Name, version: Number = "auto", force: Force = "auto") -> dict[str, Any]:
    """Make an int8 version `champion` if it passes the gate and is shown to be better than the present one, and not
    to be worse by more than margins, measured side by side."""
    from qexp.pipeline.promote import run_promote

    return run_promote(config, name, given_or_none(version), is_true("--force", force))


if __name__ == "__main__":
    run_alone(promote)
