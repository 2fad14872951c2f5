"""A model that was trained elsewhere takes the place of a training: it is loaded, evaluated, and can be registered.

Plain functions: a configuration, a data set and perhaps a module go in, `NewModel` comes out, as from train.py.
"""

from typing import Any

import torch
from torch import nn

from qexp.config import Config
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import to_float
from qexp.measurement.cost import layer_table
from qexp.measurement.host import Host
from qexp.models.classifier import ModelSpec
from qexp.models.external import load_external, source_facts, wrap
from qexp.models.preprocessing import preprocessing_of
from qexp.models.taken import is_onnx
from qexp.pipeline.measure import predict_splits
from qexp.pipeline.train import accuracy_of, data_facts, lineage, verification_images
from qexp.report.results import Fp32Evidence
from qexp.tracking.results import NewModel


def take(config: Config, dataset: Dataset, module: nn.Module | None = None) -> Any:
    """The model that `config` names, or `module`, with its preprocessing as first layer; nothing is computed with it
    but one image.

    Raises:
        InputError: there is none, its weights do not fit, it does not take such images, or it gives another number of
            logits than the data have classes.
    """
    preprocessing = preprocessing_of(config.data, config.preprocess)
    if module is not None:
        return wrap(module, ModelSpec(config.model, dataset.classes, preprocessing))
    return load_external(config, dataset.classes, preprocessing)


def take_model(config: Config, host: Host, dataset: Dataset, model: Any) -> NewModel:
    """Evaluate what `take` has given on the test images, and on the validation images where there are any."""
    splits = tuple(name for name in ("validation", "test") if len(getattr(dataset, name)))
    logits = predict_splits(model, dataset, "fp32", splits)
    accuracy = accuracy_of(logits, dataset)
    source = {"trained": "elsewhere"} | source_facts(config)
    evidence = Fp32Evidence(
        config.model,
        config.seed,
        version_uri="",
        size_bytes=0,
        data=data_facts(dataset, config),
        train=None,
        accuracy=accuracy,
        source=source,
        preprocessing=model.spec.preprocessing,
    )
    sample = verification_images(dataset)
    with torch.no_grad():
        expected = model(to_float(sample))
    tags = lineage(dataset, host, accuracy) | source
    if is_onnx(model):
        tags |= {"flavor": "onnx"}
    stored = model.proto if is_onnx(model) else model
    return NewModel(evidence, stored, model.spec, sample, expected, logits, tags, layer_table(model, model.spec.shape))
