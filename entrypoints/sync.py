"""`qexp sync`: for runs whose tracking store was away. No entry point of MLproject, which would start another run."""

from pathlib import Path
from typing import Annotated

import typer

from qexp.foundation.imports import importing

from .ending import finish
from .options import Json

RunDir = Annotated[Path, typer.Argument(help="folder of the run: checkpoints/RUN_ID", metavar="RUN_DIR")]


def sync(run_dir: RunDir, json: Json = False) -> None:
    """Upload what a run could not log because its tracking store did not answer: curves, weights, version, results.

    Says what is left to do, if the run was stopped before its end. Can be repeated.
    """

    def action() -> dict[str, object]:
        with importing():
            from qexp.pipeline.sync import sync_run

        return sync_run(run_dir.expanduser())

    finish(action, json)
