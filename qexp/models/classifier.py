"""The classifiers: a network with its normalisation as first layer, whatever network `--model` names.

A classifier takes float images in [0, 1], [N, 3, H, W] RGB or [N, 1, H, W] grey, and gives logits [N, classes]. Its
weights file (safetensors, no pickle) says how to rebuild the module: `load_classifier` needs nothing else, but the
code of a network that comes from a package or from the user.
"""

import json
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.errors import InputError, first_line
from qexp.files import replacing
from qexp.models.names import TIMM, is_factory, is_file, is_model_name, is_program
from qexp.models.networks import build_network, builds_without_memory
from qexp.models.preprocessing import Preprocessing, Shape
from qexp.models.program import program_bytes, program_from

STATISTICS_BATCH = 1024  # images that are counted at a time
MOST_PIXELS = 65_536  # of a side of the images, of whatever model
PROGRAM = "program"  # in a weights file: the exported program of a network that has no other code, as bytes
NO_CHECK = 1e-3  # share of the largest logit by which those of an image may differ with the batch that it is in


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
    """(x - mean) / std per channel; part of the model, so that nobody can feed it wrongly normalised images.

    With `bgr`, the channels change their order first: mean and std are those of blue, green and red.
    """

    def __init__(self, mean: Tensor, std: Tensor, bgr: bool = False) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.bgr = bgr
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).float().clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).float().clone())

    def forward(self, images: Tensor) -> Tensor:
        if self.bgr:
            images = images.flip(1)
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Normalisation and a network; `spec` says which.

    Args:
        mean, std: of each channel, or one for all, on the scale 0 to 1, in the order that the network expects.
        network: what `build_network` gives for the spec; None builds it.
    """

    def __init__(self, spec: ModelSpec, mean: Tensor, std: Tensor, network: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.shape[0]
        self.normalize = Normalize(mean.expand(channels), std.expand(channels), spec.preprocessing.channels == "bgr")
        self.network = network or build_network(spec.architecture, len(spec.classes), spec.shape)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


class ImageBatches(Protocol):
    """Images [N, C, H, W], uint8 or float in [0, 1]: a tensor, or what decodes its batches when they are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def split(self, batch_size: int, /) -> Iterable[Tensor]:
        """All of them in order, so many at a time."""


def build_classifier(spec: ModelSpec, train_images: ImageBatches) -> Classifier:
    """A classifier with fresh weights (torch's global seed). What its preprocessing does not say of mean and standard
    deviation are the statistics of uint8 `train_images`.

    Raises:
        InputError: the name is unknown, or the architecture cannot take such images.
    """
    model = Classifier(spec, *normalization(spec.preprocessing, train_images))
    _check_images(model, spec)
    return model


