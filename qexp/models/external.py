"""PROVISIONAL"""
import torch
from torch import nn
from qexp.models.classifier import Classifier, ModelSpec
def wrap(module, spec):
    from qexp.models import classifier as c
    old = c._build_network
    c._build_network = lambda s: module
    try:
        mean = spec.preprocessing.mean or (0.,)*3; std = spec.preprocessing.std or (1.,)*3
        m = Classifier(ModelSpec("object:" + spec.architecture, spec.classes, spec.preprocessing), torch.tensor(mean), torch.tensor(std))
    finally:
        c._build_network = old
    return m.eval()
def load_external(config, classes, preprocessing):
    spec = ModelSpec(config.model, classes, preprocessing)
    mean = preprocessing.mean or (0.,)*3; std = preprocessing.std or (1.,)*3
    m = Classifier(spec, torch.tensor(mean), torch.tensor(std))
    m.network.load_state_dict(torch.load(config.weights, weights_only=True))
    return m.eval()
def source_facts(config):
    return {"weights": str(config.weights)}
