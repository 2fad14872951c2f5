"""`qexp report` and the entry point `report` of MLproject."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import ModelUri, with_options
from .program import run_alone


@with_options("output_dir", "gate")
def report(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Write the report on a registered int8 version from what its runs have logged."""
    with importing():
        from qexp.pipeline.jobs import run_report

    return run_report(config, model_uri)


if __name__ == "__main__":
    run_alone(report)
