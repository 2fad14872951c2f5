"""`qexp verify`."""

from typing import Annotated, Any

import typer

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import with_options
from .program import run_alone

Uri = Annotated[str, typer.Argument(help="registered version: models:/NAME/VERSION or models:/NAME@ALIAS")]


@with_options("threads", "data_dir", "labels", "classes")
def verify(config: Config, *, uri: Uri) -> dict[str, Any]:
    """Load a registered version in a clean subprocess, measure it on the test images, and compare with its tags."""
    with importing():
        from qexp.pipeline.verify import run_verify

    return run_verify(config, uri)


if __name__ == "__main__":
    run_alone(verify)
