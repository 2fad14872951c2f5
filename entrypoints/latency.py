"""`qexp latency` and the entry point `latency` of MLproject."""

from typing import Any

from entrypoints.options import ModelUri, run_alone, with_options
from qexp.config import Config


@with_options("threads", "latency")
def latency(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Time a registered int8 version against the fp32 version that it came from."""
    from qexp.pipeline.jobs import run_latency

    return run_latency(config, model_uri)


if __name__ == "__main__":
    run_alone(latency)
