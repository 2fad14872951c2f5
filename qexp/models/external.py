"""A classifier that was trained elsewhere: the network that `--model` names, with the weights that `--weights` names,
and what is registered about where both came from.
"""

from importlib.metadata import version
from pathlib import Path

from qexp.config import Config
from qexp.errors import InputError
from qexp.models import names
from qexp.models.checkpoints import classes_of_weights, load_weights_into, read_checkpoint
from qexp.models.classifier import Classifier, ModelSpec, check_network, count_logits, normalization
from qexp.models.factories import source_file
from qexp.models.networks import build_network
from qexp.models.preprocessing import Preprocessing
from qexp.models.published import is_published, published_file, published_weights, sha256_of


def load_external(
    config: Config, classes: tuple[str, ...], preprocessing: Preprocessing, new_head: bool = False
) -> Classifier:
    """The classifier in evaluation mode, as it was trained, after it has answered for random images.

    Without mean or deviation in `preprocessing`, the network is given values as they are, on its input range.

    Args:
        classes: the names of the classes of the data, in the order of the logits. Where the data have none, the model
            says how many there are, and their numbers are the names.
        new_head: for training from weights of another number of classes: the last layer keeps its fresh weights.

    Raises:
        InputError: model, weights, classes or images do not fit each other, or one of them is not there.
    """
    model, weights = config.model, config.weights
    check_weights(config)
    network = build_network(model, len(classes) or None, preprocessing.shape)
    architecture = Path(model).name if names.is_file(model) else model
    count = len(classes) or count_logits(network, ModelSpec(architecture, (), preprocessing))
    if weights is not None:
        by_name = is_published(weights)
        state = published_weights(model, weights) if by_name else read_checkpoint(Path(weights))
        if not classes and (theirs := classes_of_weights(network, state, count)):
            network, count = build_network(model, theirs, preprocessing.shape), theirs
        load_weights_into(network, state, weights, count, new_head)
    spec = ModelSpec(architecture, classes or tuple(map(str, range(count))), preprocessing)
    classifier = Classifier(spec, *normalization(preprocessing, None), network).eval()
    for parameter in classifier.parameters():
        parameter.requires_grad_(not names.is_program(model))
    check_network(classifier, spec)
    return classifier


def check_weights(config: Config) -> None:
    """Raise InputError where a model has its weights inside and others are given, or has none and none are given."""
    model, weights = config.model, config.weights
    if names.is_file(model) and weights is not None:
        raise InputError(f"--weights {weights}: must be left out; {model} has its weights inside")
    if weights is None and not (names.is_file(model) or names.is_factory(model)):
        raise InputError(f"--weights: must be given for --model {model}, which has none: a file, or DEFAULT")


def is_external(config: Config) -> bool:
    """Whether the model is not to be trained from fresh weights: it has its own, or is given some."""
    return config.weights is not None or names.is_file(config.model)


def source_facts(config: Config) -> dict[str, str]:
    """Where a classifier that `load_external` gave came from: tags of its version.

    `architecture` is what `--model` said; `code` the package with its version, or the file of the module, whose
    digest is `code_sha256`; `checkpoint` the file of the weights, and `checkpoint_sha256` its digest.
    """
    model, weights = config.model, config.weights
    facts = {"trained": "elsewhere", "architecture": model} | _code(model)
    if names.is_file(model):
        checkpoint = Path(model)
    elif weights is None:
        return facts | {"checkpoint": "none: weights as the code makes them"}
    else:
        checkpoint = published_file(model, weights) if is_published(weights) else Path(weights)
        facts |= {"weights": weights} if is_published(weights) else {}
    return facts | {"checkpoint": checkpoint.name, "checkpoint_sha256": sha256_of(checkpoint)}


def _code(model: str) -> dict[str, str]:
    if names.is_file(model):
        return {"code": "exported program" if names.is_program(model) else "ONNX"}
    if names.is_factory(model):
        file = source_file(model)
        return {"code": file.name, "code_sha256": sha256_of(file)} if file and file.is_file() else {"code": "no file"}
    package = "timm" if model.startswith(names.TIMM) else "qexp" if model == "smallnet" else "torchvision"
    return {"code": f"{package} {version(package)}"}
