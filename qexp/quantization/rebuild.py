"""A network whose layers torch.fx does not find, with layers: rebuilt from its exported program, then cleaned up.

Feeds engine fx and `measure_sensitivity`, which know a layer as a module.
"""

from torch import Tensor, nn

from qexp.errors import first_line
from qexp.models.exported import as_layers
from qexp.progress import say
from qexp.quantization.cleanup import clean


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
