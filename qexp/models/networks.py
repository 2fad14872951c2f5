"""The networks that `--model` names, without weights of others: SmallNet, torchvision's and timm's classifiers, and
those that code or an exported program of the user's own gives.

Feeds classifier.py, which puts the normalisation before them.
"""

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from qexp.errors import InputError, first_line
from qexp.foundation.extras import extra
from qexp.models import names
from qexp.models.factories import IMAGENET_CLASSES, build_from_factory
from qexp.models.preprocessing import Shape
from qexp.models.program import load_program

SMALLNET_BLOCKS = ((32, 64), (64, 128), (128, 128))  # channels of the 3x3 convolutions; a 2x2 max-pool between blocks
VIT_SIDE_PX = 224  # which torchvision builds its vision transformers for, and qexp too up to there


def build_network(model: str, classes: int | None, shape: Shape) -> nn.Module:
    """A network with fresh weights (torch's global seed), or with its own where it is a file.

    Args:
        model: as `--model` names it.
        classes: how many logits it is to give; that it does is not checked here. None: as many as it gives by itself,
            or as ImageNet has classes.
        shape: of an image.

    Raises:
        InputError: there is no such network, or its code fails.
    """
    if names.is_factory(model) and not model.startswith(names.TIMM):
        return build_from_factory(model, classes)
    classes = classes or IMAGENET_CLASSES
    if model == "smallnet":
        return _smallnet(classes, shape[0])
    if names.is_program(model):
        return load_program(Path(model))
    if names.is_file(model):
        raise InputError(f"--model {model}: an ONNX file has no layers to train or to quantize with torch")
    if model.startswith(names.TIMM):
        return _from_timm(model, classes, shape)
    return _from_torchvision(model, classes, shape)


def builds_without_memory(model: str) -> bool:
    """Whether the network can be built on the device meta: code of others need not be able to."""
    return not (names.is_file(model) or names.is_factory(model) or model.startswith(names.TIMM))


def _from_torchvision(model: str, classes: int, shape: Shape) -> nn.Module:
    from qexp.models.vision import torchvision

    options: dict[str, Any] = {"num_classes": classes, "weights": None}
    if model in ("googlenet", "inception_v3"):  # their auxiliary heads would make training return a tuple
        options |= {"aux_logits": False, "init_weights": True}
    if model.startswith("vit_") and _larger_vit(model, shape):
        options["image_size"] = shape[1]
    network: nn.Module = torchvision.models.get_model(model, **options)
    if isinstance(network, torchvision.models.SqueezeNet):
        # torchvision starts its last convolution at a deviation of 0.01. Without any norm, little of the gradient then
        # reaches the layers before it: 77 instead of 89 % on the digits after 20 epochs.
        nn.init.kaiming_normal_(network.classifier[1].weight, nonlinearity="relu")
    return network


def _larger_vit(model: str, shape: Shape) -> bool:
    """Whether a vision transformer is to be built for larger images than torchvision does by itself."""
    side, patch = shape[1], int(model.rpartition("_")[2])
    return shape[1] == shape[2] > VIT_SIDE_PX and side % patch == 0


def _from_timm(model: str, classes: int, shape: Shape) -> nn.Module:
    """With as many input channels as the images have, and built for their size where it has a fixed one."""
    name = model.removeprefix(names.TIMM)
    timm = import_timm(model)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ": see timm.list_models()"
        raise InputError(f"--model {model}: timm {timm.__version__} has no such model{hint}")
    fixed = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
    options: dict[str, Any] = {"img_size": shape[1:]} if fixed else {}
    try:
        network: nn.Module = timm.create_model(name, num_classes=classes, in_chans=shape[0], **options)
    except Exception as error:  # of its code, at a size or a number of channels that it cannot take
        size = f"{shape[0]}x{shape[1]}x{shape[2]}"
        raise InputError(f"--model {model}: timm cannot build it for images of {size} ({first_line(error)})") from None
    return network


def import_timm(model: str) -> Any:
    """The package timm; InputError where it is not installed."""
    import qexp.models.vision  # noqa: F401  # without which torchvision, and so timm, may not load

    with extra("timm", f"--model {model}"):
        import timm
    return timm


def _smallnet(classes: int, channels: int) -> nn.Sequential:
    """Six 3x3 conv-BN-ReLU layers in three blocks, global average pool, one linear layer: 0.43 M parameters."""
    layers: list[nn.Module] = []
    for index, block in enumerate(SMALLNET_BLOCKS):
        for width in block:
            conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if index < len(SMALLNET_BLOCKS) - 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
