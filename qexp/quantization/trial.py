"""Engines tried on an untrained network, which takes seconds, before a training takes hours. Feeds pipeline/setup.py.

Whether an engine takes a network depends on its operations and on the size of the images, not on its weights.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import StageError
from qexp.measurement.accuracy import to_float
from qexp.quantization import quantize_model

IMAGES = 4  # calibration images of a trial


def refusals(
    network: nn.Module, images: Tensor, options: QuantizeConfig, engines: Sequence[str], reduce_range: bool
) -> dict[str, str]:
    """Why some of these engines do not take a network, by engine; those that take it are not among them.

    Args:
        network: a classifier, which stays as it is; its weights do not matter.
        images: uint8 [N, 3, H, W], of which a few are used.
        options, reduce_range: of the quantization, but for what only the values of activations depend on.

    Raises:
        InputError: a package of an engine is not installed.
    """
    settled, found = settle(network, images[:IMAGES]), dict[str, str]()
    for engine in engines:
        chosen = options.only(engine).model_copy(update={"observer": "minmax"})
        try:
            quantize_model(settled, images[:IMAGES], chosen, reduce_range)
        except StageError as error:
            found[engine] = str(error)
    return found


def settle(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose logits depend on the image: batch norm has the statistics of these images, uint8 [N, 3, H, W], and
    no layer has weights of zeros, which some begin with.
    """
    settled = copy.deepcopy(network)
    norms = [module for module in settled.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for parameter in settled.parameters():
        if parameter.dim() == 2 and not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.02)
    if norms and len(images) > 1:  # of one image and one pixel there are no statistics
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            settled.train()(to_float(images))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return settled.eval()
