"""`qexp predict`: what a registered version sees in image files."""

import os
from typing import Annotated, Any

import typer

from qexp.config import Config
from qexp.errors import InputError
from qexp.foundation.imports import importing

from .options import COMMON_GROUP, with_options
from .program import run_alone

Uri = Annotated[
    str, typer.Argument(help="version: models:/NAME/VERSION or models:/NAME@ALIAS", metavar="URI", show_default=False)
]
Images = Annotated[list[str], typer.Argument(help="image files of any size", metavar="IMAGE...", show_default=False)]
TopK = Annotated[
    str,
    typer.Option(
        help="classes shown of each image, at most; of equally likely ones left out, the number",
        metavar="int",
        rich_help_panel=COMMON_GROUP,
    ),
]


@with_options("threads")
def predict(config: Config, *, uri: Uri, images: Images, top_k: TopK = "3") -> dict[str, Any]:
    """Print the most likely classes of image files, and their probabilities, by a registered version, fp32 or int8."""
    with importing():
        from qexp.pipeline.predict import run_predict

    if not (top_k.isdecimal() and int(top_k)):
        raise InputError(f"--top-k {top_k}: must be a whole number, at least 1")
    return run_predict(config, uri, list(map(os.path.expanduser, images)), int(top_k))


if __name__ == "__main__":
    run_alone(predict)
