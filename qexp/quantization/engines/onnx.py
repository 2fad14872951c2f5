"""Static quantization by ONNX Runtime (QDQ) of what torch.onnx exports; it is served by onnxruntime alone.

Method: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html. The ranges come from the same
observers as those of the other engines, fed with the activations that ONNX Runtime computes for calibration images;
its own histogram methods keep all activations of all images in memory.
"""

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.ao.quantization import observer

from qexp.config import QuantizeConfig
from qexp.errors import StageError, with_place
from qexp.measurement.accuracy import to_float
from qexp.models.onnx_file import (
    INPUT,
    LAYER_TYPES,
    ONLY_ONNXRUNTIME,
    PRODUCT_TYPES,
    OnnxClassifier,
    export,
    layers_of,
)
from qexp.progress import track
from qexp.quantization.attention import IN_PROJECTION, normalizes_tokens
from qexp.quantization.fp32_layers import between_kept
from qexp.quantization.observers import calibration_batches, observer_class
from qexp.quantization.result import QuantizedModel, QuantizeResult

INT8_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
# Of one tensor, element by element, other than those that are part of ONNX Runtime's convolutions (Relu and Clip).
ACTIVATIONS = ("HardSwish", "Sigmoid", "HardSigmoid", "Gelu", "Elu", "LeakyRelu", "Tanh", "Mish")
FIRST_WITH_HARD_SWISH = 14  # of ONNX's operator sets
MOST_BYTES = 2_000_000_000  # of activations, all of which are there at once: ViT-B/16 has 0.4 GB of them per image


