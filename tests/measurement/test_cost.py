"""Parameters and multiply-accumulates against counts by hand."""

import pytest
import torch
from forked import run_apart
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.measurement.cost import TORCHINFO, Cost, layer_table, measure_cost
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.models.vision import torchvision

# MACs of one 8x8 image: 6x6 outputs of 4 channels from 3x3 pixels of 3 channels; 144 inputs and 10 outputs.
CONV, LINEAR = 6 * 6 * 4 * 3 * 3 * 3, 144 * 10
SMALLNET_LAYERS = tuple(f"network.{place}" for place in (0, 3, 7, 10, 14, 17, 22))


def _small_net(bias: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10, bias=bias)
    ).eval()


@pytest.fixture(scope="module")
def smallnet() -> Classifier:
    spec = ModelSpec("smallnet", tuple("abcdefghij"), squashed(32))
    return build_classifier(spec, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_macs_by_hand() -> None:
    cost = measure_cost(_small_net(), (3, 8, 8), [1], ["0", "3"])
    assert (CONV, LINEAR) == (3888, 1440)
    assert cost.macs == cost.conv_linear_macs == cost.int8_macs == {1: CONV + LINEAR}
    assert cost.parameters == 4 * 27 + 1440


def test_a_bias_is_a_parameter_and_no_product() -> None:
    cost = measure_cost(_small_net(bias=True), (3, 8, 8), [1], [])
    assert cost.macs == {1: CONV + LINEAR}
    assert cost.parameters == 4 * 27 + 4 + 1440 + 10


def test_stride_and_groups_by_hand() -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False)).eval()
    assert measure_cost(depthwise, (3, 9, 9), [1], []).macs == {1: 4 * 4 * 6 * 3 * 3}


class _OnTokens(nn.Module):
    """Pixels of an image as tokens [N, pixels, 3], which `mix` takes and gives."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(images.flatten(2).transpose(1, 2))


def test_a_linear_layer_is_counted_for_each_token() -> None:
    cost = measure_cost(_OnTokens(nn.Linear(3, 8)), (3, 14, 14), [1, 2], ["mix"])
    assert cost.macs == cost.int8_macs == {1: 196 * 3 * 8, 2: 2 * 196 * 3 * 8}


class _ItsAttention(nn.Module):
    """Width 6, two heads; with `fused`, without nn.MultiheadAttention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.widen, self.fused = nn.Linear(3, 6), fused
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(tokens)
        if not self.fused:
            return self.attention(x, x, x, need_weights=False)[0]
        parts = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).unflatten(-1, (3, 2, 3))
        query, key, value = parts.transpose(-2, -4).unbind(-3)
        return self.attention.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("layers", [("widen",), ("attention.out_proj",), ("widen", "attention.in_proj")])
def test_attention_by_hand(fused: bool, layers: tuple[str, ...]) -> None:
    """Its projections belong to layers; its two products, of 16 tokens with each other, to none."""
    by_layer = {"widen": 16 * 3 * 6, "attention.in_proj": 16 * 6 * 18, "attention.out_proj": 16 * 6 * 6}
    products = 2 * 16 * 16 * 6
    cost = measure_cost(_OnTokens(_ItsAttention(fused)), (3, 4, 4), [1], [f"mix.{name}" for name in layers])
    total = sum(by_layer.values()) + products
    assert cost.macs == {1: total} and cost.conv_linear_macs == {1: total - products}
    assert cost.int8_macs == {1: sum(by_layer[name] for name in layers)}
    assert cost.int8_percent == pytest.approx(100 * cost.int8_macs[1] / total)
    assert cost.no_layer_percent == pytest.approx(100 * products / total)
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


