"""A model in a process that imports nothing of qexp: what a user's process sees of a registered version."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexp.errors import StageError
from qexp.foundation.processes import run_python, start_python
from qexp.measurement.accuracy import evaluation_batch, to_float
from qexp.models.classifier import ImageBatches
from qexp.models.names import BY_OPENVINO, OPENVINO_BF16
from qexp.models.stored import model_file
from qexp.progress import say

# Batches are those of the evaluation: the same sums. ONNX has names for its outputs.
# It imports what takes a second, and then reads what is to be done.
SCRIPT = """
import gc, importlib, json, sys
gc.disable()  # while libraries are imported, some when a model is loaded: a third of the time (foundation/imports.py)
import mlflow, numpy
importlib.import_module("mlflow." + sys.argv[1])
source, images, logits, size = json.loads(open(0, closefd=False).readline())
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
import json, sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino
source, images, logits, size, options = *sys.argv[1:4], int(sys.argv[4]), json.loads(sys.argv[5])
core, compiled, found = openvino.Core(), {}, []
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


class BareProcess:
    """A process that imports only mlflow and numpy, for one model. It imports them while its starter does other things,
    such as to make that model."""

    def __init__(self, flavor: str, environment: dict[str, str], without_pickle: bool = False) -> None:
        """Start it.

        Args:
            flavor: MLflow's, of the model.
            environment: of the process: it names the store and the threads.
            without_pickle: it tells MLflow to load nothing that a pickle may be in.
        """
        environment = environment | (WITHOUT_PICKLE if without_pickle else {})
        self._process = start_python(["-c", SCRIPT, flavor], environment, text=True)

    def __enter__(self) -> "BareProcess":
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # which waits for it, and closes its pipes
            self._process.kill()

    def logits(self, source: str, images: ImageBatches) -> Tensor:
        """Logits of uint8 images [N, C, H, W] by the model in the folder `source`; may be called once.

        Raises:
            StageError: the model does not load or run there.
        """
        with _images_of(images) as (inputs, logits, size):
            _, stderr = self._process.communicate(json.dumps([source, inputs, logits, size]) + "\n")
            return _read(logits, self._process.returncode, stderr)


def bare_logits(
    source: str, flavor: str, images: ImageBatches, environment: dict[str, str], runtime: str | None = None
) -> Tensor:
    """The same in one call.

    Args:
        runtime: of an ONNX file; None: the one that MLflow takes. In OpenVINO, the process imports that and numpy.
    """
    if runtime not in BY_OPENVINO:
        with BareProcess(flavor, environment) as bare:
            return bare.logits(source, images)
    with _images_of(images) as (inputs, logits, size), tempfile.TemporaryDirectory() as folder:
        from qexp.models.openvino_file import for_openvino, options

        place = Path(folder, "openvino.onnx")
        place.write_bytes(for_openvino(model_file(Path(source)).read_bytes()))
        compiled_with = json.dumps(options(int(environment["OMP_NUM_THREADS"]), runtime == OPENVINO_BF16))
        words = ["-c", IN_OPENVINO, str(place), inputs, logits, str(size), compiled_with]
        done = run_python(words, environment, capture_output=True, text=True)
        return _read(logits, done.returncode, done.stderr)


@contextmanager
def _images_of(images: ImageBatches) -> Iterator[tuple[str, str, int]]:
    """A file of the images, one for their logits, and the images of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        size = evaluation_batch(images.shape)
        _save(inputs := Path(folder, "images.npy"), images, size)
        yield str(inputs), str(Path(folder, "logits.npy")), size


def _read(logits: str, code: int, stderr: str) -> Tensor:
    if code != 0:
        lines = stderr.strip().splitlines() or [f"exit code {code}"]
        raise StageError(f"it does not load and run in a clean subprocess: {lines[-1]}")
    return torch.from_numpy(np.load(logits))


def _save(file: Path, images: ImageBatches, batch_size: int) -> None:
    """Write images as a .npy file, a batch at a time."""
    with open(file, "wb") as opened:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(images.shape)}
        np.lib.format.write_array_header_1_0(opened, header)
        for batch in images.split(batch_size):
            opened.write(batch.contiguous().numpy().data)


def reloads_equal(uri: str, copy: Path, model: Callable[[Tensor], Tensor], sample: Tensor, bare: BareProcess) -> bool:
    """Whether the version at `uri` gives the same logits in the clean subprocess `bare`, bit for bit, as `model` in
    this one.

    Args:
        copy: its files.
        sample: uint8 [N, 3, H, W].
    """
    say(f"verifying {uri} in a clean subprocess")
    with torch.no_grad():
        expected = model(to_float(sample))
    try:
        if torch.equal(bare.logits(str(copy), sample), expected):
            return True
        problem = "it gives other logits in a clean subprocess"
    except StageError as error:
        problem = str(error)
    say(f"{uri} is not verified: {problem}")
    return False
