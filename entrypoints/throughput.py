"""`qexp throughput`."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import ModelUri, with_options
from .program import run_alone


@with_options("threads", "quick", "batch_sizes", "profile", "max_busy_percent", "throughput", "gate")
def throughput(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Measure what workers serve, each on its own cores, with a registered int8 version and with the fastest float.

    It tells the setting that serves most within --max-p99-ms, and the cores that --images-per-second takes. The version
    must have been timed on this CPU before: `qexp latency` does so.
    """
    with importing():
        from qexp.pipeline.throughput import run_throughput

    return run_throughput(config, model_uri)


if __name__ == "__main__":
    run_alone(throughput)
