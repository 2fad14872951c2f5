"""Exact clean-up: a layer that is called twice keeps its batch norms apart, attention becomes linear layers, that in
windows with constants in place of what follows from the size of the maps."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError, StageError
from qexp.models.vision import torchvision
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import clean

ENGINES = ("fx", "pt2e", "onnx")


class _Twice(nn.Module):
    """One convolution and one linear layer, each called twice, with batch norm after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm1d(8)])
        self.linear, self.last = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for norm in self.norms[:2]:
            x = torch.relu(norm(self.conv(x)))
        x = x.mean((2, 3))
        for _ in range(2):
            x = self.norms[2](self.linear(x))
        return self.last(x)


class _Attention(nn.Module):
    """Attention of tokens with themselves; `options` go into the call."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 10)
        self.options = options

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        mixed, weights = self.attention(tokens, tokens, tokens, **self.options)
        return self.last(mixed.mean(1)) + (weights.mean() if self.options.get("need_weights") else 0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def twice(images: Tensor) -> _Twice:
    torch.manual_seed(0)
    model = _Twice()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.uniform_(0.5, 3)
            norm.bias.uniform_(-1, 1)
        for _ in range(50):
            model(images.float() / 255 * torch.rand(()))
    return model.eval()


def _sqnr_db(expected: Tensor, found: Tensor) -> float:
    return float(10 * (expected.var() / (expected - found).square().mean()).log10())


def test_layer_that_is_called_twice_is_not_folded_twice(twice: _Twice, images: Tensor) -> None:
    inputs = images.float() / 255
    with torch.no_grad():
        assert torch.allclose(clean(twice, inputs[:2], True)(inputs), twice(inputs), atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_layer_that_is_called_twice_is_int8(twice: _Twice, images: Tensor, engine: str) -> None:
    made = quantize_model(twice, images, QuantizeConfig(engine=engine, observer="minmax"), False)
    assert made.result.int8_layers == ("first", "conv", "linear", "last")
    with torch.no_grad():
        assert _sqnr_db(twice(images.float() / 255), made.module(images.float() / 255)) > 12


@pytest.mark.parametrize("options", [{}, {"need_weights": False}])
def test_attention_is_made_of_linear_layers(images: Tensor, options: dict[str, object]) -> None:
    model, inputs = _Attention(**options).eval(), images.float() / 255
    cleaned = clean(model, inputs[:2], False)
    assert type(cleaned.get_submodule("attention.in_proj")) is nn.Linear
    with torch.no_grad():
        assert torch.allclose(cleaned(inputs), model(inputs), atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_in_int8(images: Tensor, engine: str) -> None:
    model = _Attention().eval()
    made = quantize_model(model, images, QuantizeConfig(engine=engine, observer="minmax"), False)
    assert made.result.int8_layers == ("conv", "attention.out_proj", "last", "attention.in_proj")
    assert made.result.float_layers == ()
    with torch.no_grad():
        assert _sqnr_db(model(images.float() / 255), made.module(images.float() / 255)) > 20


def test_attention_whose_weights_are_read_is_rebuilt_by_fx(images: Tensor) -> None:
    """With pt2e it stays fp32, as that of another shape does: test_quantization.py."""
    options = QuantizeConfig(engine="fx", observer="minmax")
    result = quantize_model(_Attention(need_weights=True).eval(), images, options, False).result
    assert result.float_layers == ()


@pytest.mark.parametrize("engine", ENGINES)
def test_first_projection_of_attention_can_stay_fp32(images: Tensor, engine: str) -> None:
    """As the accuracy budget asks: it ranks the layers of the cleaned model."""
    options = QuantizeConfig(engine=engine, observer="minmax", keep_fp32=["attention.in_proj"])
    result = quantize_model(_Attention().eval(), images, options, False).result
    assert result.float_layers == ("attention.in_proj",) == result.kept_layers
    wrong = QuantizeConfig(engine=engine, keep_fp32=["last.in_proj"])
    with pytest.raises(InputError, match=r"--keep-fp32 last.in_proj: not among the layers conv, .*attention.in_proj$"):
        quantize_model(_Attention().eval(), images, wrong, False)


class _NormedEach(nn.Module):
    """Attention whose query, key and value are normalised anew, by one layer norm or, if `apart`, by three."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(8)] * 3 if not apart else [nn.LayerNorm(8) for _ in range(3)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 10)
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.uniform_(0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return self.last((tokens + self.attention(*(norm(tokens) for norm in self.norms))[0]).mean(1))


def test_attention_of_one_layer_norm_called_thrice_is_of_itself(images: Tensor) -> None:
    model, inputs = _NormedEach(apart=False).eval(), images.float() / 255
    cleaned = clean(model, inputs[:2], False)
    assert type(cleaned.get_submodule("attention.in_proj")) is nn.Linear
    assert sum("norms" in str(node.target) for node in cleaned.graph.nodes) == 1
    with torch.no_grad():
        assert torch.allclose(cleaned(inputs), model(inputs), atol=1e-6)


class _KeysReadAgain(_NormedEach):
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        keys = self.norms[0](tokens)
        return self.last((keys + self.attention(self.norms[0](tokens), keys, keys)[0]).mean(1))


def test_keys_that_are_read_again_stay(images: Tensor) -> None:
    model, inputs = _KeysReadAgain(apart=False).eval(), images.float() / 255
    cleaned = clean(model, inputs[:2], False)
    assert type(cleaned.get_submodule("attention.in_proj")) is nn.Linear
    with torch.no_grad():
        assert torch.allclose(cleaned(inputs), model(inputs), atol=1e-6)


def test_first_projection_of_different_tokens_stays_fp32_or_is_refused(images: Tensor) -> None:
    model, kept = _NormedEach(apart=True).eval(), ["attention.in_proj"]
    options = QuantizeConfig(engine="onnx", observer="minmax", keep_fp32=kept)
    result = quantize_model(model, images, options, False).result
    assert result.float_layers == ("attention.in_proj",) and "attention" not in result.int8_layers
    assert not logging.getLogger("onnxscript.optimizer").isEnabledFor(logging.WARNING)  # it warns of each split
    with pytest.raises(StageError, match=r"engine fx: cannot keep attention.in_proj in fp32: .* use --engine onnx$"):
        quantize_model(model, images, QuantizeConfig(engine="fx", observer="minmax", keep_fp32=kept), False)


class _Encoder(nn.Module):
    """PyTorch's own encoder, which torch.fx does not look into; its two layers begin with equal weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.conv, self.encoder = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.encoder(self.conv(images).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("trained", [True, False])
def test_layers_inside_an_encoder_have_their_names_in_engine_onnx(images: Tensor, trained: bool) -> None:
    model, layer = _Encoder().eval(), "encoder.layers.1"
    if trained:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.rand_like(weight))
    kept = [f"{layer}.linear1", f"{layer}.self_attn.in_proj"] if trained else None
    options = QuantizeConfig(engine="onnx", observer="minmax", keep_fp32=kept)
    result = quantize_model(model, images, options, False).result
    assert set(result.float_layers) == set(kept or ()) and len(result.int8_layers) + len(result.float_layers) == 10


def _swin(version: int) -> nn.Module:
    """Two blocks of windows of 4x4 tokens, the second of them shifted, and one on a map of a quarter of the size, with
    weights that no initialisation gives."""
    swin = torchvision.models.swin_transformer
    options: dict[str, Any] = {"patch_size": [2, 2], "depths": [2, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    if version == 2:
        options |= {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    model = swin.SwinTransformer(embed_dim=8, num_classes=10, **options).eval()
    for parameter in model.parameters():  # the bias of the keys too, which the second version ignores
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (8, 8), (6, 10)])  # tokens: 8x8, 6x10, one window, not even that
def test_windows_are_constants(version: int, size: tuple[int, int]) -> None:
    model, images = _swin(version), torch.rand(3, 3, *size)
    cleaned = clean(model, images[:2], False)
    layers = [name for name, module in cleaned.named_modules() if isinstance(module, nn.Linear) and "attn" in name]
    assert layers == [f"features.{block}.attn.{layer}" for block in ("1.0", "1.1", "3.0") for layer in ("qkv", "proj")]
    with torch.no_grad():
        assert torch.allclose(cleaned(images), model(images), atol=1e-5)


@pytest.mark.parametrize(("engine", "version"), [("fx", 2), ("onnx", 1)])
def test_attention_in_windows_is_int8(images: Tensor, engine: str, version: int) -> None:
    model = _swin(version)
    made = quantize_model(model, images, QuantizeConfig(engine=engine, observer="minmax"), False)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert made.result.int8_layers == tuple(name for name in layers if "cpb_mlp" not in name)  # which has no inputs
    assert made.result.float_layers == ()
    with torch.no_grad():
        assert _sqnr_db(model(images.float() / 255), made.module(images.float() / 255)) > 20
