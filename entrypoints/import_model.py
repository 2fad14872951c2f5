"""`qexp import`: a model that was trained elsewhere as a registered fp32 version."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .check import Model, as_options
from .options import with_options
from .program import run_alone


@with_options("model", "weights", "seed", "threads", "data", "preprocess", given=as_options)
def import_model(config: Config, *, given: Model) -> dict[str, Any] | None:
    """Register a model that was trained elsewhere, evaluated on the test images: as `check` does first."""
    with importing():
        from qexp.pipeline.jobs import run_import

    return run_import(config)


if __name__ == "__main__":
    run_alone(import_model)
