"""PROVISIONAL: weights of others."""

from typing import Any

import torch
from torch import nn

from qexp.models.classifier import Classifier, ModelSpec, normalization
from qexp.models.names import OBJECT
from qexp.models.preprocessing import Preprocessing


def wrap(module: nn.Module, spec: ModelSpec) -> Classifier:
    """A module of somebody else's, with its normalisation before it."""
    own = ModelSpec(OBJECT + spec.architecture, spec.classes, spec.preprocessing)
    return Classifier(own, *normalization(spec.preprocessing, None), network=module).eval()


def load_external(config: Any, classes: tuple[str, ...], preprocessing: Preprocessing) -> Classifier:
    spec = ModelSpec(config.model, classes, preprocessing)
    m = Classifier(spec, *normalization(spec.preprocessing, None))
    if config.weights:
        m.network.load_state_dict(torch.load(config.weights, weights_only=True))
    return m.eval()


def source_facts(config: Any) -> dict[str, str]:
    return {"weights": str(config.weights)}
