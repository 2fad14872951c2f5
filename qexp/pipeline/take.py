"""A model that was trained elsewhere takes the place of a training: it is loaded, evaluated, and can be registered.

Plain functions: a configuration, a data set and perhaps a module go in, `NewModel` comes out, as from train.py.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config import Config
from qexp.data.datasets import Dataset, Split, calibration_count, calibration_subset
from qexp.data.duplicates import Duplicates
from qexp.errors import InputError, first_line
from qexp.measurement.accuracy import predict_logits, to_float
from qexp.measurement.cost import layer_table
from qexp.measurement.host import Host
from qexp.models.classifier import ModelSpec
from qexp.models.external import check_weights, load_external, source_facts
from qexp.models.names import OBJECT, is_onnx_file
from qexp.models.preprocessing import Preprocessing, preprocessing_of
from qexp.models.program import as_network
from qexp.models.published import own_classes, own_preprocessing
from qexp.models.taken import is_onnx, wrap
from qexp.pipeline.measure import predict_splits
from qexp.pipeline.train import accuracy_of, data_facts, lineage, verification_images
from qexp.progress import say
from qexp.report.results import Fp32Evidence
from qexp.tracking.plain import load_plain, registered_input
from qexp.tracking.results import NewModel


def take(config: Config, dataset: Dataset, module: nn.Module | None = None) -> Any:
    """The model that `config` names, or `module`, with its preprocessing as first layer and its `spec`.

    Raises:
        InputError: there is none, its weights do not fit, it does not take such images, or it gives another number of
            logits than the data have classes.
    """
    preprocessing = preprocessing_of(config.data, config.preprocess)
    if module is not None:
        return _wrapped(module, config, dataset, preprocessing)
    if config.model.startswith("models:/"):
        with tempfile.TemporaryDirectory() as folder:
            found = load_plain(config.model, Path(folder))
            if isinstance(found, nn.Module):
                return _wrapped(found, config, dataset, preprocessing)
            return _onnx(found, config, dataset, preprocessing)
    if is_onnx_file(config.model):
        check_weights(config)
        return _onnx(Path(config.model), config, dataset, preprocessing)
    return load_external(config, _classes(config, dataset), preprocessing)


def _wrapped(module: nn.Module, config: Config, dataset: Dataset, preprocessing: Preprocessing) -> Any:
    module, classes = as_network(module), dataset.classes
    if not classes:
        try:
            logits = predict_logits(module.eval(), torch.zeros(2, *preprocessing.shape))
        except Exception as error:  # of the module's own code
            raise InputError(f"model: does not take images {list(preprocessing.shape)} ({first_line(error)})") from None
        classes = _numbers(logits.shape[1])
    return wrap(module, ModelSpec(config.model, classes, preprocessing))


def _onnx(file: Path, config: Config, dataset: Dataset, preprocessing: Preprocessing) -> Any:
    from qexp.models.onnx_input import read_onnx

    network = read_onnx(file, preprocessing)
    classes = dataset.classes or _numbers(network.classes)
    if network.classes != len(classes):
        allowed = f"gives {network.classes} logits, and the data have {len(classes)} classes"
        raise InputError(f"--model {config.model}: {allowed}")
    for note in network.notes:
        say(f"{config.model}: {note}")
    network.spec = ModelSpec(config.model, classes, preprocessing)  # type: ignore[assignment]
    return network


def _classes(config: Config, dataset: Dataset) -> tuple[str, ...]:
    """Those of the data; where these have none, those that the weights are known to have, or none."""
    return dataset.classes or own_classes(config.model, config.weights) or ()


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def own_preprocessing_of(config: Config) -> Preprocessing | None:
    """What the model that `config` names is known to be given; None where nothing is known.

    Raises:
        InputError: there are no such weights, or the file is no image classifier.
    """
    if config.model.startswith("models:/"):
        return registered_input(config.model)
    if not is_onnx_file(config.model):
        return own_preprocessing(config.model, config.weights)
    from qexp.models.onnx_input import own_size

    channels, height, width = own_size(Path(config.model))
    size = config.data.size_px
    return Preprocessing(height or size[0], width or size[1], channels="grey" if channels == 1 else "rgb")


def take_model(config: Config, host: Host, dataset: Dataset, model: Any) -> NewModel:
    """Evaluate what `take` has given on the test images, and on the validation images where there are any."""
    splits = tuple(name for name in ("validation", "test") if len(getattr(dataset, name)))
    logits = predict_splits(model, dataset, "fp32", splits)
    answered = with_answers(dataset, model.spec, logits)
    accuracy = accuracy_of(logits, answered)
    source = {"trained": "elsewhere"} | _source(config, model)
    evidence = Fp32Evidence(
        config.model,
        config.seed,
        version_uri="",
        size_bytes=0,
        data=replace(data_facts(answered, config, _duplicates(config, answered)), labelled=dataset.test.is_labelled),
        train=None,
        accuracy=accuracy,
        source=source,
        preprocessing=model.spec.preprocessing,
    )
    sample = verification_images(dataset)
    with torch.no_grad():
        expected = model(to_float(sample))
    tags = lineage(answered, host, accuracy) | source
    tags |= {"flavor": "onnx"} if is_onnx(model) else {}
    stored = model.canonical if is_onnx(model) else model
    return NewModel(evidence, stored, model.spec, sample, expected, logits, tags, layer_table(model, model.spec.shape))


def _duplicates(config: Config, dataset: Dataset) -> Duplicates:
    """Equal images among those in use: of the training images, those that a calibration takes."""
    images = dataset.train if dataset.calibration is None else dataset.calibration
    if len(images):
        images, _ = calibration_subset(images, calibration_count(config.quantize, images), config.seed)
    return replace(dataset, train=images).duplicates


def with_answers(dataset: Dataset, spec: ModelSpec, logits: dict[str, Tensor]) -> Dataset:
    """The same data with the model's classes; test images without labels get the answers of the fp32 model, so that
    accuracy is agreement with it.

    Args:
        logits: of the fp32 model, by split.
    """
    dataset = dataset.with_classes(len(spec.classes))
    if dataset.test.is_labelled:
        return dataset
    return replace(dataset, test=Split(dataset.test.images, logits["test"].argmax(1)))


def _source(config: Config, model: Any) -> dict[str, str]:
    """Where it came from: of a module that was given, only what it is."""
    if model.spec.architecture.startswith(OBJECT):
        of = config.model if config.model.startswith("models:/") else "a module given in Python"
        return {"architecture": type(model.network).__name__, "code": of}
    if config.model.startswith("models:/"):
        return {"architecture": config.model, "code": "ONNX"}
    return source_facts(config)
