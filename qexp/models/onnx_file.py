"""A classifier as an ONNX file: written from a PyTorch module, run by ONNX Runtime."""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from qexp.foundation.extras import extra

with extra("onnx", "an ONNX file"):
    import onnx
    import onnxruntime

INPUT, OUTPUT = "images", "logits"
MOST_IMAGES = 65_536  # of one batch: torch.export wants a limit
OPSET = 20
LAYER_TYPES = ("Conv", "Gemm", "MatMul")
# With these, all that multiply by weights: what is not quantized is told.
PRODUCT_TYPES = (*LAYER_TYPES, "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")
# They stay float in a quantized file, with kernels of their own; activations are part of those of convolutions.
NORMALIZATIONS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization")
SCOPES = "pkg.torch.onnx.name_scopes"
# Metadata of a QuantizeLinear that only ONNX Runtime needs: it has int8 kernels for what lies before and after, while
# OpenVINO computes a convolution and its activation in one kernel if nothing rounds between them.
ONLY_ONNXRUNTIME = "qexp.only_for_onnxruntime"


def as_array(images: Tensor | np.ndarray) -> np.ndarray:
    """Images as runtimes of ONNX files take them: contiguous, float32 in [0, 1]."""
    given = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if given.dtype == np.uint8:
        given = given.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(given, np.float32)


class OnnxClassifier(nn.Module):
    """Images [N, 3, H, W] to float logits [N, classes], by ONNX Runtime on as many threads as torch has.

    Images are a tensor or an array of numpy, floats in [0, 1] or uint8, of any memory layout. The logits are a tensor.

    Not `optimized`, each operation of the file runs as it stands, in fp32 between QuantizeLinear and DequantizeLinear.
    It has no parameters, so that what moves, converts or trains those of a module leaves it as it is.
    """

    def __init__(self, model: onnx.ModelProto | Path, optimized: bool = True) -> None:
        super().__init__()
        self.eval()
        options = onnxruntime.SessionOptions()
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        given = str(model) if isinstance(model, Path) else model.SerializeToString()
        self.session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        return torch.from_numpy(self.session.run(None, {INPUT: as_array(images)})[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxClassifier":
        """The same session: it has no state, and several threads may use it at once."""
        copied: OnnxClassifier = copy.copy(self)
        return copied


def export(model: nn.Module, example: Tensor, file: Path) -> None:
    """Write the fp32 classifier as ONNX, for batches of any size; `example` is float [N >= 2, 3, H, W]."""
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    with warnings.catch_warnings(), torch.no_grad(), with_table_kept():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.onnx.export(
            model.eval(), (example,), str(file), dynamo=True, dynamic_shapes=({0: batch},), input_names=[INPUT],
            output_names=[OUTPUT], opset_version=OPSET, external_data=False, verbose=False,
        )  # fmt: skip


@cache
def _made_once(make: Callable[..., Any], opset_version: int) -> Any:
    return make(opset_version=opset_version)


def with_table_kept() -> AbstractContextManager[Any]:
    """While the block lasts, torch's table of ONNX functions is that of the first export: making a new one for each
    takes half of the time that a small model needs."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    kept = staticmethod(partial(_made_once, ONNXRegistry.from_torchlib))
    return mock.patch.object(ONNXRegistry, "from_torchlib", kept)


def layers_of(nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """By the name of each exported node, the qualified name of its module; the node's own where none is known.

    A weight's name says which module it is of, unless several modules share it.
    """
    weights = {node.name: next((name for name in node.input[1:2] if name.endswith(".weight")), "") for node in nodes}
    used = Counter(weights.values())
    return {
        node.name: weight.removesuffix(".weight")
        if (weight := weights[node.name]) and used[weight] == 1
        # A layer that is called several times has one name in both.
        else _scope_of(node) or weight.removesuffix(".weight") or node.name
        for node in nodes
    }


def has_float_work(model: onnx.ModelProto) -> bool:
    """Whether a quantized file has products of floats, or normalizations, beside what is int8."""
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return any(
        node.op_type in NORMALIZATIONS or (node.op_type in PRODUCT_TYPES and node.input[0] not in rounded)
        for node in model.graph.node
    )


def _scope_of(node: onnx.NodeProto) -> str:
    """The qualified name of the module in whose forward a node was exported."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    names: Sequence[str] = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
