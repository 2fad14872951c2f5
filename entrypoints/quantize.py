"""`qexp quantize` and the entry point `quantize` of MLproject."""

from typing import Any

from entrypoints.options import ModelUri, run_alone, with_options
from qexp.config import Config


@with_options("threads", "data_dir", "quantize", "batch_sizes")
def quantize(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Quantize a registered fp32 version, compare both on the same images and register the int8 version."""
    from qexp.pipeline.jobs import run_quantize

    return run_quantize(config, model_uri)


if __name__ == "__main__":
    run_alone(quantize)
