"""A classifier that ONNX Runtime or OpenVINO runs is a module like any other, as far as it can be one."""

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from qexp.models.onnx_file import INPUT, OUTPUT, OnnxClassifier
from qexp.models.openvino_file import MOST_COMPILED, OpenvinoClassifier

Make = Callable[[onnx.ModelProto], nn.Module]


def _mean_of_channels() -> onnx.ModelProto:
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, 4, 4])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", 3, 1, 1])
    graph = helper.make_graph([helper.make_node("GlobalAveragePool", [INPUT], [OUTPUT])], "mean", [images], [logits])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _in_openvino(model: onnx.ModelProto) -> OpenvinoClassifier:
    return OpenvinoClassifier(model.SerializeToString())


@pytest.mark.parametrize("make", [OnnxClassifier, _in_openvino])
def test_what_users_do_with_modules_works(make: Make) -> None:
    model, images = make(_mean_of_channels()), torch.rand(2, 3, 4, 4)
    expected = images.mean((2, 3), keepdim=True)
    assert not model.training
    for same in (model.eval(), model.train(), model.to("cpu"), model.float(), copy.deepcopy(model)):
        assert torch.allclose(same(images), expected)
    assert torch.allclose(model(images.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.allclose(model(images), expected)
    assert not model.state_dict() and not list(model.parameters())
    assert torch.allclose(nn.Sequential(model, nn.Flatten()).eval()(images), expected.flatten(1))


@pytest.mark.parametrize("make", [OnnxClassifier, _in_openvino])
def test_images_of_another_size_are_refused_and_none_give_no_logits(make: Make) -> None:
    model = make(_mean_of_channels())
    assert model(torch.rand(0, 3, 4, 4)).shape == (0, 3, 1, 1)
    for shape in ((2, 3, 5, 4), (3, 4, 4), (0, 3, 8, 8)):
        with pytest.raises(Exception, match=r"Got invalid dimensions|Invalid rank|the model takes \[\?,3,4,4\]"):
            model(torch.rand(shape))


def test_openvino_takes_what_onnx_runtime_takes_in_batches_of_any_size_from_any_thread() -> None:
    """uint8, numpy and any memory layout; logits that later batches leave as they are; few copies of the weights."""
    model, expected = _in_openvino(_mean_of_channels()), OnnxClassifier(_mean_of_channels())
    images = torch.randint(0, 256, (MOST_COMPILED + 2, 3, 4, 4), dtype=torch.uint8)
    batches = [images[: size + 1] for size in range(len(images))]
    batches += [images.float().div(255).permute(0, 1, 3, 2), images.numpy()]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model, batches))
    assert all(torch.allclose(logits, expected(batch)) for logits, batch in zip(found, batches, strict=True))
    assert len(model.compiled) == MOST_COMPILED
    assert "openvino_telemetry" not in sys.modules
