"""qexp answers one question with evidence: can this image classifier ship as int8 on this CPU?

The public functions, all in qexp/api.py; none needs a server, and `import qexp` alone imports nothing else:

- `check`: the whole answer for a model that was trained elsewhere
- `run`: the same, where the model may also be trained first, or be a registered version
- `quantize`: an int8 model from an fp32 module and images
- `compare`: the accuracy of both, the drop with its interval
- `benchmark`: latency of several models, timed in turns
- `cost`: parameters, multiply-accumulates, the share in int8
- `register`: a model into the MLflow registry, verified in a clean subprocess
- `load`: a registered model as a function of images

The packages are the stages, in the order in which data passes through them; each imports only packages before it:
models > measurement > data > quantization > training > report > tracking > pipeline > search.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexp.api import benchmark, check, compare, cost, load, quantize, register, run

__version__ = "0.1.0"
__all__ = ["benchmark", "check", "compare", "cost", "load", "quantize", "register", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qexp import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
