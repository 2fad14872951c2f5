"""A training that is over but not yet in MLflow: what its run is to log, in its folder until it has been logged.

The weights are the checkpoint's, of the best epoch. Written before anything is sent, so that whatever happens on the
way, `qexp sync` can send it later.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.files import from_json, replacing, to_json
from qexp.models.classifier import Classifier, load_classifier
from qexp.report.results import Fp32Evidence
from qexp.training.checkpoint import TRAINED, best_file

SAMPLE = "sample.safetensors"


@dataclass(frozen=True)
class Trained:
    """Evidence without a version yet, the tags that the version will get, uint8 images [N, 3, H, W] to verify it."""

    evidence: Fp32Evidence
    tags: dict[str, Any]
    sample: Tensor


def save_trained(folder: Path, trained: Trained) -> None:
    """Write it to the folder of the training.

    Raises:
        StageError: the disk is full or the folder cannot be written.
    """
    with replacing(folder / SAMPLE) as temporary:
        save_file({"images": trained.sample.contiguous()}, temporary)
    values = {"evidence": json.loads(to_json(trained.evidence)), "tags": trained.tags}
    with replacing(folder / TRAINED) as temporary:
        temporary.write_text(json.dumps(values, indent=2))


def load_trained(folder: Path) -> tuple[Classifier, Trained]:
    """The model with its best weights, and what `save_trained` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        values = json.loads((folder / TRAINED).read_text())
        evidence = from_json(Fp32Evidence, json.dumps(values["evidence"]))
        sample = load_file(folder / SAMPLE)["images"].to(torch.uint8)
    except Exception as error:  # json, pydantic and safetensors have their own types
        raise InputError(f"{folder}: what the training left there cannot be read ({first_line(error)})") from None
    return load_classifier(best_file(folder, evidence.train.best_epoch)), Trained(evidence, values["tags"], sample)
