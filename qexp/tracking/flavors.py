"""How a model goes into MLflow: flavour, format, signature, example, requirements."""

import warnings
from importlib.metadata import version as installed_version
from typing import Any

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from qexp.models.classifier import ModelSpec
from qexp.models.names import short_name
from qexp.progress import quiet

FORMATS = {"fp32": "pt2", "int8": "pickle"}  # MLflow's word; a ScriptModule is saved by torch.jit.save, never pickled
OUTPUTS = {"pytorch": None, "onnx": "logits"}  # what the flavour calls the output: with a name, a server gives it so


def log_version(kind: str, stored: Any, name: str, spec: ModelSpec, flavor: str) -> Any:
    """Log and register a model in the active run: signature, example, pinned requirements; MLflow's ModelInfo.

    `kind` and `stored` are as in `qexp.tracking.registry.register`; `flavor` is MLflow's: pytorch or onnx.
    """
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), (-1, *spec.shape))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, len(spec.classes)), OUTPUTS[flavor])]),
    )
    packages = {"pytorch": ("mlflow", "torch", "numpy"), "onnx": ("mlflow", "onnx", "onnxruntime", "numpy")}[flavor]
    own: dict[str, dict[str, Any]] = {
        # MLflow would load the model here to try the example: `register` does so in a clean subprocess.
        "pytorch": {"serialization_format": FORMATS[kind], "validate_serving_input": False},
        "onnx": {"save_as_external_data": False, "onnx_execution_providers": ["CPUExecutionProvider"]},
    }
    log_model: Any = {"pytorch": mlflow.pytorch.log_model, "onnx": mlflow.onnx.log_model}[flavor]
    with warnings.catch_warnings(), quiet("mlflow"):  # whose advice against pickle does not apply
        warnings.simplefilter("ignore")
        return log_model(
            stored.eval() if flavor == "pytorch" else stored,
            name=f"{short_name(spec.architecture)}-{kind}",
            registered_model_name=name,
            signature=signature,
            # Two images: an export from one fixes the batch at one.
            input_example=np.zeros((2, *spec.shape), np.float32),
            pip_requirements=[f"{package}=={installed_version(package).split('+')[0]}" for package in packages],
            metadata={
                "classes": list(spec.classes),
                "input": f"float32 {'RGB' if spec.shape[0] == 3 else 'grey'} in [0, 1]",
                "architecture": spec.architecture,
            },
            model_type="classifier",
            **own[flavor],
        )
