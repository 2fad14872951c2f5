"""A model in a process that imports nothing of qexp: what a user's process sees of a registered version."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.errors import StageError
from qexp.foundation.processes import run_python
from qexp.measurement.accuracy import evaluation_batch, to_float
from qexp.models.classifier import ImageBatches
from qexp.models.names import OPENVINO
from qexp.models.stored import model_file
from qexp.progress import say

# Batches are those of the evaluation: the same sums. ONNX has names for its outputs.
SCRIPT = """
import gc, sys
gc.disable()  # while libraries are imported, some when a model is loaded: a third of the time (foundation/imports.py)
import mlflow, numpy
source, images, logits, size = *sys.argv[1:4], int(sys.argv[4])
model, found = mlflow.pyfunc.load_model(source), []
gc.freeze()
gc.enable()
for start in range(0, len(numpy.load(images, mmap_mode="r")), size):
    batch = numpy.load(images, mmap_mode="r")[start : start + size]  # mapped anew: memory holds what is mapped
    given = model.predict(batch.astype(numpy.float32) / numpy.float32(255))
    found.append(next(iter(given.values())) if isinstance(given, dict) else given)
assert "qexp" not in sys.modules
numpy.save(logits, numpy.concatenate(found))
"""
# The same for an ONNX file in OpenVINO, compiled for each batch size as OpenvinoClassifier does.
IN_OPENVINO = """
import os, sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino
source, images, logits, size = *sys.argv[1:4], int(sys.argv[4])
core, compiled, found = openvino.Core(), {}, []
options = {"INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]), "PERFORMANCE_HINT": "LATENCY"}
options |= {"NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
for start in range(0, len(numpy.load(images, mmap_mode="r")), size):
    batch = numpy.load(images, mmap_mode="r")[start : start + size].astype(numpy.float32) / numpy.float32(255)
    if batch.shape not in compiled:
        model = core.read_model(source)
        model.reshape(list(batch.shape))
        compiled[batch.shape] = core.compile_model(model, "CPU", options)
    found.append(compiled[batch.shape](batch)[0])
assert "qexp" not in sys.modules
numpy.save(logits, numpy.concatenate(found))
"""
WITHOUT_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


def bare_logits(source: str, images: ImageBatches, environment: dict[str, str], runtime: str | None = None) -> Tensor:
    """Logits of uint8 images [N, C, H, W] from a process that imports only mlflow, or OpenVINO, and numpy.

    Args:
        source: folder of the model.
        environment: of the process: it names the store and the threads.
        runtime: of an ONNX file; None: the one that MLflow takes.

    Raises:
        StageError: the model does not load or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, logits = Path(folder, "images.npy"), Path(folder, "logits.npy")
        size = evaluation_batch(images.shape)
        _save(inputs, images, size)
        if runtime == OPENVINO:
            source = _for_openvino(model_file(Path(source)), Path(folder))
        words = ["-c", IN_OPENVINO if runtime == OPENVINO else SCRIPT, source, str(inputs), str(logits), str(size)]
        done = run_python(words, environment, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise StageError(f"it does not load and run in a clean subprocess: {lines[-1]}")
        return torch.from_numpy(np.load(logits))


def _for_openvino(file: Path, folder: Path) -> str:
    from qexp.models.openvino_file import for_openvino

    place = folder / "openvino.onnx"
    place.write_bytes(for_openvino(file.read_bytes()))
    return str(place)


def _save(file: Path, images: ImageBatches, batch_size: int) -> None:
    """Write images as a .npy file, a batch at a time."""
    with open(file, "wb") as opened:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(images.shape)}
        np.lib.format.write_array_header_1_0(opened, header)
        for batch in images.split(batch_size):
            opened.write(batch.contiguous().numpy().data)


def reloads_equal(
    uri: str,
    copy: Path,
    model: Callable[[Tensor], Tensor],
    sample: Tensor,
    environment: dict[str, str],
    without_pickle: bool,
) -> bool:
    """Whether the version at `uri` gives the same logits in a clean subprocess, bit for bit, as `model` in this one.

    Args:
        copy: its files.
        sample: uint8 [N, 3, H, W].
        without_pickle: that process tells MLflow to load nothing that a pickle may be in.
    """
    environment = environment | (WITHOUT_PICKLE if without_pickle else {})
    say(f"verifying {uri} in a clean subprocess")
    with torch.no_grad():
        expected = model(to_float(sample))
    try:
        if torch.equal(bare_logits(str(copy), sample, environment), expected):
            return True
        problem = "it gives other logits in a clean subprocess"
    except StageError as error:
        problem = str(error)
    say(f"{uri} is not verified: {problem}")
    return False
