"""A network whose layers torch.fx does not find, with layers: rebuilt from its exported program, then cleaned up.

Feeds engine fx and `measure_sensitivity`, which know a layer as a module.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qexp.errors import first_line
from qexp.models.exported import as_layers
from qexp.progress import say
from qexp.quantization.cleanup import clean

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
FUNCTIONS = (F.conv1d, F.conv2d, F.linear)


def calls_functions(model: nn.Module, example: Tensor) -> bool:
    """Whether its `forward` convolves or multiplies by functions of torch.nn.functional, in no layer of torch.nn.

    Args:
        model: in evaluation mode.
        example: float images [N, C, H, W].
    """
    with torch.no_grad(), _Functions(model) as watch:
        model(example)
    return watch.found


class _Functions(TorchFunctionMode):
    """Sees what is called outside of the layers of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found, self._model, self._entered = False, model, 0

    def __enter__(self) -> Self:
        layers = [one for one in self._model.modules() if isinstance(one, LAYERS)]
        self._hooks = [layer.register_forward_pre_hook(lambda *_: self._enter(1)) for layer in layers]
        self._hooks += [layer.register_forward_hook(lambda *_: self._enter(-1)) for layer in layers]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, change: int) -> None:
        self._entered += change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in FUNCTIONS and not self._entered
        return func(*args, **(kwargs or {}))


def with_layers(model: nn.Module, example: Tensor, fold_pool: bool) -> nn.Module | None:
    """A copy whose convolutions and linear layers are modules of the same names; None where torch.export cannot tell.

    Args:
        model: in evaluation mode.
        example: float images [N, C, H, W].
    """
    try:
        return clean(as_layers(model, example), example, fold_pool)
    except Exception as error:  # export raises whatever the model's Python code does when it meets a symbol
        say(f"torch.export does not tell the layers of this model: {first_line(error)}")
        return None
