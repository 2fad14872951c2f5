"""Registration of models that no training run of qexp has made: what `qexp.register` calls."""

from typing import Any

import mlflow
import torch
from torch import Tensor

from qexp.foundation.text import opaque
from qexp.measurement.host import read_host
from qexp.models.classifier import ModelSpec
from qexp.tracking import registry
from qexp.tracking.runs import start_run
from qexp.tracking.store import use_store


def register(
    kind: str, model: registry.Predict, name: str, spec: ModelSpec, sample: Tensor, tags: dict[str, Any], stored: Any
) -> str:
    """The URI of a new version; arguments are those of `registry.register`. A new run, unless one is active.

    Raises:
        InputError: the store does not answer.
        StageError: the model cannot be stored.
    """
    use_store()
    host = read_host(torch.get_num_threads())
    lineage = {"cpu": host.cpu, "cpu_features": ",".join(host.features), "threads": host.threads}
    tags = tags | lineage | {registry.MADE_BY: registry.OWN}
    if mlflow.active_run():
        return registry.register(kind, model, name, spec, sample, tags, stored).uri
    with start_run(f"register-{name}", f"Registration of `{opaque(name)}` with `qexp.register`."):
        return registry.register(kind, model, name, spec, sample, tags, stored).uri