def normalization(preprocessing: Preprocessing, images: ImageBatches | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel as `Classifier` takes them: for values on the scale 0 to 1, into which the
    input range of the network is folded.

    Args:
        images: uint8 RGB or grey, whose statistics take the place of what is not given; None: mean 0 and deviation 1
            on the scale of the network, which is then given its values as they are.

    Raises:
        InputError: `mean` or `std` has another number of values than the images have channels, or is no such number.
    """
    low, high = preprocessing.input_range
    if not (math.isfinite(low) and math.isfinite(high) and low != high):
        raise InputError(f"--input-range {low:g},{high:g}: must be two different numbers, for black and white")
    mean, std = (_of_channels(preprocessing, option) for option in ("mean", "std"))
    if images is not None and (mean is None or std is None):
        of_images = channel_statistics(images)
        own_mean, own_std = (value.flip(0) if preprocessing.channels == "bgr" else value for value in of_images)
    else:
        own_mean, own_std = (torch.tensor([value]) for value in (-low / (high - low), 1 / (high - low)))
    return (
        own_mean if mean is None else ((mean - low) / (high - low)).float(),
        own_std if std is None else (std / (high - low)).float(),
    )


def _of_channels(preprocessing: Preprocessing, option: str) -> Tensor | None:
    given: tuple[float, ...] | None = getattr(preprocessing, option)
    if given is None:
        return None
    text, channels = ",".join(f"{value:g}" for value in given), preprocessing.shape[0]
    if len(given) not in (1, channels):
        raise InputError(f"--{option} {text}: must be one number, or {channels}, one a channel")
    if not all(map(math.isfinite, given)) or (option == "std" and min(given) <= 0):
        raise InputError(f"--{option} {text}: must be numbers{' above 0' if option == 'std' else ''}")
    return torch.tensor(given, dtype=torch.float64)


def channel_statistics(images: ImageBatches) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images [N, 1 or 3, H, W], on the scale 0 to 1.

    From a histogram of the 256 values: exact, and the same on every machine. A constant channel gets deviation 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for batch in images.split(STATISTICS_BATCH):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in batch.unbind(1)])
    shares = counts.double()
    shares /= shares.sum(dim=1, keepdim=True)
    mean = shares @ values
    deviation = (shares @ values**2 - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(deviation < 1e-4, torch.ones(()), deviation).float()


def outline(spec: ModelSpec) -> nn.Module:
    """The network's modules, as far as possible without memory for their weights.

    Raises:
        InputError: the architecture cannot take images of this size.
    """
    architecture, classes = spec.architecture, len(spec.classes)
    try:
        with torch.device("meta") if builds_without_memory(architecture) else nullcontext():
            network = build_network(architecture, classes, spec.shape)
    except NotImplementedError:  # RegNets calculate their widths with tensors
        network = build_network(architecture, classes, spec.shape)
    _check_images(network, spec)
    return network


def check_network(network: nn.Module, spec: ModelSpec) -> None:
    """Raise InputError unless a network of others, in evaluation mode, gives a logit for each class, the same for an
    image alone and among others. It is called with random images in [0, 1]."""
    model = f"--model {spec.architecture}"
    _check_images(network, spec)
    images = torch.rand(3, *spec.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            logits, alone = network(images), torch.cat([network(image[None]) for image in images])
        except Exception as error:  # of its code
            raise InputError(f"{model}: takes no batch of 3 images ({first_line(error)})") from None
    if not logits.isfinite().all():
        raise InputError(f"{model}: gives logits that are NaN or infinite for an image of random pixels")
    if (logits - alone).abs().max() > NO_CHECK * logits.abs().max():
        why = "was it exported in training mode?" if is_program(spec.architecture) else "does it use training mode?"
        raise InputError(f"{model}: gives an image other logits when it is alone than among others; {why}")


def _check_images(network: nn.Module, spec: ModelSpec) -> None:
    """Raise InputError unless the network takes an image of the spec and gives a row of logits, one a class."""
    if (count := count_logits(network, spec)) != len(spec.classes):
        raise InputError(
            f"--model {spec.architecture}: gives {count} logits, and the data have {len(spec.classes)} classes"
        )


def count_logits(network: nn.Module, spec: ModelSpec) -> int:
    """How many logits the network gives for an image of the spec, whatever its classes.

    Raises:
        InputError: it takes no such image, or gives no row of logits.
    """
    model, size = f"--model {spec.architecture}", spec.preprocessing.size_text
    device = next((parameter.device for parameter in network.parameters()), None)
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, *spec.shape, device=device))
    except Exception as error:  # what architectures raise at a size they cannot take, and any code
        if (channels := _channels_expected(network)) not in (None, spec.shape[0]):
            given = "give --channels grey" if channels == 1 else "--channels grey is not for it"
            raise InputError(f"{model}: takes images of {channels} channels, not of {spec.shape[0]}; {given}") from None
        raise InputError(f"--image-size {size}: not for {model} ({first_line(error)})") from None
    if not isinstance(logits, Tensor):
        raise InputError(f"{model}: must give a tensor of logits, and gives a {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != 1 or not logits.is_floating_point():
        shape = list(logits.shape)
        raise InputError(f"{model}: must give float logits [1, classes] for an image, and gives {logits.dtype} {shape}")
    return logits.shape[1]


def _channels_expected(network: nn.Module) -> int | None:
    """Of the images that the first convolution takes."""
    return next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), None)


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


def save_classifier(model: Classifier, file: Path) -> None:
    """Write weights and spec as safetensors; `file` is never half written.

    Raises:
        StageError: it cannot be written.
    """
    spec = json.dumps(asdict(model.spec))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if is_program(model.spec.architecture):  # the network's only code
        program = program_bytes(model.network, torch.zeros(2, *model.spec.shape))
        tensors[PROGRAM] = torch.frombuffer(bytearray(program), dtype=torch.uint8)
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
    if is_file(spec.architecture):
        known = is_program(spec.architecture) and PROGRAM in state
    else:
        known = is_model_name(spec.architecture)
    if not known:
        raise InputError(f"weights file {file}: of an unknown architecture, {spec.architecture[:80]!r}")
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
        NotImportable: the code of its network, package.module:factory, is not to be found from here.
        InputError: the file is not one of ours, or the network's package or code is not there as it was.
    """
    spec, state = read_weights(file)
    program = state.pop(PROGRAM, None)
    network = None if program is None else program_from(program.numpy().tobytes())
    model = Classifier(spec, torch.zeros(1), torch.ones(1), network)
    fresh = model.state_dict()  # carries the layers' version numbers, which some of torchvision's modules insist on
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in fresh.items()}:
        raise InputError(f"weights file {file}: not those of {spec.architecture} {_in_its_code(spec.architecture)}")
    fresh.update(state)
    model.load_state_dict(fresh, assign=network is not None)
    return model.eval()


def _in_its_code(architecture: str) -> str:
    if is_factory(architecture):
        return "as its code is now"
    return f"in this {'timm' if architecture.startswith(TIMM) else 'torchvision'}"
