"""The classifiers: SmallNet, VGG16 and any other torchvision classifier, each with its normalisation as first layer.

A classifier takes float images in [0, 1], [N, 3, H, W], and gives logits [N, classes]. Its weights file (safetensors,
no pickle) says how to rebuild the module: `load_classifier` needs nothing else.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.errors import InputError, first_line
from qexp.files import replacing
from qexp.models.names import check_model_name
from qexp.models.preprocessing import Preprocessing, Shape

MOST_PIXELS = 65_536  # of a side of the images, of whatever model
SMALLNET_BLOCKS = ((32, 64), (64, 128), (128, 128))  # channels of the 3x3 convolutions; a 2x2 max-pool between blocks


@dataclass(frozen=True)
class ModelSpec:
    """What rebuilds a classifier: architecture, class names in the order of the logits, and the images it is given."""

    architecture: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def shape(self) -> Shape:
        """Of one image."""
        return self.preprocessing.shape


class Normalize(nn.Module):
    """(x - mean) / std per channel; part of the model, so that nobody can feed it wrongly normalised images."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.view(1, 3, 1, 1).float())
        self.register_buffer("std", std.view(1, 3, 1, 1).float())

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Normalisation and a network; `spec` says which."""

    def __init__(self, spec: ModelSpec, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.normalize = Normalize(mean, std)
        self.network = _build_network(spec)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


def build_classifier(spec: ModelSpec, train_images: Tensor) -> Classifier:
    """A classifier with fresh weights (torch's global seed), normalised by the statistics of uint8 `train_images`.

    Raises:
        InputError: the name is unknown, or the architecture cannot take images of this size.
    """
    mean, std = channel_statistics(train_images)
    model = Classifier(spec, mean, std)
    _check_image_size(model, spec)
    return model


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images [N, 3, H, W], on the scale 0 to 1.

    From a histogram of the 256 values: exact, and the same on every machine. A constant channel gets deviation 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    shares /= shares.sum(dim=1, keepdim=True)
    mean = shares @ values
    deviation = (shares @ values**2 - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(deviation < 1e-4, torch.ones(()), deviation).float()


def outline(spec: ModelSpec) -> nn.Module:
    """The network's modules, as far as possible without memory for their weights.

    Raises:
        InputError: the architecture cannot take images of this size.
    """
    try:
        with torch.device("meta"):
            network = _build_network(spec)
    except NotImplementedError:  # RegNets calculate their widths with tensors
        network = _build_network(spec)
    _check_image_size(network, spec)
    return network


def _check_image_size(network: nn.Module, spec: ModelSpec) -> None:
    try:
        with torch.no_grad():
            device = next(network.parameters()).device
            network.eval()(torch.zeros(1, *spec.shape, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:  # what architectures raise at a size they cannot take
        raise InputError(
            f"--image-size {spec.preprocessing.size_text}: not for --model {spec.architecture} ({first_line(error)})"
        ) from None


def needs_two_images(network: nn.Module, shape: Shape) -> bool:
    """Whether a training step needs more than one image: batch norm has no variance of a single value, which is what
    one image leaves of each channel on a map of one pixel.

    Args:
        network: as `outline` gives it, or another one that may be changed.
    """
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network.train()(torch.zeros(1, *shape, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return True
    finally:
        network.eval()
    return False


def repeated_inputs(model: Classifier) -> int:
    """How many equal copies of each value the first linear layer of a VGG sees.

    Its adaptive pool makes a 7x7 map of whatever comes in; from a 1x1 map (32x32 images) that is 49 copies, which get
    49 equal gradients: as if that layer's learning rate were 49 times the configured one.
    """
    network = model.network
    pool = getattr(network, "avgpool", None)
    if not (type(network).__name__ == "VGG" and isinstance(pool, nn.AdaptiveAvgPool2d)):
        return 1
    image = torch.zeros(1, *model.spec.shape, device=next(network.parameters()).device)
    with torch.no_grad():
        shape = network.get_submodule("features")(image).shape
    return 49 if shape[2:] == (1, 1) else 1


def _build_network(spec: ModelSpec) -> nn.Module:
    if spec.architecture == "smallnet":
        return _smallnet(len(spec.classes))
    from qexp.models.vision import torchvision

    options: dict[str, Any] = {"num_classes": len(spec.classes), "weights": None}
    if spec.architecture in ("googlenet", "inception_v3"):  # their auxiliary heads would make training return a tuple
        options |= {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(spec.architecture, **options)
    if isinstance(network, torchvision.models.SqueezeNet):
        # torchvision starts its last convolution at a deviation of 0.01. Without any norm, little of the gradient then
        # reaches the layers before it: 77 instead of 89 % on the digits after 20 epochs.
        nn.init.kaiming_normal_(network.classifier[1].weight, nonlinearity="relu")
    return network


def _smallnet(classes: int) -> nn.Sequential:
    """Six 3x3 conv-BN-ReLU layers in three blocks, global average pool, one linear layer: 0.43 M parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for index, block in enumerate(SMALLNET_BLOCKS):
        for width in block:
            conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if index < len(SMALLNET_BLOCKS) - 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def save_classifier(model: Classifier, file: Path) -> None:
    """Write weights and spec as safetensors; `file` is never half written.

    Raises:
        StageError: it cannot be written.
    """
    spec = json.dumps(asdict(model.spec))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata={"qexp": spec})


def read_weights(file: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """What `save_classifier` wrote: the spec, and the weights by name. Nothing is built from it.

    Raises:
        InputError: the file is not one of ours.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            spec = _parse_spec((opened.metadata() or {})["qexp"])
            state = {name: opened.get_tensor(name) for name in opened.keys()}
    except KeyError:
        raise InputError(f"weights file {file}: not written by qexp (it does not say of which model)") from None
    except ValidationError as error:
        why = error.errors()[0]
        what = " ".join(map(str, ("its model", *why["loc"])))
        raise InputError(f"weights file {file}: not written by qexp ({what}: {why['msg']})") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"weights file {file}: not written by qexp ({first_line(error)})") from None
    try:
        check_model_name(spec.architecture)
    except InputError:
        raise InputError(f"weights file {file}: of an unknown architecture, {spec.architecture[:80]!r}") from None
    if not (spec.classes and all(1 <= side <= MOST_PIXELS for side in spec.shape[1:])):
        allowed = f"must have a class or more, and sides of 1 to {MOST_PIXELS} pixels"
        size = spec.preprocessing.size_text
        raise InputError(f"weights file {file}: its model has {len(spec.classes)} and {size}; {allowed}")
    return spec, state


def _parse_spec(text: str) -> ModelSpec:
    """What `save_classifier` wrote; files of earlier versions have the length of a side for the preprocessing."""
    values = json.loads(text)
    if isinstance(values, dict) and "image_size" in values:
        size = values.pop("image_size")
        values["preprocessing"] = {"height_px": size, "width_px": size}
    return TypeAdapter(ModelSpec).validate_json(json.dumps(values), strict=True)


def load_classifier(file: Path) -> Classifier:
    """Rebuild the classifier that `save_classifier` wrote, in evaluation mode.

    Raises:
        InputError: the file is not one of ours.
    """
    spec, state = read_weights(file)
    model = Classifier(spec, torch.zeros(3), torch.ones(3))
    fresh = model.state_dict()  # carries the layers' version numbers, which some of torchvision's modules insist on
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in fresh.items()}:
        raise InputError(f"weights file {file}: not those of {spec.architecture} in this torchvision")
    fresh.update(state)
    model.load_state_dict(fresh)
    return model.eval()
