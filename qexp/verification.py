"""Whether a registered version gives the same bits in a bare process: one that knows only its URI."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.evaluation import to_float
from qexp.progress import say

# Runs with nothing of qexp imported: what a user's process sees.
BARE_PROCESS = """
import sys
import mlflow, numpy
uri, images, expected = sys.argv[1:]
found = mlflow.pyfunc.load_model(uri).predict(numpy.load(images))
logits = next(iter(found.values())) if isinstance(found, dict) else found  # ONNX has names for its outputs
same = numpy.array_equal(logits, numpy.load(expected)) and "qexp" not in sys.modules
sys.exit(0 if same else 3)
"""
DIFFERENT = 3


def verify(uri: str, model: Callable[[Tensor], Tensor], sample: Tensor, environment: dict[str, str]) -> bool:
    """Whether the version, loaded in a fresh process that imports only mlflow and numpy, gives the same logits, bit for
    bit, as `model` in this one, for uint8 `sample` [N, 3, H, W]; `environment` names the store and the threads."""
    images = to_float(sample)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        inputs, expected = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(inputs, images.numpy())
        np.save(expected, model(images).numpy())
        command = [sys.executable, "-W", "ignore", "-c", BARE_PROCESS, uri, str(inputs), str(expected)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = "other logits" if done.returncode == DIFFERENT else f"exit code {done.returncode}: {lines[-1:]}"
        say(f"{uri} is not verified: in a fresh process it gave {reason}")
    return done.returncode == 0
