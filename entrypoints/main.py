"""`qexp run` and the entry point `main` of MLproject."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import ModelUri, Overrides, Resume, given_or_none, with_options
from .program import run_alone


@with_options("", "data", "preprocess", "train", "quantize", "latency", "gate")
def main(
    config: Config, *, model_uri: ModelUri = "auto", resume: Resume = "auto", overrides: Overrides
) -> dict[str, Any] | None:
    """Train, quantize, measure fp32 and int8 side by side, register both, report: the whole job.

    With --model-uri, a registered fp32 version takes the place of training.
    """
    with importing():
        from qexp.pipeline.jobs import run_main

    return run_main(config, given_or_none(model_uri), given_or_none(resume), overrides, ["-m", __spec__.name])


if __name__ == "__main__":
    run_alone(main)
