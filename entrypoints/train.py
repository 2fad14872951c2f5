"""`qexp train` and the entry point `train` of MLproject."""

from typing import Any

from entrypoints.options import run_alone, with_options
from qexp.config import Config


@with_options("model", "seed", "threads", "data", "train")
def train(config: Config) -> dict[str, Any]:
    """Train a classifier, measure it in fp32 and register it."""
    from qexp.pipeline import run_train

    return run_train(config)


if __name__ == "__main__":
    run_alone(train)
