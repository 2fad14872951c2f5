"""`from qexp.models.vision import torchvision`: the import that works beside a CPU build of torch.

A torchvision wheel built against CUDA cannot load its compiled operators next to a CPU-only torch of the same version,
and its own import then fails because it registers fake kernels for `torchvision::nms` and `qnms`, which nobody has
declared. Declaring the two schemas first is enough: qexp uses neither (they are for detection models).
"""

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "DEF")  # kept: dropping it takes the schemas back
    _library.define("nms" + _SCHEMA)
    _library.define("qnms" + _SCHEMA)
    import torchvision

__all__ = ["torchvision"]
