"""`qexp latency` and the entry point `latency` of MLproject."""

from typing import Any

from qexp.config import Config

from .options import ModelUri, with_options
from .program import run_alone


@with_options("threads", "quick", "latency")
def latency(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Time a registered int8 version against the fp32 version that it came from."""
    from qexp.pipeline.jobs import run_latency

    return run_latency(config, model_uri)


if __name__ == "__main__":
    run_alone(latency)
