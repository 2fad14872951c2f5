"""An ONNX graph that was written for one number of images, made to take any number.

Exporters write the batch into reshapes, into constants that are put beside each image (the class token of a vision
transformer) and into sizes. Where the images are in each tensor is followed through the graph; onnx_input.py, which
this feeds, then holds the graph against the file as it came.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qexp.foundation.extras import extra

with extra("onnx", "an ONNX file"):
    import onnx
    from onnx import numpy_helper

Shape = tuple[int, ...]
REDUCTIONS = ("ArgMax", "ArgMin")  # beside Reduce…


def free_batch(graph: onnx.GraphProto, values: Mapping[str, np.ndarray], batch: int, prefix: str) -> None:
    """Let the operations of a graph take any number of images.

    Args:
        values: of every tensor, of one run with `batch` images, which is what the graph was written for.
        prefix: begins the names of what is put in.
    """
    axes = {graph.input[0].name: 0}  # of the images, in each tensor where it is known
    dependent = set(axes)  # on images
    for node in list(graph.node):
        inputs = [name for name in node.input if name in dependent]
        if not inputs:
            continue
        dependent.update(node.output)
        source = max((name for name in inputs if name in axes), key=lambda name: values[name].ndim, default=None)
        if source is None or node.op_type == "Shape":
            continue
        for output in node.output:
            if output in values:
                axis = _axis_after(node, values[source].shape, axes[source], values[output].shape, batch, values)
                if axis is not None:
                    axes[output] = axis
        if node.output[0] in axes:
            _Freed(graph, node, values, batch, prefix, dependent).free(source, axes[source], axes[node.output[0]])


def _axis_after(
    node: onnx.NodeProto, given: Shape, axis: int, found: Shape, batch: int, values: Mapping[str, np.ndarray]
) -> int | None:
    """The axis of the images in the result of a node; None where they are in none alone."""
    options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type in ("Reshape", "Flatten"):
        return _axis_with(math.prod(given[:axis]), found, batch)
    if node.op_type == "Transpose":
        return list(options.get("perm", range(len(given))[::-1])).index(axis)
    if node.op_type == "Unsqueeze":
        added = {place % len(found) for place in _places(node, options, values)}
        return [place for place in range(len(found)) if place not in added][axis]
    removed: list[int] = []
    if node.op_type == "Gather" and len(found) < len(given):
        removed = [options.get("axis", 0)]
    elif node.op_type == "Squeeze" or (len(found) < len(given) and node.op_type.startswith(("Reduce", *REDUCTIONS))):
        removed = [*(_places(node, options, values) or (place for place, size in enumerate(given) if size == 1))]
    if removed:
        places = {place % len(given) for place in removed}
        return None if axis in places else axis - sum(place < axis for place in places)
    after = axis + len(found) - len(given)  # axes are counted from the last one where shapes are made alike
    return after if 0 <= after < len(found) and found[after] % batch == 0 else None


def _axis_with(before: int, shape: Shape, batch: int) -> int | None:
    """The axis before which there are so many numbers."""
    found = (axis for axis, size in enumerate(shape) if math.prod(shape[:axis]) == before and size % batch == 0)
    return next(found, None)


def _places(node: onnx.NodeProto, options: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> list[int]:
    """The axes that a node names: an attribute, or in newer opsets an input."""
    if "axes" in options:
        return list(options["axes"])
    if "axis" in options:
        return [options["axis"]]
    return [int(place) for place in values[node.input[1]].ravel()] if len(node.input) > 1 else []


class _Freed:
    """One node, and what stands in its way."""

    def __init__(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, values: Mapping[str, np.ndarray], batch: int, prefix: str,
        dependent: set[str],
    ) -> None:  # fmt: skip
        self.graph, self.node, self.values, self.batch, self.dependent = graph, node, values, batch, dependent
        self.prefix = f"{prefix}{node.name}"

    def free(self, source: str, before: int, axis: int) -> None:
        """Args:
        before, axis: of the images, in `source` and in the result."""
        node, kind = self.node, self.node.op_type
        shape = list(self.values[node.output[0]].shape)
        if kind == "Reshape":
            self._replace(1, np.array([*shape[:axis], -1, *shape[axis + 1 :]], np.int64))
        elif kind == "Expand":
            self._replace(1, np.array([*shape[:axis], 1, *shape[axis + 1 :]], np.int64))
        elif kind == "Resize" and len(node.input) > 3 and axis == 0:
            count = self._count_of(source, before)
            rest = self._constant("rest", self.values[node.input[3]][1:])
            node.input[3] = self._put("Concat", [count, rest], "sizes", axis=0)
        elif kind not in ("Reshape", "Expand", "Resize"):
            for place, own in self._one_for_all(axis, len(shape)):
                if kind == "Concat":
                    ones = [
                        self._constant(str(end), np.ones(size, np.int64))
                        for end, size in ((0, axis), (1, len(shape) - axis - 1))
                    ]
                    sizes = self._put(
                        "Concat", [ones[0], self._count_of(source, before), ones[1]], f"sizes_{place}", axis=0
                    )
                    node.input[place] = self._put(
                        "Expand", [self._constant(f"one_{place}", own), sizes], f"of_all_{place}"
                    )
                elif self.batch > 1:
                    self._replace(place, own)

    def _one_for_all(self, axis: int, rank: int) -> Iterator[tuple[int, np.ndarray]]:
        """Inputs that are the same for each image of the batch, and that of one image."""
        for place, name in enumerate(self.node.input):
            value = self.values.get(name)
            if not name or name in self.dependent or value is None:
                continue
            own = axis - rank + value.ndim
            if own >= 0 and value.ndim and value.shape[own] == self.batch:
                one = value.take([0], own)
                if (value == one).all():
                    yield place, one

    def _count_of(self, source: str, axis: int) -> str:
        """The number of images, [1]."""
        shape = self._put("Shape", [source], "shape")
        return self._put("Gather", [shape, self._constant("axis", np.array([axis], np.int64))], "count", axis=0)

    def _replace(self, place: int, value: np.ndarray) -> None:
        self.node.input[place] = self._constant(f"input_{place}", value)

    def _constant(self, name: str, value: np.ndarray) -> str:
        name = f"{self.prefix}_{name}"
        if all(one.name != name for one in self.graph.initializer):
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _put(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        name = f"{self.prefix}_{name}"
        if all(name not in node.output for node in self.graph.node):
            made = onnx.helper.make_node(kind, inputs, [name], name, **attributes)
            self.graph.node.insert(list(self.graph.node).index(self.node), made)
        return name
