"""`qexp search` and the entry point `search` of MLproject."""

from typing import Any

from qexp.config import Config
from qexp.foundation.imports import importing

from .options import ModelUri, given_or_none, with_options
from .program import run_alone


@with_options("", "data", "preprocess", "train", "quantize", "latency", "gate", "search")
def search(config: Config, *, model_uri: ModelUri = "auto") -> dict[str, Any]:
    """Search quantization settings on validation images: engines, calibration samples, observers, scales, fp32 layers.

    Without --model-uri: the newest registered fp32 version of this model and data set, trained first if there is none.
    The same command resumes a search that was stopped. It ends with the command that quantizes as the best point was.
    """
    with importing():
        from qexp.search import run_search

    return run_search(config, given_or_none(model_uri))


if __name__ == "__main__":
    run_alone(search)
