"""MLflow's own evaluation, `mlflow.models.evaluate(…, evaluators="qexp")`: an int8 version beside its fp32 source.

MLflow finds `Evaluator` by the entry point `mlflow.model_evaluator` of the package. Whoever evaluates and validates
models with MLflow, for instance by `mlflow.validate_evaluation_results`, gets the figures of qexp.
"""

import os
import time
from functools import partial
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.entities import LoggedModelInput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from torch import Tensor

from qexp.data.decoding import decode_files
from qexp.errors import InputError
from qexp.measurement.accuracy import compare, measure_accuracy, predict_logits
from qexp.models.preprocessing import Preprocessing
from qexp.tracking import metrics, registry
from qexp.tracking.outage import store_errors
from qexp.tracking.store import all_pages, logged_model_of
from qexp.tracking.tags import tags_of


class Evaluator(ModelEvaluator):
    """Accuracy of a version that qexp has registered, and of an int8 version the drop from its fp32 source."""

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: dict[str, Any], **kwargs: Any) -> bool:
        """Classifiers only."""
        return model_type == "classifier"

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: dict[str, Any],
        model: Any = None,
        **more: Any,
    ) -> EvaluationResult:
        """Log the figures to the run, and return them.

        Args:
            dataset: rows of one image each: a data frame with the image's file, or its pixels [C, H, W], in its one
                column beside the label, or an array [N, C * H * W] of images as the version takes them, whole numbers
                from 0 to 255 or float in [0, 1]; labels are names or numbers of classes.
            evaluator_config: `metric_prefix` is put before the metrics' names, as by MLflow's own evaluator.
            model: what MLflow has loaded for models:/NAME/VERSION.

        Raises:
            InputError: the model is not a version of qexp's, or the data are none of these.
        """
        version = _version_of(model)
        tags = tags_of(version)
        images = _images_of(dataset.features_data, tags.input)
        labels = _labels_of(dataset.labels_data, registry.class_names_of(version))
        logits = predict_logits(registry.open_version(version), images)
        found = measure_accuracy(logits, labels)
        values = {"top1_percent": found.top1_percent, "top3_percent": found.top3_percent}
        if tags.kind == "int8":
            before = predict_logits(registry.open_version(registry.source_of(version)), images)
            values |= {"fp32_top1_percent": measure_accuracy(before, labels).top1_percent}
            values |= metrics.of_comparison(compare(before, logits, labels))
        prefix = evaluator_config.get("metric_prefix") or ""
        values = {f"{prefix}{name}": value for name, value in values.items()}
        if not more.get("model_id"):  # MLflow logs what is returned, if it knows the logged model
            _log_to_model(values, run_id, logged_model_of(version), dataset)
        return EvaluationResult(metrics=values, artifacts={}, run_id=run_id)


def _log_to_model(values: dict[str, float], run_id: str, model_id: str, dataset: Any) -> None:
    """Log metrics to a run as those of a model on a data set, and the model as an input of the run."""
    client, now = mlflow.MlflowClient(), round(1000 * time.time())
    points = [
        Metric(name, value, now, 0, model_id, dataset.name, dataset.digest, run_id) for name, value in values.items()
    ]
    with store_errors():
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
        client.log_batch(run_id, metrics=points)


def _version_of(model: Any) -> ModelVersion:
    """The version of the registry that a loaded model is."""
    about = getattr(model, "metadata", None)
    if about is not None and about.run_id:
        client = mlflow.MlflowClient()
        for found in all_pages(partial(client.search_model_versions, f"run_id = '{about.run_id}'")):
            if logged_model_of(found) == about.model_id and found.tags.get("kind") in ("fp32", "int8"):
                return found
    raise InputError("model: must be models:/NAME/VERSION of a version that qexp has registered")


def _images_of(rows: Any, wanted: Preprocessing) -> Tensor:
    if not len(rows):
        raise InputError("data: must have images, and has no rows")
    if not hasattr(rows, "columns"):
        return _images_in(np.asarray(rows), wanted)
    if len(rows.columns) == np.prod(wanted.shape):
        return _images_in(rows.to_numpy(), wanted)
    if len(rows.columns) != 1:
        names = list(map(str, rows.columns))
        shown = ", ".join(names[:3]) + (f", … ({len(names)} columns)" if len(names) > 3 else "")
        raise InputError(f"data: must have one column with images or their files (feature_names), and has {shown}")
    values = list(rows.iloc[:, 0])
    if all(isinstance(value, str | os.PathLike) for value in values):
        return decode_files([os.fspath(value) for value in values], wanted, what="data: broken image")
    if not all(isinstance(value, np.ndarray) for value in values):
        other = next(type(value).__name__ for value in values if not isinstance(value, np.ndarray))
        raise InputError(f"data: images must all be names of files or all be arrays, and one is of type {other}")
    flat = (int(np.prod(wanted.shape)),)
    if wrong := [value.shape for value in values if value.shape not in (wanted.shape, flat)]:
        raise InputError(f"data: images must be {list(wanted.shape)}, and one is {list(wrong[0])}")
    return _images_in(np.stack([value.reshape(-1) for value in values]), wanted)


def _images_in(values: np.ndarray, wanted: Preprocessing) -> Tensor:
    """Images [N, C, H, W] of rows of pixels: uint8, or numbers in [0, 1]."""
    if values.ndim != 2 or values.shape[1] != np.prod(wanted.shape):
        allowed = f"[N, {np.prod(wanted.shape)}], rows of images {list(wanted.shape)}"
        raise InputError(f"data: must be {allowed}, and is {list(values.shape)}")
    whole = np.issubdtype(values.dtype, np.integer)
    if not whole and not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"data: pixels must be numbers, and are {values.dtype}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (255 if whole else 1)):  # NaN too
        allowed = "whole numbers from 0 to 255" if whole else "float in [0, 1]"
        raise InputError(f"data: pixels must be {allowed}, and are from {low:g} to {high:g}")
    images = values.astype(np.uint8 if whole else np.float32)
    return torch.from_numpy(np.ascontiguousarray(images)).reshape(-1, *wanted.shape)


def _labels_of(given: Any, classes: tuple[str, ...]) -> Tensor:
    if given is None:
        raise InputError("targets: must be given: the class of each image")
    number = {name: place for place, name in enumerate(classes)}
    found = [number.get(str(label), label) for label in np.asarray(given).tolist()]
    if wrong := [label for label in found if label not in range(len(classes))]:
        raise InputError(f"targets: {wrong[0]!r} is neither a class nor its number, 0 to {len(classes) - 1}")
    return torch.tensor([int(label) for label in found])