class _Odd(nn.Module):
    """A layer that is called twice, one whose weights alone are used, one whose weights are computed, and products
    with weights of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused = nn.Linear(3, 3), nn.Linear(3, 5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))
        self.bare, self.vector = nn.Parameter(torch.rand(7, 2)), nn.Parameter(torch.rand(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.linear(self.twice(self.twice(tokens)), self.unused.weight)
        return torch.einsum("ntc,cd->ntd", self.normed(x), self.bare) @ self.vector


def test_products_belong_to_whose_weights_they_use() -> None:
    by_layer = {"twice": 2 * 16 * 9, "unused": 16 * 15, "normed": 16 * 35}
    for name, expected in by_layer.items():
        cost = measure_cost(_OnTokens(_Odd()), (3, 4, 4), [1], [f"mix.{name}"])
        assert cost.int8_macs == {1: expected}
    assert cost.conv_linear_macs == {1: sum(by_layer.values())}
    assert cost.macs == {1: sum(by_layer.values()) + 16 * 14 + 16 * 2}


def test_transposed_convolution_by_hand() -> None:
    upscaled = nn.Sequential(nn.ConvTranspose2d(3, 5, 3, stride=2))  # each of the 8x8 inputs goes into 3x3 outputs
    assert measure_cost(upscaled, (3, 8, 8), [1], []).macs == {1: 8 * 8 * 3 * 5 * 9}


@pytest.mark.parametrize(
    ("name", "size", "options", "thousands"),
    [("swin_t", 64, {}, 771_645), ("convnext_tiny", 64, {}, 364_422)],
)
def test_known_networks(name: str, size: int, options: dict[str, int], thousands: int) -> None:
    check_network(name, size, options, thousands)


@pytest.mark.slow
def test_vgg16() -> None:
    """Apart: its weights are half a gigabyte."""
    run_apart(check_network, "vgg16", 32, {"num_classes": 10, "init_weights": False}, 432_775)


def check_network(name: str, size: int, options: dict[str, int], thousands: int) -> None:
    model = getattr(torchvision.models, name)(weights=None, **options)
    assert measure_cost(model, (3, size, size), [1], []).macs[1] // 1000 == thousands
    assert model.training


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "vit_b_32"])
def test_what_torchvision_publishes(name: str) -> None:
    """Its weights name the multiply-accumulates of one image, in billions."""
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]
    model = getattr(torchvision.models, name)(weights=None).eval()
    assert measure_cost(model, (3, 224, 224), [1], []).macs[1] / 1e9 == pytest.approx(published, abs=6e-4)


def test_the_layers_of_a_transformer_are_all_but_its_attention() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=10).eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    layers += [f"{name}.in_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    cost = measure_cost(model, (3, 32, 32), [1], layers)
    products = 2 * 2 * 17 * 17 * 24  # 2 blocks, 16 patches and the class token
    assert cost.int8_macs == cost.conv_linear_macs == {1: cost.macs[1] - products}
    assert cost.int8_percent == pytest.approx(100 * (1 - products / cost.macs[1]))


def test_a_cost_of_an_earlier_version_keeps_its_meaning() -> None:
    old = Cost(10, macs={1: 1010}, conv_linear_macs={1: 1000}, int8_macs={1: 1000})
    assert old.counted_by == TORCHINFO and old.int8_percent == 100 and old.no_layer_percent == 0


def test_table_of_layers(smallnet: Classifier) -> None:
    text = layer_table(smallnet, (3, 32, 32))
    assert "Conv2d (0)" in text and "[1, 32, 32, 32]" in text and "427,178" in text
    assert "mult-adds" not in text


def test_macs_are_proportional_to_the_batch(smallnet: Classifier) -> None:
    cost = measure_cost(smallnet, (3, 32, 32), [1, 2, 7], SMALLNET_LAYERS)
    for counts in (cost.macs, cost.conv_linear_macs, cost.int8_macs):
        assert list(counts) == [1, 2, 7]
        assert counts[2] == 2 * counts[1] and counts[7] == 7 * counts[1]


def test_smallnet_by_hand(smallnet: Classifier) -> None:
    """Weights of each 3x3 convolution times the positions that it is applied to."""
    cost = measure_cost(smallnet, (3, 32, 32), [1], SMALLNET_LAYERS)
    convolutions = [(3, 32, 32), (32, 64, 32), (64, 64, 16), (64, 128, 16), (128, 128, 8), (128, 128, 8)]
    by_hand = sum(9 * before * after * size**2 for before, after, size in convolutions) + 128 * 10
    assert cost.macs == cost.conv_linear_macs == cost.int8_macs == {1: by_hand}
    assert cost.parameters == 427_178


def test_all_layers_in_int8_make_100_percent(smallnet: Classifier) -> None:
    assert measure_cost(smallnet, (3, 32, 32), [1, 4], SMALLNET_LAYERS).int8_percent == 100


@pytest.mark.parametrize(("layers", "share"), [(["0"], CONV), (["3"], LINEAR), ([], 0)])
def test_a_layer_that_is_left_out_lowers_the_share(layers: list[str], share: int) -> None:
    cost = measure_cost(_small_net(), (3, 8, 8), [1, 2], layers)
    assert cost.int8_percent == pytest.approx(100 * share / (CONV + LINEAR))
    assert cost.int8_macs == {1: share, 2: 2 * share}
    assert cost.macs == {1: CONV + LINEAR, 2: 2 * (CONV + LINEAR)}


def test_layers_of_equal_shape_are_told_apart() -> None:
    twins = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)).eval()
    assert measure_cost(twins, (3, 8, 8), [1], ["1"]).int8_percent == 50


def test_a_model_without_such_layers_has_no_share() -> None:
    assert measure_cost(nn.Sequential(nn.ReLU()), (3, 8, 8), [1], []).int8_percent == 0


def test_counting_leaves_the_model_as_it_was(smallnet: Classifier) -> None:
    weights = {name: tensor.clone() for name, tensor in smallnet.state_dict().items()}
    measure_cost(smallnet, (3, 32, 32), [2], SMALLNET_LAYERS)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in smallnet.state_dict().items())
