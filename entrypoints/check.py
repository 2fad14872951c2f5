"""`qexp check`: a model that was trained elsewhere, as int8 on this CPU."""

from typing import Annotated, Any

import typer

from qexp.config import Config
from qexp.foundation.imports import importing
from qexp.pipeline.checks import model_options

from .options import COMMON_GROUP, Overrides, with_options
from .program import run_alone

Model = Annotated[
    str,
    typer.Argument(
        help="file of weights (with --model NAME), FILE.onnx, FILE.pt2, models:/NAME/VERSION of any MLflow model of "
        "PyTorch or ONNX, timm:NAME, or package.module:factory",
        metavar="MODEL",
        show_default=False,
    ),
]
Register = Annotated[
    bool,
    typer.Option(
        help="put both models into the MLflow model registry; --no-register needs no MLflow server or database",
        rich_help_panel=COMMON_GROUP,
        show_default=False,
    ),
]


def as_options(own: dict[str, Any], overrides: Overrides) -> None:
    """Put what MODEL stands for into the options."""
    options = overrides.setdefault("", {})
    options |= model_options(str(own["given"]), options.get("model"), options.get("weights"))
    overrides.setdefault("train", {})["epochs"] = "0"


@with_options("", "data", "preprocess", "quantize", "latency", "gate", given=as_options)
def check(config: Config, *, given: Model, register: Register = True) -> dict[str, Any] | None:
    """Can a classifier of yours ship as int8 on this CPU? Take it as it is, quantize, measure both, register both.

    Nothing is trained. The images are in --data DIR: DIR/test/<class>/ or DIR/val/<class>/.
    """
    with importing():
        from qexp.pipeline.check import run_check

    return run_check(config, register=register)


if __name__ == "__main__":
    run_alone(check)
