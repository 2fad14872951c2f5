"""`qexp quantize` and the entry point `quantize` of MLproject."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import ModelUri, with_options
from .program import run_alone


@with_options("threads", "quick", "data_dir", "labels", "classes", "calibration_dir", "quantize", "batch_sizes")
def quantize(config: Config, *, model_uri: ModelUri) -> dict[str, Any] | None:
    """Quantize a registered fp32 version, compare both on the same images and register the int8 version."""
    with importing():
        from qexp.pipeline.jobs import run_quantize

    return run_quantize(config, model_uri)


if __name__ == "__main__":
    run_alone(quantize)
