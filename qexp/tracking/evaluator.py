"""MLflow's own evaluation, `mlflow.models.evaluate(…, evaluators="qexp")`: an int8 version beside its fp32 source.

MLflow finds `Evaluator` by the entry point `mlflow.model_evaluator` of the package. Whoever evaluates and validates
models with MLflow, for instance by `mlflow.validate_evaluation_results`, gets the figures of qexp.
"""

from functools import partial
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from torch import Tensor

from qexp.data.decoding import decode_files
from qexp.errors import InputError
from qexp.measurement.accuracy import compare, measure_accuracy, predict_logits
from qexp.models.preprocessing import Preprocessing
from qexp.tracking import metrics, registry
from qexp.tracking import runs as tracking
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
            dataset: rows of one image each: a data frame with the image's file in its one column beside the label, or
                an array [N, C * H * W] of images as the version takes them, uint8 or float in [0, 1]; labels are names
                or numbers of classes.
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
        tracking.log_metrics(values, owner=(run_id, None))
        return EvaluationResult(metrics=values, artifacts={}, run_id=run_id)


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
    if hasattr(rows, "columns"):
        if len(rows.columns) != 1:
            raise InputError(
                f"data: must have one column with image files, and has {', '.join(map(str, rows.columns))}"
            )
        return decode_files([str(file) for file in rows.iloc[:, 0]], wanted, what="data: broken image")
    values = np.asarray(rows)
    if values.ndim != 2 or values.shape[1] != np.prod(wanted.shape):
        allowed = f"[N, {np.prod(wanted.shape)}], rows of images {list(wanted.shape)}"
        raise InputError(f"data: must be {allowed}, and is {list(values.shape)}")
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *wanted.shape)


def _labels_of(given: Any, classes: tuple[str, ...]) -> Tensor:
    if given is None:
        raise InputError("targets: must be given: the class of each image")
    number = {name: place for place, name in enumerate(classes)}
    found = [number.get(str(label), label) for label in given]
    if wrong := [label for label in found if not (isinstance(label, int | np.integer) and 0 <= label < len(classes))]:
        raise InputError(f"targets: {wrong[0]!r} is neither a class nor its number, 0 to {len(classes) - 1}")
    return torch.tensor([int(label) for label in found])
