"""`qexp latency` and the entry point `latency` of MLproject."""

from typing import Any

from qexp.config import Config, parse_options
from qexp.errors import InputError
from qexp.foundation.imports import importing

from .options import ModelUri, Overrides, with_options
from .program import run_alone


def several_threads(own: dict[str, Any], overrides: Overrides) -> None:
    """Several numbers of `--threads` are those on which models are timed; one alone is that of the whole command."""
    text = str(overrides.get("", {}).get("threads", ""))
    if "," not in text:
        return
    del overrides[""]["threads"]
    times = overrides.setdefault("latency", {})
    if "threads" in times:
        raise InputError(f"--latency-threads {','.join(times['threads'])}: leave it or --threads {text} out")
    times["threads"] = text.split(",")
    try:
        parse_options({"latency": {"threads": times["threads"]}})
    except InputError as error:
        raise InputError(str(error).replace("--latency-threads", "--threads", 1)) from None


@with_options("threads", "quick", "latency", given=several_threads)
def latency(config: Config, *, model_uri: ModelUri) -> dict[str, Any]:
    """Time a registered int8 version against the fp32 version that it came from.

    With several numbers of threads, --threads 1,2, it tells the best one for each batch size.
    """
    with importing():
        from qexp.pipeline.jobs import run_latency

    return run_latency(config, model_uri)


if __name__ == "__main__":
    run_alone(latency)
