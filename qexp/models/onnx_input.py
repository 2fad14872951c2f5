"""An fp32 classifier that comes as an ONNX file, whoever wrote it, in the one form that everything behind here takes.

`read_onnx` checks the file and rewrites its graph: `images` float [N, C, H, W] in [0, 1] to `logits` [N, classes], the
preprocessing of values as its first nodes. What it gives is held against the file, run by ONNX Runtime as it came.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qexp.errors import InputError, first_line
from qexp.foundation.extras import extra
from qexp.models.onnx_batch import free_batch
from qexp.models.onnx_file import INPUT, OUTPUT, PRODUCT_TYPES, OnnxClassifier, layers_of
from qexp.models.preprocessing import Preprocessing, Shape

with extra("onnx", "an ONNX file"):
    import onnx
    import onnx.inliner
    import onnxruntime
    from onnx import external_data_helper, numpy_helper, version_converter

Layout = Literal["nchw", "nhwc"]
EXPECTED = "expected an fp32 image classifier: one float input [N, C, H, W] or [N, H, W, C], one output [N, classes]"
LEAST_OPSET = 13  # from which on int8 weights may have a scale a channel
OPSET = 17  # that older files are converted to
FLOATS = {"FLOAT": 1e-3, "DOUBLE": 1e-3, "FLOAT16": 3e-2, "BFLOAT16": 0.2}  # with what error, in standard deviations
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
CONTROL_FLOW = ("Loop", "If", "Scan")
PLAIN = ("Identity", "Squeeze", "Reshape", "Flatten", "Cast", "Dropout")  # after which probabilities are still such
BATCHES = (1, 3)  # that must give the logits of single images
LARGEST_FILE = 2_000_000_000  # that protobuf writes in one piece


class OnnxNetwork(OnnxClassifier):
    """An fp32 classifier in ONNX Runtime: images [N, C, H, W] in [0, 1] to float logits [N, classes].

    `canonical` is its graph as an ONNX model, `shape` that of an image (channels, height, width), `notes` what was
    changed in the file beside names. `onnx_layers` are its Conv, Gemm and MatMul nodes with constant weights: the names
    that `keep_fp32` takes.
    """

    def __init__(self, model: onnx.ModelProto, shape: Shape, classes: int, file: Path, notes: tuple[str, ...]) -> None:
        super().__init__(model)
        self.canonical, self.shape, self.classes, self.file, self.notes = model, shape, classes, file, notes
        self.onnx_layers = tuple(dict.fromkeys(_products(model.graph).values()))

    @property
    def parameter_count(self) -> int:
        """Of weights and biases, as torch counts parameters: without the statistics of batch norm."""
        constants = {
            one.name: one for one in self.canonical.graph.initializer if one.data_type == onnx.TensorProto.FLOAT
        }
        statistics = {
            name
            for node in self.canonical.graph.node
            if node.op_type == "BatchNormalization"
            for name in node.input[3:]
        }
        used = {name for node in self.canonical.graph.node for name in node.input}
        own = {name for name in constants if name.startswith(OWN)}
        counts = {name: math.prod(constants[name].dims) for name in used & set(constants) - statistics - own}
        return sum(count for count in counts.values() if count > 1)  # not the numbers in formulas

    def product_macs(self, images: int) -> list[tuple[str, str, int, tuple[int, ...]]]:
        """Of each convolution and matrix product of one forward pass: node, layer (empty: its factors depend on the
        images), multiply-accumulates, shape of its result."""
        return _product_macs(self.canonical, (images, *self.shape))

    def layer_table(self) -> str:
        """Its layers with weights, for one image."""
        kinds = {node.name: node.op_type for node in self.canonical.graph.node}
        rows = [("layer", "operation", "output", "MACs")]
        rows += [
            (layer or node, kinds[node], str(list(size)), f"{macs:,}")
            for node, layer, macs, size in self.product_macs(1)
        ]
        widths = [max(len(row[place]) for row in rows) for place in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def read_canonical(file: Path, shape: Shape, classes: int) -> OnnxNetwork:
    """A file that holds what `read_onnx` has given, `canonical`."""
    return OnnxNetwork(onnx.load(file), shape, classes, file, ())


def own_size(file: Path) -> tuple[int, int, int]:
    """Channels, height and width of the images that the file takes; 0 for what it leaves free.

    Raises:
        InputError: it is no file of an image classifier.
    """
    graph = _load(file).graph
    _, dims = _input_of(file, graph)
    order = (1, 2, 3) if _layout(file, graph, dims) == "nchw" else (3, 1, 2)
    channels, height, width = (dims[place] for place in order)
    return channels, height, width


OWN = "qexp_"  # begins the names of tensors and nodes that are put in


def read_onnx(file: Path, preprocessing: Preprocessing | None = None, layout: Layout | None = None) -> OnnxNetwork:
    """The classifier in an ONNX file.

    A batch or a size of images that the file fixes is freed or taken; where it leaves height and width free, they are
    those of `preprocessing`. A softmax at the end is taken off. Half and double precision become single precision.

    Args:
        preprocessing: whose mean, std, input range and order of colours the graph gets as its first nodes; None: the
            file takes RGB or grey in [0, 1] itself.
        layout: of the file's images; None: as its shape tells.

    Raises:
        InputError: it is no such file; one line that names it.
    """
    model = _load(file)
    given = onnx.ModelProto()
    given.CopyFrom(model)
    graph = model.graph
    _refuse_operations(file, graph)
    kind, dims = _input_of(file, graph)
    layout = layout or _layout(file, graph, dims)
    shape = _image_shape(file, dims, layout, preprocessing)
    notes: list[str] = []
    if kind != "FLOAT":
        _to_single_precision(graph)
        notes.append(f"computed in float32 instead of {kind.lower()}")
    elif _has_half(graph):
        _to_single_precision(graph)
        notes.append("weights of float16 computed with in float32")
    _constants_as_initializers(graph)
    _refuse_nan(file, graph)
    _name_all(graph)
    del graph.value_info[:]
    probabilities = _take_off_softmax(graph)
    if probabilities:
        notes.append(f"its {probabilities} at the end is taken off: the outputs are logits")
    batch = dims[0] if isinstance(dims[0], int) else 0
    if batch:
        _free_batch(file, model, [batch, *_in_layout(shape, layout)])
        notes.append(f"its batch of {batch} is freed")
    _set_input(graph, [1 if batch else "N", *_in_layout(shape, layout)])
    if batch:
        graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model = _converted(file, model, notes)
    _frame(model.graph, shape, layout, preprocessing)
    rank = (1, *_run(file, model, np.zeros((max(batch, 1), *shape), np.float32)).shape[1:])
    classes = _flatten_logits(file, model.graph, rank)
    model.ir_version = max(model.ir_version, 8)
    network = OnnxNetwork(model, shape, classes, file, tuple(notes))
    _check_against_file(file, given, network, layout, preprocessing, batch, kind, probabilities)
    return network


def image_shape(file: Path, layout: Layout | None = None) -> tuple[int, int | None, int | None]:
    """Channels, height and width of the images that a file takes; None where they are free.

    Raises:
        InputError: as `read_onnx`.
    """
    graph = _load(file).graph
    _, dims = _input_of(file, graph)
    order = (1, 2, 3) if (layout or _layout(file, graph, dims)) == "nchw" else (3, 1, 2)
    channels, height, width = (dims[place] for place in order)
    return channels or 3, height or None, width or None


def _refused(file: Path, why: str) -> InputError:
    return InputError(f"{file}: {why}; {EXPECTED}")


def _load(file: Path) -> onnx.ModelProto:
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # of whatever kind protobuf raises
        raise _refused(file, "not an ONNX file") from None
    try:
        external_data_helper.load_external_data_for_model(model, str(file.parent))
    except Exception as error:  # of whatever kind its checks raise
        raise _refused(file, f"its weights in other files cannot be read ({first_line(error)})") from None
    if not model.graph.node or not model.opset_import:
        raise _refused(file, "not an ONNX file")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    del model.metadata_props[:]
    return model


def _refuse_nan(file: Path, graph: onnx.GraphProto) -> None:
    """Infinite constants are masks of attention."""
    floats = (one for one in graph.initializer if onnx.TensorProto.DataType.Name(one.data_type) in FLOATS)
    if broken := [one.name for one in floats if np.isnan(numpy_helper.to_array(one).astype(np.float32)).any()]:
        tensors = "1 tensor" if len(broken) == 1 else f"{len(broken)} tensors"
        raise InputError(f"{file}: it has {tensors} with NaN ({', '.join(broken[:3])}{', …' * (len(broken) > 3)})")


def _refuse_operations(file: Path, graph: onnx.GraphProto) -> None:
    kinds = Counter(node.op_type for node in graph.node)
    if found := [kind for kind in kinds if kind in QUANTIZED or kind.startswith("QLinear")]:
        raise _refused(file, f"it is quantized already ({', '.join(sorted(found))})")
    if foreign := {f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in ("", "ai.onnx")}:
        raise _refused(file, f"it has operations that are not of ONNX itself ({', '.join(sorted(foreign)[:3])})")
    if found := [kind for kind in CONTROL_FLOW if kind in kinds]:
        raise _refused(file, f"its graph depends on the data ({', '.join(found)})")


def _input_of(file: Path, graph: onnx.GraphProto) -> tuple[str, list[int]]:
    """Type and shape of the one input; 0 for a size that is free."""
    constants = {constant.name for constant in graph.initializer}
    inputs = [one for one in graph.input if one.name not in constants]
    if len(inputs) != 1:
        raise _refused(file, f"it has {len(inputs)} inputs ({', '.join(one.name for one in inputs[:4])})")
    if len(graph.output) != 1:
        raise _refused(file, f"it has {len(graph.output)} outputs ({', '.join(one.name for one in graph.output[:4])})")
    kind = inputs[0].type.WhichOneof("value")
    tensor = inputs[0].type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type) if kind == "tensor_type" else str(kind)
    if name not in FLOATS:
        raise _refused(file, f"its input {inputs[0].name!r} is of type {name.lower()}")
    if not tensor.HasField("shape") or len(tensor.shape.dim) != 4:
        sizes = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim]
        raise _refused(file, f"its input {inputs[0].name!r} has the shape [{', '.join(map(str, sizes))}]")
    return name, [max(dim.dim_value, 0) for dim in tensor.shape.dim]


def _layout(file: Path, graph: onnx.GraphProto, dims: list[int]) -> Layout:
    """Where the channels are: as the sizes say, or where these do not, the operations that the images go through."""
    first, last = dims[1] in (1, 3), dims[3] in (1, 3)
    if first != last:
        return "nchw" if first else "nhwc"
    shape = ", ".join(str(size or "?") for size in dims)
    if not first and dims[1] and dims[3]:
        raise _refused(file, f"its input has the shape [{shape}]: no 1 or 3 channels")
    if found := _layout_of_operations(graph):
        return found
    raise _refused(file, f"its input has the shape [{shape}]: nothing says whether the channels come first or last")


def _layout_of_operations(graph: onnx.GraphProto) -> Layout | None:
    """Channels are first where a convolution takes the images, and last where they are turned for one before."""
    constants = {one.name for one in graph.initializer}
    (current,) = (one.name for one in graph.input if one.name not in constants)
    while node := next((node for node in graph.node if current in node.input), None):
        if node.op_type == "Conv":
            return "nchw"
        if node.op_type == "Transpose":
            turned = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
            return "nhwc" if turned == [[0, 3, 1, 2]] else None
        if node.op_type not in ("Sub", "Div", "Mul", "Add", "Cast", "Identity", "Clip", "BatchNormalization", "Pad"):
            return None
        current = node.output[0]
    return None


def _image_shape(file: Path, dims: list[int], layout: Layout, preprocessing: Preprocessing | None) -> Shape:
    order = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    wanted = preprocessing.shape if preprocessing else (0, 0, 0)
    found = tuple(dims[place] or size for place, size in zip(order, wanted, strict=True))
    if 0 in found:
        raise InputError(f"{file}: it leaves the size of images free; say it with --image-size, as 224 or 48x192")
    if preprocessing and found != wanted:
        of_file, asked = ("x".join(map(str, size)) for size in (found, wanted))
        raise InputError(f"{file}: it takes images of {of_file} (channels, height, width), not {asked}")
    return found  # type: ignore[return-value]


def _in_layout(shape: Shape, layout: Layout) -> list[int]:
    channels, height, width = shape
    return [channels, height, width] if layout == "nchw" else [height, width, channels]


def _has_half(graph: onnx.GraphProto) -> bool:
    return any(constant.data_type in (10, 11, 16) for constant in graph.initializer)


def _to_single_precision(graph: onnx.GraphProto) -> None:
    """float16, bfloat16 and double, wherever they stand, as float."""
    others = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}

    def single(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in others:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for constant in graph.initializer:
        single(constant)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                single(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i in others:
                attribute.i = onnx.TensorProto.FLOAT


def _constants_as_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes as initializers, and no initializer as an input, as files of old versions list them."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        (attribute,) = node.attribute
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
        else:
            value = onnx.helper.get_attribute_value(attribute)
            kind = np.float32 if "float" in attribute.name else np.int64
            tensor = numpy_helper.from_array(np.array(value, kind))
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    constants = {constant.name for constant in graph.initializer}
    for value in [value for value in graph.input if value.name in constants]:
        graph.input.remove(value)


def _name_all(graph: onnx.GraphProto) -> None:
    """A name for each node that is no other's, and none of our names for tensors."""
    taken = Counter(node.name for node in graph.node)
    for number, node in enumerate(graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.name or node.op_type}_{number}"
    ours = {name: f"{name}_of_file" for name in (INPUT, OUTPUT)}
    _rename(graph, ours)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _take_off_softmax(graph: onnx.GraphProto) -> str:
    """The operation that made probabilities of logits at the end, and is gone; empty: there was none."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type in PLAIN:
        node = makers.get(node.input[0])
    if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return ""
    node_kind = node.op_type
    node.op_type = "Identity"
    del node.attribute[:]
    return str(node_kind)


def _free_batch(file: Path, model: onnx.ModelProto, sizes: list[int]) -> None:
    """Let the graph take any number of images instead of the one that it was written for.

    Args:
        sizes: of the input, the batch first.
    """
    graph = model.graph
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    _set_input(watched.graph, sizes)
    names = [name for node in graph.node for name in node.output if name and name != graph.output[0].name]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = _all_outputs(file, watched, np.zeros(sizes, np.float32))
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    values |= dict(zip([graph.output[0].name, *names], found, strict=True))
    values[graph.input[0].name] = np.zeros(sizes, np.float32)
    free_batch(graph, {name: value for name, value in values.items() if isinstance(value, np.ndarray)}, sizes[0], OWN)


def _set_input(graph: onnx.GraphProto, sizes: list[Any]) -> None:
    name = graph.input[0].name
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
    output, dims = graph.output[0].name, len(graph.output[0].type.tensor_type.shape.dim)
    free = [f"size_{number}" for number in range(dims)]  # of whatever the file says, its batch is part
    graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, free))


def _converted(file: Path, model: onnx.ModelProto, notes: list[str]) -> onnx.ModelProto:
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for entry in [entry for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]:
        model.opset_import.remove(entry)
    if version >= LEAST_OPSET:
        return model
    model.ir_version = max(model.ir_version, 8)  # older ones list initializers as inputs
    try:
        converted = version_converter.convert_version(model, OPSET)
        onnx.checker.check_model(converted)
    except Exception as error:  # of whatever kind the converter raises
        raise InputError(
            f"{file}: of opset {version}, and not convertible to opset {OPSET} ({first_line(error)}); export it with "
            f"opset {LEAST_OPSET} or later"
        ) from None
    notes.append(f"converted from opset {version} to {OPSET}")
    return converted


def _frame(graph: onnx.GraphProto, shape: Shape, layout: Layout, preprocessing: Preprocessing | None) -> None:
    """Put our input in front of the file's, and our name on its output."""
    current, nodes, own = INPUT, [], graph.input[0].name

    def then(kind: str, *constants: np.ndarray, **attributes: Any) -> None:
        nonlocal current
        name = f"{OWN}{kind.lower()}"
        names = [f"{name}_{number}" for number in range(len(constants))]
        graph.initializer.extend(
            numpy_helper.from_array(values, its) for values, its in zip(constants, names, strict=True)
        )
        nodes.append(onnx.helper.make_node(kind, [current, *names], [f"{name}_result"], name, **attributes))
        current = f"{name}_result"

    if preprocessing and preprocessing.channels == "bgr":
        then("Gather", np.array([2, 1, 0], np.int64), axis=1)
    mean, std = _on_unit_scale(preprocessing, shape[0])
    if mean.any():
        then("Sub", mean)
    if (std != 1).any():
        then("Div", std)
    if layout == "nhwc":
        then("Transpose", perm=[0, 2, 3, 1])
    nodes.append(onnx.helper.make_node("Identity", [current], [own], f"{OWN}identity"))
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["N", *shape]))
    _rename(graph, {graph.output[0].name: OUTPUT})


