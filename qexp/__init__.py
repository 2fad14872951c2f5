"""qexp answers one question with evidence: can this image classifier ship as int8 on this CPU?

The packages are the stages, in the order in which data passes through them; each imports only packages before it:
models > measurement > data > quantization > training > report > tracking > pipeline > search.
"""

from typing import Any

__version__ = "0.1.0"


def load(uri: str) -> Any:
    """The registered model at `uri` as a function of images, with the int8 kernels that won when it was measured.

    `mlflow.pytorch.load_model(uri)` gives the same outputs; this sets the engine recorded in the version's tags first,
    because TorchScript packs int8 weights at load, for whatever engine the process has chosen. A version of engine
    `onnx` is run by ONNX Runtime, on as many threads as torch.
    """
    from qexp.tracking.registry import load_version

    return load_version(uri)
