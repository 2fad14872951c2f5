"""ONNX files as other tools write them: each becomes the one form that qexp takes, or one line that says why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from qexp.errors import InputError
from qexp.models.onnx_input import image_shape, read_onnx
from qexp.models.preprocessing import Preprocessing

RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(6, 3, 3, 3)).astype(np.float32)
LAST = RANDOM.normal(size=(6, 4)).astype(np.float32)
IMAGES = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
SIZE = Preprocessing(8, 12)


def _logits(images: Tensor) -> Tensor:
    """What all files of these tests compute."""
    maps = F.conv2d(images, torch.from_numpy(KERNEL), padding=1).relu()
    return maps.mean((2, 3)) @ torch.from_numpy(LAST)


def _model(
    given: tuple[Any, ...] = ("N", 3, 8, 12),
    nhwc: bool = False,
    flatten: str = "Flatten",
    shape: tuple[int, ...] = (-1, 6),
    end: tuple[str, ...] = (),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    as_nodes: bool = False,
    as_inputs: bool = False,
    names: tuple[str, str] = ("x", "y"),
    output: tuple[Any, ...] = ("N", 4),
) -> onnx.ModelProto:
    """[Transpose], Conv, Relu, GlobalAveragePool, Flatten or another, MatMul, and what comes at the end."""
    number = helper.tensor_dtype_to_np_dtype(kind)
    constants = {
        "kernel": KERNEL.astype(number), "last": LAST.astype(number), "shape": np.array(shape, np.int64),
        "kernel1": LAST.T[..., None, None].astype(number), "axes": np.array([2, 3], np.int64),
    }  # fmt: skip
    maps = "pooled"
    nodes = [helper.make_node("Transpose", [names[0]], ["first"], perm=[0, 3, 1, 2])] if nhwc else []
    nodes += [
        helper.make_node("Conv", ["first" if nhwc else names[0], "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], [maps]),
    ]
    inputs = {"Reshape": ["shape"], "Squeeze": ["axes"]}.get(flatten, [])
    if flatten == "Conv":
        nodes.append(helper.make_node("Conv", [maps, "kernel1"], ["values0"]))
    else:
        nodes.append(helper.make_node(flatten, [maps, *inputs], ["flat"]))
        nodes.append(helper.make_node("MatMul", ["flat", "last"], ["values0"]))
    for place, operation in enumerate(end):
        options = {"Softmax": {"axis": 1}, "LogSoftmax": {"axis": 1}, "Cast": {"to": TensorProto.FLOAT}}.get(
            operation, {}
        )
        nodes.append(helper.make_node(operation, [f"values{place}"], [f"values{place + 1}"], **options))
    nodes[-1].output[0] = names[1]
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items() if name in used]
    values = [helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in tensors if as_inputs]
    if as_nodes:
        nodes = [helper.make_node("Constant", [], [one.name], value=one) for one in tensors] + nodes
        tensors = []
    graph = helper.make_graph(
        nodes, "of others", [helper.make_tensor_value_info(names[0], kind, given), *values],
        [helper.make_tensor_value_info(names[1], kind, output)], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if as_inputs else 8)


FILES: dict[str, tuple[dict[str, Any], Preprocessing | None]] = {
    "PyTorch": ({}, None),
    "Keras": (dict(given=("N", 8, 12, 3), nhwc=True, end=("Softmax",)), None),
    "batch of 1": (dict(given=(1, 3, 8, 12), flatten="Reshape", shape=(1, 6), output=(1, 4)), None),
    "batch of 1, other size said": (dict(given=(1, 3, 8, 12), flatten="Reshape", shape=(1, -1), output=(1, 4)), None),
    "all sizes free": (dict(given=("N", "c", "h", "w")), SIZE),
    "all sizes free, NHWC": (dict(given=("N", "h", "w", "c"), nhwc=True), SIZE),
    "batch of 2, NHWC": (
        dict(given=(2, 8, 12, 3), nhwc=True, flatten="Reshape", shape=(2, 6), output=(2, 4)), None,
    ),
    "Paddle": (dict(given=(-1, 3, "?", "?"), opset=11, as_nodes=True, end=("Softmax", "Identity")), SIZE),
    "opset 9": (dict(opset=9), None),
    "old IR": (dict(opset=9, as_inputs=True, end=("Softmax",)), None),
    "half precision": (dict(kind=TensorProto.FLOAT16, end=("Softmax",)), None),
    "double precision": (dict(kind=TensorProto.DOUBLE), None),
    "logarithms": (dict(end=("LogSoftmax", "Cast")), None),
    "maps of one pixel": (dict(flatten="Conv", end=("Softmax",), output=("N", 4, 1, 1)), None),
    "squeezed": (dict(flatten="Squeeze"), None),
    "names as ours": (dict(names=("logits", "images")), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_each_file_gives_its_own_logits_for_batches_of_any_size(case: str, tmp_path: Path) -> None:
    options, preprocessing = FILES[case]
    model = _model(**options)
    onnx.save(model, tmp_path / "model.onnx")
    network = read_onnx(tmp_path / "model.onnx", preprocessing)
    expected, near = _logits(IMAGES), 1e-2 if options.get("kind") == TensorProto.FLOAT16 else 1e-4
    assert (network.classes, network.shape, len(network.onnx_layers)) == (4, (3, 8, 12), 2)
    for size in (1, 5):
        found = network(IMAGES[:size])
        assert found.shape == (size, 4)
        if "LogSoftmax" in options.get("end", ()) or "Softmax" in options.get("end", ()):
            found, wanted = found.log_softmax(1), expected[:size].log_softmax(1)
        else:
            wanted = expected[:size]
        assert torch.allclose(found, wanted, atol=near)
    onnx.checker.check_model(network.canonical, full_check=True)
    assert [value.name for value in network.canonical.graph.input] == ["images"]


def test_values_are_made_what_the_file_expects(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "model.onnx")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    given = Preprocessing(8, 12, channels="bgr", mean=mean, std=std, input_range=(-1.0, 1.0))
    scaled = (2 * IMAGES.flip(1) - 1 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(read_onnx(tmp_path / "model.onnx", given)(IMAGES), _logits(scaled), atol=1e-4)


def test_weights_in_another_file(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert torch.allclose(read_onnx(tmp_path / "model.onnx")(IMAGES), _logits(IMAGES), atol=1e-4)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: its weights in other files cannot be read"):
        read_onnx(tmp_path / "model.onnx")


def test_the_shape_of_images_is_that_of_the_file(tmp_path: Path) -> None:
    for name, given in (("fixed", ("N", 8, 12, 3)), ("free", ("N", 3, "h", "w"))):
        onnx.save(_model(given, nhwc=name == "fixed"), tmp_path / f"{name}.onnx")
    assert image_shape(tmp_path / "fixed.onnx") == (3, 8, 12)
    assert image_shape(tmp_path / "free.onnx") == (3, None, None)
    with pytest.raises(InputError, match=r"free\.onnx: it leaves the size of images free; say it with --image-size"):
        read_onnx(tmp_path / "free.onnx")
    with pytest.raises(InputError, match=r"it takes images of 3x8x12 .*, not 3x9x9"):
        read_onnx(tmp_path / "fixed.onnx", Preprocessing(9, 9))


def _edited(edit: Callable[[onnx.GraphProto], None], **options: Any) -> bytes:
    model = _model(**options)
    edit(model.graph)
    return model.SerializeToString()  # type: ignore[no-any-return]


def _kind(number: int) -> Callable[[onnx.GraphProto], None]:
    return lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", number)


def _operation(kind: str, domain: str = "") -> Callable[[onnx.GraphProto], None]:
    return lambda graph: graph.node.append(helper.make_node(kind, ["positive"], ["more"], domain=domain))


def _second(part: str) -> Callable[[onnx.GraphProto], None]:
    return lambda graph: getattr(graph, part).append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N"]))


def _relu_first(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = "r"
    graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"]))


REFUSED: dict[str, tuple[bytes, str]] = {
    "text": (b"<html>not found</html>", "not an ONNX file"),
    "empty": (b"", "not an ONNX file"),
    "half": (_model().SerializeToString()[:600], "not an ONNX file"),
    "two inputs": (_edited(_second("input")), r"it has 2 inputs \(x, mask\)"),
    "two outputs": (_edited(_second("output")), r"it has 2 outputs \(y, mask\)"),
    "tokens": (_edited(_kind(TensorProto.INT64)), "its input 'x' is of type int64"),
    "bytes": (_edited(_kind(TensorProto.UINT8)), "its input 'x' is of type uint8"),
    "vectors": (_edited(lambda graph: None, given=("N", 3)), r"its input 'x' has the shape \[N, 3\]"),
    "five channels": (_edited(lambda graph: None, given=("N", 5, 8, 12)), r"\[\?, 5, 8, 12\]: no 1 or 3 channels"),
    "ambiguous": (
        _edited(_relu_first, given=("N", 3, 8, 3)),
        "nothing says whether the channels come first or last",
    ),
    "maps": (_edited(lambda graph: graph.node[-1].input.__setitem__(0, "positive"), given=("N", 3, 8, 6)),
             r"its output has the shape \[N, 6, 8, 4\]"),
    "quantized": (_edited(_operation("DequantizeLinear")), r"it is quantized already \(DequantizeLinear\)"),
    "control flow": (_edited(_operation("Loop")), r"its graph depends on the data \(Loop\)"),
    "own operations": (_edited(_operation("Fancy", "my.company")), r"not of ONNX itself \(my\.company\.Fancy\)"),
    "does not run": (_edited(lambda graph: graph.node.pop(0)), "ONNX Runtime does not run it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_classifier_is_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    content, why = REFUSED[case]
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=rf"model\.onnx: .*{why}") as refused:
        read_onnx(tmp_path / "model.onnx")
    assert "\n" not in str(refused.value)
    assert "expected an fp32 image classifier" in str(refused.value)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    broken = _model()
    broken.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full_like(KERNEL, np.nan), "kernel"))
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"broken\.onnx: it has 1 tensor with NaN \(kernel\)$"):
        read_onnx(tmp_path / "broken.onnx")
    broken.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full_like(KERNEL, np.inf), "kernel"))
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"broken\.onnx: it gives NaN or infinite numbers for an image of random"):
        read_onnx(tmp_path / "broken.onnx")


TOKEN = RANDOM.normal(size=6).astype(np.float32)


def _attention_logits(images: Tensor) -> Tensor:
    """Attention with two heads among the pixels and a class token, whose result is classified."""
    maps = F.conv2d(images, torch.from_numpy(KERNEL), padding=1).flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.from_numpy(TOKEN).expand(len(images), 1, 6), maps], 1)
    heads = tokens.unflatten(2, (2, 3)).transpose(1, 2)
    mixed = (heads @ heads.transpose(2, 3)).softmax(3) @ heads
    return mixed.transpose(1, 2).flatten(2)[:, 0] @ torch.from_numpy(LAST)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_batch_of_a_transformer_is_freed(batch: int, tmp_path: Path) -> None:
    """Its class token is repeated for each image, and its windows or heads share an axis with the images."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "kernel"], ["maps"], pads=[1, 1, 1, 1]), make("Reshape", ["maps", "s0"], ["flat"]),
        make("Transpose", ["flat"], ["pixels"], perm=[0, 2, 1]), make("Concat", ["token", "pixels"], ["all"], axis=1),
        make("Reshape", ["all", "s1"], ["parts"]), make("Transpose", ["parts"], ["heads"], perm=[0, 2, 1, 3]),
        make("Reshape", ["heads", "s2"], ["q"]), make("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        make("MatMul", ["q", "k"], ["scores"]), make("Softmax", ["scores"], ["shares"], axis=2),
        make("MatMul", ["shares", "q"], ["mixed"]), make("Reshape", ["mixed", "s3"], ["apart"]),
        make("Transpose", ["apart"], ["turned"], perm=[2, 0, 1, 3]), make("Reshape", ["turned", "s4"], ["joined"]),
        make("Gather", ["joined", "zero"], ["first"], axis=0), make("MatMul", ["first", "last"], ["y"]),
    ]  # fmt: skip
    shapes = [(batch, 6, 96), (batch, 97, 2, 3), (2 * batch, 97, 3), (batch, 2, 97, 3), (97, batch, 6)]
    constants = {"kernel": KERNEL, "last": LAST, "token": np.tile(TOKEN, (batch, 1, 1)), "zero": np.array(0)}
    constants |= {f"s{number}": np.array(shape) for number, shape in enumerate(shapes)}
    graph = helper.make_graph(
        nodes, "of others", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, 3, 8, 12))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (batch, 4))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx")
    network = read_onnx(tmp_path / "a.onnx")
    assert network.notes == (f"its batch of {batch} is freed",)
    for size in (1, 5):
        assert torch.allclose(network(IMAGES[:size]), _attention_logits(IMAGES[:size]), atol=1e-4)


def test_a_batch_that_cannot_be_freed(tmp_path: Path) -> None:
    model = _model((1, 3, 8, 12), output=(1, 4))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "first"))
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(helper.make_node("Squeeze", ["z", "first"], ["alone"]))
    model.graph.node.append(helper.make_node("Unsqueeze", ["alone", "first"], ["y"]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: it takes batches of 1 only; export it with a dynamic batch"):
        read_onnx(tmp_path / "model.onnx")


def test_images_that_depend_on_their_batch(tmp_path: Path) -> None:
    """The file subtracts the mean of the batch."""
    model = _model((2, 3, 8, 12), output=(2, 4))
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["mean"], axes=[0], keepdims=1))
    model.graph.node.append(helper.make_node("Sub", ["y", "mean"], ["z"]))
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: in batches of 3 it does not give what it gives for single"):
        read_onnx(tmp_path / "model.onnx")
