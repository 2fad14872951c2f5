"""The bytes of a model's file by what they are for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FileContents:
    """`weights_bytes` are those of all tensors: weights, biases, scales, statistics of batch norm; `code_bytes` those
    of the operations; `other_bytes` names, debug information, an example of the input, and the container itself."""

    weights_bytes: int
    code_bytes: int
    other_bytes: int
