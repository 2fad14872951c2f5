"""An ONNX file run by OpenVINO: a second runtime for the files of engine onnx, and often the faster one.

It reads the file itself, without a conversion; only roundings that it does not need are left out. Feeds the sweep, the
evaluation of int8 models and `qexp.load`, as onnx_file.py does with ONNX Runtime.
"""

import copy
import functools
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.files import replacing
from qexp.foundation.extras import extra, without_package
from qexp.models.onnx_file import ONLY_ONNXRUNTIME, as_array

# Without this package, which comes with it, OpenVINO reports nothing to its maker. It would at each import, from a
# thread of its own.
with extra("openvino", "runtime openvino"), without_package("openvino_telemetry"):
    import onnx  # which is there, after the import of onnx_file
    import openvino

MOST_COMPILED = 4  # shapes for which a model is kept compiled: each copy has its own packed weights


@functools.cache
def core() -> Any:
    """OpenVINO, once in a process and until its end.

    On Linux its CPU plugin gives the thread that loads it a stack for signals, and takes the stack away when the last
    user of that `Core` is gone. If this happens in another thread, or after a second `Core` has put its own in that
    place, the next signal (Ctrl-C is one) ends the process by a segmentation fault.
    """
    return openvino.Core()


def for_openvino(content: bytes) -> bytes:
    """An ONNX file without the pairs of QuantizeLinear and DequantizeLinear that only ONNX Runtime needs.

    EfficientNet-B0 takes two thirds of the time without them, and no activation is rounded twice.
    """
    if ONLY_ONNXRUNTIME.encode() not in content:
        return content
    model = onnx.load_from_string(content)
    graph = model.graph
    gone = [node for node in graph.node if any(entry.key == ONLY_ONNXRUNTIME for entry in node.metadata_props)]
    exact = {node.output[0]: node.input[0] for node in gone}
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in exact]
    names = {node.output[0]: exact[node.input[0]] for node in pairs}
    for node in (*gone, *pairs):
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return bytes(model.SerializeToString())


def options(threads: int, bf16: bool) -> dict[str, Any]:
    """What a graph is compiled with: `bf16` is for all that is not int8, which is fp32 otherwise."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "ENABLE_CPU_PINNING": False,  # which puts the threads of several processes on the same cores
    }


class OpenvinoClassifier(nn.Module):
    """Images [N, C, H, W] to float logits [N, classes], by OpenVINO on as many threads as torch has.

    It takes and gives what an `OnnxClassifier` does. The graph is compiled when it first sees a batch size, for that
    size alone: the kernels of a fixed size are the faster ones. What is float is computed in fp32
    unless `bf16` asks for the other, so that the logits of an int8 file do not depend on whether the CPU has bf16.
    """

    def __init__(self, content: bytes, bf16: bool = False) -> None:
        super().__init__()
        self.eval()
        self.content = for_openvino(content)
        self.graph = core().read_model(self.content)
        self.options = options(torch.get_num_threads(), bf16)
        self.compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.lock = threading.Lock()  # a request computes one batch at a time

    @classmethod
    def of_file(cls, file: Path, bf16: bool = False) -> "OpenvinoClassifier":
        """The model in a file, which need not stay there."""
        return cls(file.read_bytes(), bf16)

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        given = as_array(images)
        if given.shape[:1] == (0,):  # which OpenVINO does not take
            return self(np.zeros((1, *given.shape[1:]), given.dtype))[:0]
        with self.lock:
            # `infer` would take 0.07 ms more, for its arguments. The images stay where they are; the logits are copied,
            # since the next batch is written to their place.
            request = self._request(given.shape)
            request.set_input_tensor(openvino.Tensor(given, shared_memory=given.flags.writeable))
            request.start_async()
            request.wait()
            return torch.from_numpy(request.get_output_tensor(0).data.copy())

    def save(self, file: Path | str) -> Path:
        """Write the ONNX file as it is computed here, for `openvino.Core().compile_model`; returns the path.

        Raises:
            StageError: it cannot be written.
        """
        with replacing(Path(file)) as temporary:
            temporary.write_bytes(self.content)
        return Path(file)

    def _request(self, shape: tuple[int, ...]) -> Any:
        """What computes batches of this shape; those that were used last are kept."""
        if shape not in self.compiled:
            taken = self.graph.input(0).partial_shape
            if not taken.compatible(openvino.PartialShape(list(shape))):  # reshaping would take any size
                raise ValueError(f"images of shape {list(shape)}: the model takes {taken}")
            graph = self.graph.clone()
            graph.reshape(list(shape))
            self.compiled[shape] = core().compile_model(graph, "CPU", self.options).create_infer_request()
            if len(self.compiled) > MOST_COMPILED:
                self.compiled.popitem(last=False)
        self.compiled.move_to_end(shape)
        return self.compiled[shape]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpenvinoClassifier":
        """The same compiled graphs: they have no state."""
        copied: OpenvinoClassifier = copy.copy(self)
        return copied