def quantize(model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    """See `qexp.quantization.quantize_model`."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _quantize(model, images, options, reduce_range, Path(folder))
    except Exception as error:  # the exporter raises whatever the model's Python code does when it meets a symbol
        raise StageError(f"engine onnx cannot quantize this model: {with_place(error)}") from error


def quantize_network(network: Any, images: Tensor, options: QuantizeConfig, reduce_range: bool) -> QuantizedModel:
    """Quantize an `OnnxNetwork` (models/onnx_input.py), which is an ONNX graph already."""
    kinds = {node.op_type for node in network.canonical.graph.node}
    tokens = "LayerNormalization" in kinds or {"ReduceMean", "Sqrt"} <= kinds  # as older opsets spell it out
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "fp32.onnx")
            onnx.save(network.canonical, file)
            return _quantize_file(file, network, images, options, reduce_range, tokens)
    except Exception as error:  # of whatever kind ONNX Runtime's tools raise
        raise StageError(f"engine onnx cannot quantize {network.file}: {with_place(error)}") from error


def _quantize(
    model: nn.Module, images: Tensor, options: QuantizeConfig, reduce_range: bool, folder: Path
) -> QuantizedModel:
    exported, example = folder / "fp32.onnx", to_float(images[:2])
    export(model, torch.cat([example, example]), exported)  # of one image alone, too, more than one
    return _quantize_file(exported, model, images, options, reduce_range, normalizes_tokens(model))


def _quantize_file(
    exported: Path,
    model: nn.Module,
    images: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
    tokens: bool,
) -> QuantizedModel:
    """Quantize an fp32 ONNX file.

    Args:
        exported: as `export` writes it; beside it the files of the steps in between are written.
        model: what the file computes; `source` of the result.
        tokens: whether it normalises tokens, as transformers do: then only products are int8.
    """
    prepared, quantized, ranges = (exported.with_name(name) for name in ("prepared.onnx", "int8.onnx", "ranges.json"))
    given = onnx.load(exported)
    _drop_unused(given.graph)
    onnx.save(given, prepared)
    quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    graph = onnx.load(prepared)
    _multiply_last_convolutions(graph.graph)
    if max(entry.version for entry in graph.opset_import if not entry.domain) >= FIRST_WITH_HARD_SWISH:
        _restore_hard_swish(graph.graph)
    graph = onnx.shape_inference.infer_shapes(graph)
    onnx.save(graph, prepared)
    fused = _computed_with_a_convolution(graph.graph)
    products = _products(graph, _with_own_names(layers_of(given.graph.node), given.graph, model))
    save_tensors_data(_observe(graph, images, options), ranges)
    kept = {node for node, layer in products.items() if layer in (options.keep_fp32 or ())}
    kept |= _between(graph, products, kept)
    ends = _after_products(graph.graph)
    quantize_static(
        str(prepared), str(quantized), calibration_cache_path=ranges, per_channel=options.per_channel,
        reduce_range=reduce_range, op_types_to_quantize=list(LAYER_TYPES) if tokens else None,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=sorted(kept | ends),
    )  # fmt: skip
    stored = onnx.load(quantized)
    reference = OnnxClassifier(stored, optimized=False)
    _leave_logits_float(stored.graph)
    _shield(stored.graph, kept)
    for node in stored.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in fused:
            node.metadata_props.add(key=ONLY_ONNXRUNTIME, value="true")
    onnx.save(stored, quantized)
    in_int8 = _int8_nodes(quantized, exported.with_name("optimized.onnx"))
    floats = {layer for node, layer in products.items() if node not in in_int8}
    int8 = tuple(layer for layer in products.values() if layer not in floats)
    result = QuantizeResult.with_options(
        options, reduce_range, len(images), backend="onnxruntime", int8_layers=int8, float_layers=tuple(sorted(floats))
    )
    return QuantizedModel(OnnxClassifier(stored), stored, "onnx", model, result, reference)


def _observe(graph: onnx.ModelProto, images: Tensor, options: QuantizeConfig) -> TensorsData:
    """Smallest and largest value of every float tensor, as the observer chooses them."""
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    known = {value.name for value in watched.graph.output}
    made = {name for node in watched.graph.node for name in node.output}  # types of what is gone may have stayed
    floats = [value for value in watched.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    watched.graph.output.extend(value for value in floats if value.name in made - known)
    session = OnnxClassifier(watched).session
    names = [INPUT, *(output.name for output in session.get_outputs())]
    of_one = sum(values.nbytes for values in session.run(None, {INPUT: to_float(images[:1]).numpy()}))
    at_once = max(1, min(options.calibration_batch_size, MOST_BYTES // of_one))
    make = observer_class(observer, options)
    observers = {name: make(dtype=torch.quint8) for name in names}
    batches = calibration_batches(images, at_once)
    for batch in track(batches, "calibrating", len(batches)):
        inputs = to_float(batch).numpy()
        for name, values in zip(names, [inputs, *session.run(None, {INPUT: inputs})], strict=True):
            observers[name](torch.from_numpy(values))
    return TensorsData(CalibrationMethod.MinMax, {name: _range(found) for name, found in observers.items()})


def _range(found: Any) -> tuple[np.ndarray, np.ndarray]:
    scale, zero = found.calculate_qparams()
    low, high = (float(scale) * (end - int(zero)) for end in (0, 255))
    return np.array(low, np.float32), np.array(high, np.float32)


def _products(graph: onnx.ModelProto, layers: dict[str, str]) -> dict[str, str]:
    """Nodes that multiply by constant weights, and the layer of each; `layers` holds those of the exported nodes.

    Of what ONNX Runtime fuses, the name of the first node stays, with a suffix at most.
    """
    constants = {tensor.name for tensor in graph.graph.initializer}
    found = [node.name for node in graph.graph.node if node.op_type in PRODUCT_TYPES and constants & set(node.input)]
    return {name: layers.get(name.split("/")[0], name) for name in found}


def _with_own_names(layers: dict[str, str], graph: onnx.GraphProto, model: nn.Module) -> dict[str, str]:
    """`layers` by the names that they have in `model`, where a module that is exported as a whole has given its own to
    all that it computes: `nn.MultiheadAttention` to its first projection, `nn.TransformerEncoder` to all its layers."""
    modules = dict(model.named_modules())
    constants = {constant.name: constant for constant in graph.initializer}
    unnamed: dict[bytes, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            unnamed.setdefault(_bytes(module.in_proj_weight), []).append(f"{name}.{IN_PROJECTION}")
        elif isinstance(module, nn.Linear) and name not in layers.values():
            unnamed.setdefault(_bytes(module.weight), []).append(name)
    found = dict(layers)
    for node in graph.node:
        whole = modules.get(layers[node.name])
        if node.op_type not in ("MatMul", "Gemm") or whole is None or isinstance(whole, nn.Conv2d | nn.Linear):
            continue
        weight = constants.get(node.input[1])
        values = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()) if weight is not None else None
        names = unnamed.get(_bytes(values if node.op_type == "Gemm" else values.t()), []) if values is not None else []
        if names:  # of equal weights, the names in their order
            found[node.name] = names.pop(0) if len(names) > 1 else names[0]
        elif isinstance(whole, nn.MultiheadAttention):
            found[node.name] = f"{layers[node.name]}.{IN_PROJECTION}"  # a part of it
    return found


def _bytes(weight: Tensor) -> bytes:
    return weight.detach().contiguous().numpy().tobytes()


def _between(graph: onnx.ModelProto, products: dict[str, str], kept: set[str]) -> set[str]:
    nodes = graph.graph.node
    makers = {output: node.name for node in nodes for output in node.output}
    return between_kept(
        (
            node.name,
            [makers[name] for name in node.input if name in makers],
            node.name in kept if node.name in products else None,
        )
        for node in nodes
    )


def _last_products(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The products that no other product depends on, and all nodes that do not lead to a product, in order."""
    needed: set[str] = set()  # tensors that a product depends on
    products: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        is_product, leads_to_one = node.op_type in PRODUCT_TYPES, bool(needed & set(node.output))
        if not leads_to_one:
            (products if is_product else others).append(node)
        if is_product or leads_to_one:
            needed |= set(node.input)
    return products[::-1], others[::-1]


def _after_products(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes after the last products that need not be quantized for the sake of a product.

    A Relu or Clip after a convolution is part of its kernel.
    """
    products, others = _last_products(graph)
    convolved = {node.output[0] for node in products if node.op_type == "Conv"}
    return {node.name for node in others if not (node.op_type in ("Relu", "Clip") and node.input[0] in convolved)}


def _multiply_last_convolutions(graph: onnx.GraphProto) -> None:
    """Make a matrix product over channels of a last convolution with a kernel of one pixel.

    ONNX Runtime has an int8 kernel with a float result for matrix products, and none for convolutions.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    for node in _last_products(graph)[0]:
        weight = constants.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or not _is_product_over_channels(node, weight):
            continue
        values = onnx.numpy_helper.to_array(weight).reshape(weight.dims[:2]).T
        own = {part: f"{node.name}_{part}" for part in ("input", "weight", "product", "sum")}
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), own["weight"]))
        make, (bias, result) = onnx.helper.make_node, (node.input[2:], node.output[0])
        product = make("MatMul", [own["input"], own["weight"]], [own["product"]], node.name)
        product.metadata_props.extend(node.metadata_props)
        new = [make("Transpose", [node.input[0]], [own["input"]], f"{node.name}_to_last", perm=[0, 2, 3, 1]), product]
        new += [make("Add", [own["product"], bias[0]], [own["sum"]], f"{node.name}_bias")] if bias else []
        new += [make("Transpose", [new[-1].output[0]], [result], f"{node.name}_to_first", perm=[0, 3, 1, 2])]
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for another in reversed(new):
            graph.node.insert(place, another)