def _on_unit_scale(preprocessing: Preprocessing | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [1, C, 1, 1] of what the file sees, for values in [0, 1]."""
    if preprocessing is None:
        return np.zeros((1, channels, 1, 1), np.float32), np.ones((1, channels, 1, 1), np.float32)
    low, high = preprocessing.input_range
    mean, std = preprocessing.mean or (0.0,) * channels, preprocessing.std or (1.0,) * channels
    scaled = ((np.array(mean) - low) / (high - low), np.array(std) / (high - low))
    first, second = (values.reshape(1, channels, 1, 1).astype(np.float32) for values in scaled)
    return first, second


def _flatten_logits(file: Path, graph: onnx.GraphProto, sizes: tuple[int, ...]) -> int:
    """Make the output [N, classes] of what has more dimensions of size 1; the number of classes."""
    classes = math.prod(sizes[1:])
    if len(sizes) < 2 or max(sizes[1:]) != classes or classes < 2:
        text = ", ".join(map(str, ["N" if len(sizes) > 1 else sizes[0], *sizes[1:]] if sizes else []))
        raise _refused(file, f"its output has the shape [{text}]")
    if len(sizes) > 2:
        own = f"{OWN}logits"
        _rename(graph, {OUTPUT: own})
        graph.node.append(onnx.helper.make_node("Flatten", [own], [OUTPUT], f"{OWN}flatten", axis=1))
    graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["N", classes]))
    return classes


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(file: Path, model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    return np.asarray(_all_outputs(file, model, images)[0])


def _all_outputs(file: Path, model: onnx.ModelProto, images: np.ndarray) -> list[Any]:
    try:
        session = _session(model)
        return list(session.run(None, {session.get_inputs()[0].name: images}))
    except Exception as error:  # of whatever kind ONNX Runtime raises
        raise _refused(file, f"ONNX Runtime does not run it ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The line of ONNX Runtime without its codes."""
    return first_line(error).rpartition(" : ")[2][:200]


def _check_against_file(
    file: Path,
    given: onnx.ModelProto,
    network: OnnxNetwork,
    layout: Layout,
    preprocessing: Preprocessing | None,
    batch: int,
    kind: str,
    probabilities: str,
) -> None:
    """Hold the network, in batches of several sizes, against the file as it came."""
    images = np.random.default_rng(0).random((max(BATCHES), *network.shape), np.float32)
    mean, std = _on_unit_scale(preprocessing, network.shape[0])
    seen = ((images[:, ::-1] if preprocessing and preprocessing.channels == "bgr" else images) - mean) / std
    seen = seen if layout == "nchw" else seen.transpose(0, 2, 3, 1)
    if kind in ("DOUBLE", "BFLOAT16"):  # in which ONNX Runtime has no kernels for convolutions
        _to_single_precision(given.graph)
    seen = seen.astype(np.float16 if kind == "FLOAT16" else np.float32)
    each = [np.repeat(one[None], max(batch, 1), axis=0) for one in seen]
    expected = np.stack([_run(file, given, one)[0].reshape(-1) for one in each]).astype(np.float64)
    if not np.isfinite(expected).all():
        raise InputError(f"{file}: it gives NaN or infinite numbers for an image of random pixels")
    limit = FLOATS["FLOAT16"] if _has_half(given.graph) and kind == "FLOAT" else FLOATS[kind]
    session = _session(network.canonical)  # which reports no errors on its own
    for size in BATCHES:
        try:
            found = torch.from_numpy(session.run(None, {INPUT: images[:size]})[0]).double()
        except Exception:  # of whatever kind ONNX Runtime raises
            sizes = f"of {batch}" if batch else f"of some sizes, not of {size}"
            raise InputError(f"{file}: it takes batches {sizes} only; export it with a dynamic batch") from None
        if probabilities:
            found = found.softmax(1) if probabilities == "Softmax" else found.log_softmax(1)
        difference = np.abs(found.numpy() - expected[:size]).max() if found.shape == expected[:size].shape else math.inf
        if difference > limit * max(expected.std(), 1e-6):
            raise InputError(
                f"{file}: in batches of {size} it does not give what it gives for single images"
                if size > 1
                else f"{file}: rewritten, it does not give what it gives in ONNX Runtime as it is"
            )


def _constant_names(graph: onnx.GraphProto) -> set[str]:
    """Tensors that depend on no image."""
    constant = {one.name for one in graph.initializer}
    for node in graph.node:
        if node.input and all(name in constant or not name for name in node.input):
            constant.update(node.output)
    return constant


def _products(graph: onnx.GraphProto) -> dict[str, str]:
    """Nodes that multiply by constant weights, and the name of the layer of each."""
    constant, names = _constant_names(graph), layers_of(graph.node)
    found = [node for node in graph.node if node.op_type in PRODUCT_TYPES and constant & set(node.input[:2])]
    return {node.name: names[node.name] for node in found if not constant.issuperset(node.input[:2])}


def _product_macs(model: onnx.ModelProto, size: tuple[int, ...]) -> list[tuple[str, str, int, tuple[int, ...]]]:
    nodes = [node for node in model.graph.node if node.op_type in MACS]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    constants = {one.name: tuple(one.dims) for one in model.graph.initializer}
    wanted = {name for node in nodes for name in (*node.input[:2], node.output[0])} - {OUTPUT, INPUT, *constants}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    session = _session(watched)
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {INPUT: np.zeros(size, np.float32)})
    shapes = constants | {name: values.shape for name, values in zip(names, found, strict=True)} | {INPUT: size}
    layers = _products(model.graph)

    def lines() -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
        for node in nodes:
            first, second, result = (shapes[name] for name in (*node.input[:2], node.output[0]))
            given = {attribute.name: attribute.i for attribute in node.attribute}
            yield node.name, layers.get(node.name, ""), MACS[node.op_type](first, second, result, given), result

    return list(lines())


Sizes = tuple[int, ...]
MACS: dict[str, Callable[[Sizes, Sizes, Sizes, dict[str, int]], int]] = {  # of input, weights, result
    "Conv": lambda given, weight, result, options: math.prod(result) * math.prod(weight[1:]),
    "ConvTranspose": lambda given, weight, result, options: math.prod(given) * math.prod(weight[1:]),
    "Gemm": lambda given, weight, result, options: math.prod(result) * given[0 if options.get("transA") else 1],
    "MatMul": lambda given, weight, result, options: math.prod(result) * given[-1],
}
