"""What is in a model's file: weights, code, and what its format adds."""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qexp.foundation.extras import extra
from qexp.foundation.quantities import Number

# Below the folder of the archive's name. TorchScript: data/0, constants/0; exported programs: data/weights/weight_0.
TENSORS = re.compile(r"(data|constants)/\d+|data/(weights|constants)/\w+_\d+")
CODE = re.compile(r"code/.*\.py|models/.*\.json")


@dataclass(frozen=True)
class FileContents:
    """`weights_bytes` are those of all tensors: weights, biases, scales, statistics of batch norm; `code_bytes` those
    of the operations; `other_bytes` names, debug information, an example of the input, and the container itself."""

    weights_bytes: Number
    code_bytes: Number
    other_bytes: Number


def read_contents(file: Path) -> FileContents:
    """Of a model.pth (TorchScript), model.pt2 (exported program) or model.onnx."""
    size = file.stat().st_size
    weights, code = _in_onnx(file) if file.suffix == ".onnx" else _in_archive(file)
    return FileContents(weights, code, size - weights - code)


def _in_archive(file: Path) -> tuple[int, int]:
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename.partition("/")[2], entry.compress_size) for entry in archive.infolist()]
    return tuple(sum(size for name, size in entries if kind.fullmatch(name)) for kind in (TENSORS, CODE))  # type: ignore[return-value]


def _in_onnx(file: Path) -> tuple[int, int]:
    with extra("onnx", "reading an ONNX file"):
        import onnx

    graph = onnx.load(file).graph
    weights = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    return weights, sum(node.ByteSize() for node in graph.node)