def _restore_hard_swish(graph: onnx.GraphProto) -> None:
    """Make HardSwish again of x * HardSigmoid(x), into which ONNX Runtime has divided it.

    As one node it is computed in fp32 between the quantized results of two layers. Divided, the gate and the product
    are rounded separately, and OpenVINO computes the gate alone, in fp32, by its slowest kernel.
    """
    used = Counter(name for node in graph.node for name in node.input)
    gates = {node.output[0]: node for node in graph.node if _is_gate_of_hard_swish(node) and used[node.output[0]] == 1}
    for node in [node for node in graph.node if node.op_type == "Mul" and set(node.input) & set(gates)]:
        gate = next(gates[name] for name in node.input if name in gates)
        if set(node.input) == {gate.input[0], gate.output[0]}:
            node.op_type = "HardSwish"
            node.input[:] = gate.input
            graph.node.remove(gate)


def _is_gate_of_hard_swish(node: onnx.NodeProto) -> bool:
    given = {attribute.name: attribute.f for attribute in node.attribute}
    return node.op_type == "HardSigmoid" and (
        math.isclose(given.get("alpha", 0.2), 1 / 6, rel_tol=1e-5) and math.isclose(given.get("beta", 0.5), 0.5)
    )


def _computed_with_a_convolution(graph: onnx.GraphProto) -> set[str]:
    """Tensors inside a convolution with its activation, which OpenVINO computes in one kernel: from a convolution to
    activations alone, and of x * Sigmoid(x) the second factor too."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    found = set[str]()
    for node in graph.node:
        name = node.output[0]
        if node.op_type != "Conv" or name in outputs:
            continue
        after = users.get(name, [])
        gates = {one.output[0] for one in after if one.op_type == "Sigmoid" and len(users[one.output[0]]) == 1}
        silus = [one for one in after if one.op_type == "Mul" and set(one.input) - {name} <= gates]
        if after and all(one.op_type in ACTIVATIONS or one in silus for one in after):
            found |= {name, *(factor for one in silus for factor in one.input)}
    return found


def _is_product_over_channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = given.get("group", 1) == 1 and not any(given.get("pads", ())) and {*given.get("strides", (1,))} == {1}
    return plain and list(weight.dims[2:]) == [1, 1] and given.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _leave_logits_float(graph: onnx.GraphProto) -> None:
    """Take QuantizeLinear and DequantizeLinear from after the last matrix products: they would round the logits.

    The result of a convolution stays quantized, since ONNX Runtime has no int8 kernel for one with a float result.
    """
    products, others = _last_products(graph)
    floats = {node.output[0] for node in products if node.op_type != "Conv"}
    quantized = {
        node.output[0]: node.input[0] for node in others if node.op_type == "QuantizeLinear" and node.input[0] in floats
    }
    dequantized = {
        node.output[0]: quantized[node.input[0]]
        for node in others if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }  # fmt: skip
    ends = {dequantized[value.name]: value.name for value in graph.output if value.name in dequantized}
    names = {name: ends.get(source, source) for name, source in dequantized.items()} | ends  # outputs keep their names
    for node in [node for node in others if node.output[0] in quantized or node.output[0] in dequantized]:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Take constants off that no operation takes: ONNX Runtime warns of each in a file that it is given."""
    used = {name for node in graph.node for name in node.input}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


