"""What the tracking store knows of a version beyond its own run: the sweeps that have timed it, on whatever machine,
and the images and logits with which a machine compares its own.

Any machine that uses the store adds a sweep by `qexp latency`; `qexp hosts` and the report read them all.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.models.preprocessing import Shape
from qexp.progress import say
from qexp.report.results import LatencyEvidence
from qexp.tracking import runs as tracking
from qexp.tracking.store import is_missing, logged_model_of, uri_of
from qexp.tracking.tags import tags_of

RECORDED, FILE = "recorded", "logits.safetensors"  # artifacts of the run that has quantized a version
TIMED = "p50_ms"  # what a sweep logs for each version that it has timed


@dataclass(frozen=True)
class Sweep:
    """A sweep that has timed a version, and the day on which it did so, as text: 2026-11-27."""

    evidence: LatencyEvidence
    date: str


def sweeps_of(found: ModelVersion) -> list[Sweep]:
    """All sweeps that have timed an int8 version, the newest first; what cannot be read is left out, and said."""
    try:
        logged = mlflow.MlflowClient().get_logged_model(logged_model_of(found)).metrics or []
    except MlflowException as error:
        if not is_missing(error):
            raise
        return []
    runs = []
    for run_id in {metric.run_id for metric in logged if metric.key == TIMED and metric.run_id}:
        try:
            runs.append(tracking.find_run(run_id, "run"))
        except InputError:  # deleted since
            continue
    sweeps = []
    for run in sorted(runs, key=lambda run: run.info.start_time, reverse=True):
        try:
            evidence = tracking.read_result(LatencyEvidence, run.info.run_id, "latency")
        except InputError as error:
            say(f"{uri_of(found)}: a sweep is left out: {error}")
            continue
        if uri_of(found) in evidence.names:
            date = datetime.fromtimestamp(run.info.start_time / 1000, UTC).date().isoformat()
            sweeps.append(Sweep(evidence, date))
    return sweeps


def write_recorded(recorded: dict[str, Tensor], folder: Path) -> None:
    """Write `images`, uint8 [N, C, H, W], and the `logits` of a version for them, float [N, classes], into `folder`."""
    save_file({name: tensor.contiguous() for name, tensor in recorded.items()}, folder / FILE)


def read_recorded(found: ModelVersion) -> dict[str, Tensor] | None:
    """The same of a registered int8 version; None, with a line that says why, where they are not known."""
    tags = tags_of(found)
    try:
        with tracking.downloaded(f"runs:/{tags.quantize_run_id}/{RECORDED}/{FILE}") as file:
            recorded: dict[str, Tensor] = load_file(file)
            check_recorded(recorded, tags.input.shape, tags.classes.count)
            return recorded
    except Exception as error:  # of the store, of safetensors
        say(f"{uri_of(found)}: its logits are not compared: what was recorded cannot be read: {first_line(error)}")
        return None


def check_recorded(recorded: dict[str, Tensor], shape: Shape, classes: int) -> None:
    """Raise ValueError unless these are what `write_recorded` writes."""
    images, logits = recorded.get("images"), recorded.get("logits")
    if images is None or images.dtype != torch.uint8 or images.shape[1:] != shape or not len(images):
        raise ValueError(f"{FILE} has no images of {'x'.join(map(str, shape))}")
    if logits is None or logits.shape != (len(images), classes) or not logits.isfinite().all():
        raise ValueError(f"{FILE} has no {classes} finite logits for each image")
