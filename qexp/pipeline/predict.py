"""What a registered version sees in image files: class names and probabilities."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qexp.config import Config
from qexp.data.decoding import decode_files
from qexp.errors import InputError, StageError
from qexp.foundation.text import printable
from qexp.foundation.waiting import PASSIVE, wait
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.host import read_host
from qexp.progress import say
from qexp.tracking import registry
from qexp.tracking.store import uri_of, use_store
from qexp.tracking.tags import tags_of

BATCH_SIZE = 128


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first, and their probabilities: a softmax of the logits.

    Classes of equal probability are in the order of the class numbers, which says nothing; `equal_left_out` others are
    as likely as the last one and are not among them.
    """

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    equal_left_out: int = 0


def run_predict(config: Config, uri: str, files: Sequence[str], top_k: int) -> dict[str, Any]:
    """The command `predict`: one line per image on standard error, and what the last line on standard output shows."""
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # are deprecated, say int8 models that use them
    use_store()
    torch.set_num_threads(read_host(config.threads).threads)
    wait(PASSIVE)
    own, predictions = predict_files(uri, files, top_k)
    for line in table(predictions):
        say(line)
    return {"command": "predict", "uri": own, "images": [_as_json(found) for found in predictions]}


def _as_json(found: Prediction) -> dict[str, Any]:
    shares = zip(found.classes, found.probabilities, strict=True)
    left_out = {"equal_left_out": found.equal_left_out} if found.equal_left_out else {}
    return {
        "file": found.file,
        "classes": [{"class": name, "probability": round(p, 6)} for name, p in shares],
    } | left_out


def predict_files(uri: str, files: Sequence[str], top_k: int) -> tuple[str, list[Prediction]]:
    """The version that `uri` names, as models:/NAME/VERSION, and what it says of each file, in their order.

    Files of any size are decoded and resized as those of a data set are, and go through the model in batches.

    Raises:
        InputError: the version does not exist or is not one of ours, or a file is missing or no image.
        StageError: the version cannot be loaded, or returns NaN.
    """
    found = registry.find_version(uri, "fp32", "int8", option="URI")
    for file in files:
        _check(file)
    own = uri_of(found)
    preprocessing, model = tags_of(found).input, registry.open_version(found)
    classes = registry.class_names_of(found)
    predictions: list[Prediction] = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        logits = predict_logits(model, decode_files(batch, preprocessing, what="IMAGE"), BATCH_SIZE)
        predictions += _most_likely(batch, logits, classes, top_k)
    return own, predictions


def _check(file: str) -> None:
    if not os.path.isfile(file):
        kind = "a folder; give its image files" if os.path.isdir(file) else "no such file"
        raise InputError(f"IMAGE {file}: {kind}")


def _most_likely(files: Sequence[str], logits: Tensor, classes: Sequence[str], top_k: int) -> list[Prediction]:
    if not logits.isfinite().all():
        raise StageError("the model returned NaN or infinite logits")
    probabilities, ranks = torch.softmax(logits.double(), 1).sort(dim=1, descending=True, stable=True)
    return [
        Prediction(
            file, tuple(classes[rank] for rank in best[:top_k]), tuple(shares[:top_k]),
            shares[top_k:].count(shares[:top_k][-1]),
        )
        for file, best, shares in zip(files, ranks.tolist(), probabilities.tolist(), strict=True)
    ]  # fmt: skip


def table(predictions: Sequence[Prediction]) -> list[str]:
    """One line per image."""
    files = [printable(found.file) for found in predictions]
    width, lines = max(map(len, files)), []
    for file, found in zip(files, predictions, strict=True):
        shares = zip(found.classes, found.probabilities, strict=True)
        others = [f"{found.equal_left_out} more as likely as the last"] if found.equal_left_out else []
        said = [*(f"{name} {100 * share:.2f} %" for name, share in shares), *others]
        lines.append(f"{file:{width}}  " + ", ".join(said))
    return lines