def _shield(graph: onnx.GraphProto, kept: set[str]) -> None:
    """Stop ONNX Runtime from quantizing nodes that are to stay fp32, in one scale, when it loads the model.

    Its pass WeightBiasQuantization does that to a Conv or Gemm whose input comes from a DequantizeLinear with one
    scale. From one with a scale for each channel, all the same, come equal values, and the node is left alone.
    """
    producers = {output: node for node in graph.node for output in node.output}
    constants = {constant.name: constant for constant in graph.initializer}
    for place, node in reversed(list(enumerate(graph.node))):
        before = producers.get(node.input[0]) if node.name in kept and node.op_type in ("Conv", "Gemm") else None
        if before is None or before.op_type != "DequantizeLinear":
            continue
        names = [f"{node.name}_input_{part}" for part in ("scale", "zero_point")]
        for name, constant in zip(names, before.input[1:], strict=True):
            values = onnx.numpy_helper.to_array(constants[constant])
            repeated = np.repeat(values, _input_channels(node, constants))
            graph.initializer.append(onnx.numpy_helper.from_array(repeated, name))
        output = f"{node.name}_input"
        graph.node.insert(place, onnx.helper.make_node("DequantizeLinear", [before.input[0], *names], [output], axis=1))
        node.input[0] = output


def _input_channels(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int:
    shape = constants[node.input[1]].dims
    given = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        return int(shape[1] * given.get("group", 1))
    return int(shape[1] if given.get("transB", 0) else shape[0])


def _int8_nodes(quantized: Path, optimized: Path) -> set[str]:
    """Names of what ONNX Runtime multiplies in int8, after all fusions that do not depend on the machine."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(quantized), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(optimized).graph.node
    return {node.name for node in nodes if node.op_type in INT8_KERNELS}
