"""A classifier that ONNX Runtime runs is a module like any other, as far as it can be one."""

import copy

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from qexp.models.onnx_file import INPUT, OUTPUT, OnnxClassifier


def _mean_of_channels() -> onnx.ModelProto:
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, 4, 4])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", 3, 1, 1])
    graph = helper.make_graph([helper.make_node("GlobalAveragePool", [INPUT], [OUTPUT])], "mean", [images], [logits])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_users_do_with_modules_works() -> None:
    model, images = OnnxClassifier(_mean_of_channels()), torch.rand(2, 3, 4, 4)
    expected = images.mean((2, 3), keepdim=True)
    assert not model.training
    for same in (model.eval(), model.train(), model.to("cpu"), model.float(), copy.deepcopy(model)):
        assert torch.allclose(same(images), expected)
    assert torch.allclose(model(images.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.allclose(model(images), expected)
    assert not model.state_dict() and not list(model.parameters())
    assert torch.allclose(nn.Sequential(model, nn.Flatten()).eval()(images), expected.flatten(1))
