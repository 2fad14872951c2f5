"""Parameters and multiply-accumulates against counts by hand."""

import pytest
import torch
from torch import nn

from qexp.cost import measure_cost
from qexp.models import Classifier, ModelSpec, build_classifier

# MACs of one 8x8 image: 6x6 outputs of 4 channels from 3x3 pixels of 3 channels; 144 inputs and 10 outputs.
CONV, LINEAR = 6 * 6 * 4 * 3 * 3 * 3, 144 * 10
SMALLNET_LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))


def _small_net(bias: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10, bias=bias)
    ).eval()


@pytest.fixture(scope="module")
def smallnet() -> Classifier:
    spec = ModelSpec("smallnet", tuple("abcdefghij"), 32)
    return build_classifier(spec, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_macs_by_hand() -> None:
    cost = measure_cost(_small_net(), 8, [1], ["0", "3"])
    assert (CONV, LINEAR) == (3888, 1440)
    assert cost.macs == cost.conv_linear_macs == cost.int8_macs == {1: CONV + LINEAR}
    assert cost.parameters == 4 * 27 + 1440


def test_a_bias_counts_as_one_for_each_output() -> None:
    """So torchinfo counts, whose total is reported."""
    cost = measure_cost(_small_net(bias=True), 8, [1], [])
    assert cost.macs == {1: CONV + 6 * 6 * 4 + LINEAR + 10}
    assert cost.parameters == 4 * 27 + 4 + 1440 + 10


def test_stride_and_groups_by_hand() -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False)).eval()
    assert measure_cost(depthwise, 9, [1], []).macs == {1: 4 * 4 * 6 * 3 * 3}


def test_macs_are_proportional_to_the_batch(smallnet: Classifier) -> None:
    cost = measure_cost(smallnet, 32, [1, 2, 7], SMALLNET_LAYERS)
    for counts in (cost.macs, cost.conv_linear_macs, cost.int8_macs):
        assert list(counts) == [1, 2, 7]
        assert counts[2] == 2 * counts[1] and counts[7] == 7 * counts[1]


def test_smallnet_by_hand(smallnet: Classifier) -> None:
    """Weights of each 3x3 convolution times the positions that it is applied to."""
    cost = measure_cost(smallnet, 32, [1], SMALLNET_LAYERS)
    convolutions = [(3, 32, 32), (32, 64, 32), (64, 64, 16), (64, 128, 16), (128, 128, 8), (128, 128, 8)]
    by_hand = sum(9 * before * after * size**2 for before, after, size in convolutions) + 128 * 10 + 10
    assert cost.conv_linear_macs == cost.int8_macs == {1: by_hand}
    assert 0 < cost.macs[1] - by_hand < 0.001 * by_hand  # batch norm
    assert cost.parameters == 427_178


def test_all_layers_in_int8_make_100_percent(smallnet: Classifier) -> None:
    assert measure_cost(smallnet, 32, [1, 4], SMALLNET_LAYERS).int8_percent == 100


@pytest.mark.parametrize(("layers", "share"), [(["0"], CONV), (["3"], LINEAR), ([], 0)])
def test_a_layer_that_is_left_out_lowers_the_share(layers: list[str], share: int) -> None:
    cost = measure_cost(_small_net(), 8, [1, 2], layers)
    assert cost.int8_percent == pytest.approx(100 * share / (CONV + LINEAR))
    assert cost.int8_macs == {1: share, 2: 2 * share}
    assert cost.macs == {1: CONV + LINEAR, 2: 2 * (CONV + LINEAR)}


def test_layers_of_equal_shape_are_told_apart() -> None:
    twins = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)).eval()
    assert measure_cost(twins, 8, [1], ["1"]).int8_percent == 50


def test_a_model_without_such_layers_has_no_share() -> None:
    assert measure_cost(nn.Sequential(nn.ReLU()), 8, [1], []).int8_percent == 0


def test_counting_leaves_the_model_as_it_was(smallnet: Classifier) -> None:
    weights = {name: tensor.clone() for name, tensor in smallnet.state_dict().items()}
    measure_cost(smallnet, 32, [2], SMALLNET_LAYERS)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in smallnet.state_dict().items())
