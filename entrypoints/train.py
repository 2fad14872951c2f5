"""`qexp train` and the entry point `train` of MLproject."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import Overrides, Resume, given_or_none, with_options
from .program import run_alone


@with_options("model", "weights", "seed", "threads", "quick", "data", "preprocess", "train")
def train(config: Config, *, resume: Resume = "auto", overrides: Overrides) -> dict[str, Any] | None:
    """Train a classifier, measure it in fp32 and register it."""
    with importing():
        from qexp.pipeline.jobs import run_train

    return run_train(config, given_or_none(resume), overrides, ["-m", __spec__.name])


if __name__ == "__main__":
    run_alone(train)
