"""qexp answers one question with evidence: can this image classifier ship as int8 on this CPU?

Read the modules as the data flows: config > data > models > training > quantization > evaluation > cost > latency >
tracking > registry > plots > report, called in this order by pipeline.
"""

from typing import Any

__version__ = "0.1.0"


def load(uri: str) -> Any:
    """The registered model at `uri` as a function of images, with the int8 kernels that won when it was measured.

    `mlflow.pytorch.load_model(uri)` gives the same outputs; this sets the engine recorded in the version's tags first,
    because TorchScript packs int8 weights at load, for whatever engine the process has chosen. A version of engine
    `onnx` is run by ONNX Runtime, on as many threads as torch.
    """
    from qexp.registry import load_version

    return load_version(uri)
