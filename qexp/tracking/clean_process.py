"""A model in a process that imports nothing of qexp: what a user's process sees of a registered version."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.errors import StageError
from qexp.measurement.accuracy import to_float
from qexp.processes import run_python
from qexp.progress import say
from qexp.tracking.outage import store_errors
from qexp.tracking.store import ask_store

# Batches are those of the evaluation: the same sums. ONNX has names for its outputs.
SCRIPT = """
import sys
import mlflow, numpy
source, images, logits = sys.argv[1:]
model, images, found = mlflow.pyfunc.load_model(source), numpy.load(images, mmap_mode="r"), []
for start in range(0, len(images), 256):
    given = model.predict(images[start : start + 256].astype(numpy.float32) / numpy.float32(255))
    found.append(next(iter(given.values())) if isinstance(given, dict) else given)
assert "qexp" not in sys.modules
numpy.save(logits, numpy.concatenate(found))
"""
WITHOUT_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


def bare_logits(source: str, images: Tensor, environment: dict[str, str]) -> Tensor:
    """Logits of uint8 images [N, 3, H, W] from a process that imports only mlflow and numpy.

    Args:
        source: URI or folder of the model.
        environment: of the process: it names the store and the threads.

    Raises:
        StageError: the model does not load or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, logits = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(inputs, images.numpy())
        words = ["-c", SCRIPT, source, str(inputs), str(logits)]
        done = run_python(words, environment, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise StageError(f"it does not load and run in a clean subprocess: {lines[-1]}")
        return torch.from_numpy(np.load(logits))


def reloads_equal(
    uri: str, model: Callable[[Tensor], Tensor], sample: Tensor, environment: dict[str, str], without_pickle: bool
) -> bool:
    """Whether the version at `uri` gives the same logits in a clean subprocess, bit for bit, as `model` in this one.

    Args:
        sample: uint8 [N, 3, H, W].
        without_pickle: that process tells MLflow to load nothing that a pickle may be in.

    Raises:
        StoreError: it cannot be said, since the store does not answer.
    """
    environment = environment | (WITHOUT_PICKLE if without_pickle else {})
    say(f"verifying {uri} in a clean subprocess")
    with torch.no_grad():
        expected = model(to_float(sample))
    for _ in range(2):
        try:
            if torch.equal(bare_logits(uri, sample, environment), expected):
                return True
            problem = "it gives other logits in a clean subprocess"
            break
        except StageError as error:  # the store may have been away, or a download cut off: once more
            with store_errors():
                ask_store()
            problem = str(error)
    say(f"{uri} is not verified: {problem}")
    return False
