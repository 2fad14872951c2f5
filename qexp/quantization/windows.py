"""Attention in windows, of torchvision's Swin transformers, rewritten with linear layers and constants of one image
size; an exact part of cleanup.py.

torchvision's own computes windows, shift and mask from the size of the map at each call, which no tracer follows, and
gives the weights of its layers to a function, where no engine finds them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODULE, NAMES = "torchvision.models.swin_transformer", ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
LARGEST_FACTOR = 100.0  # of the products in the second version, as torchvision has it
OTHER_PART = -100.0  # added to the products of tokens that only the shift has brought into one window


class WindowAttention(nn.Module):
    """What a `ShiftedWindowAttention` of torchvision computes of maps [N, height, width, channels] of one size.

    Its layers `qkv` and `proj` keep their names. What a token's place adds to the products is constant; the second
    version's layers `cpb_mlp`, which compute it, are gone.
    """

    bias: Tensor
    factor: Tensor | None

    def __init__(self, attention: Any, height: int, width: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        self.size, self.window = (height, width), tuple(attention.window_size)
        self.counts = tuple(math.ceil(size / window) for size, window in zip(self.size, self.window, strict=True))
        self.padded = tuple(count * window for count, window in zip(self.counts, self.window, strict=True))
        shifts = zip(attention.shift_size, self.counts, strict=True)
        self.shift = tuple(shift if count > 1 else 0 for shift, count in shifts)
        bias, factor = attention.get_relative_position_bias(), None
        if any(self.shift):
            bias = (bias + self._parted()).flatten(0, 1)[None]  # of each head in each window
        if (scale := getattr(attention, "logit_scale", None)) is not None:
            factor = scale.clamp(max=math.log(LARGEST_FACTOR)).exp().detach()
            _clear_bias_of_keys(self.qkv)
        self.register_buffer("bias", bias.detach())
        self.register_buffer("factor", factor)

    def _parted(self) -> Tensor:
        """[windows, 1, tokens, tokens]: what keeps tokens of different parts of the map apart."""
        part = torch.zeros(1, *self.padded, 1)
        rows, columns = (
            [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
            for window, shift in zip(self.window, self.shift, strict=True)
        )
        for number, (row, column) in enumerate((row, column) for row in rows for column in columns):
            part[:, row, column] = number
        of_token = self._windows(part, 1).squeeze(-1)
        return (OTHER_PART * (of_token[:, None] != of_token[:, :, None]))[:, None]

    def _windows(self, x: Tensor, channels: int) -> Tensor:
        """Maps [N, height, width, channels] as [N * windows, tokens, channels]."""
        # Not by `reshape`: torch.ao would quantize, with its result, whatever else takes the map.
        x = x.unflatten(2, (self.counts[1], self.window[1])).unflatten(1, (self.counts[0], self.window[0]))
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, math.prod(self.window), channels)

    def forward(self, x: Tensor) -> Tensor:
        channels, tokens = self.qkv.in_features, math.prod(self.window)
        down, right = (padded - size for padded, size in zip(self.padded, self.size, strict=True))
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = self._windows(x, channels)
        # Heads of all windows of an image side by side, as the constants are where a shift tells windows apart.
        apart, width = math.prod(self.counts) if any(self.shift) else 1, channels // self.heads
        x = self.qkv(x).reshape(-1, apart, tokens, 3, self.heads, width).permute(3, 0, 1, 4, 2, 5)
        query, key, value = x.unbind(0)
        if self.factor is not None:
            query, key = F.normalize(query, dim=-1) * self.factor, F.normalize(key, dim=-1)
        query, key, value = (x.reshape(-1, apart * self.heads, tokens, width) for x in (query, key, value))
        x = F.scaled_dot_product_attention(query, key, value, self.bias, scale=None if self.factor is None else 1.0)
        x = x.reshape(-1, self.heads, tokens, width).transpose(1, 2).reshape(-1, tokens, channels)
        x = self.proj(x)
        x = x.reshape(-1, *self.counts, *self.window, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, *self.padded, channels)
        if any(self.shift):
            x = torch.roll(x, self.shift, (1, 2))
        return x[:, : self.size[0], : self.size[1]]


def _clear_bias_of_keys(layer: Any) -> None:
    """The second version has none, whatever the parameter holds."""
    if layer.bias is not None:
        length = layer.bias.numel() // 3
        layer.bias.data[length : 2 * length] = 0


def replace_windows(model: nn.Module, example: Tensor) -> None:
    """Put `WindowAttention` in the place of every `ShiftedWindowAttention` of torchvision that sees maps of one size.

    Args:
        model: in evaluation mode.
        example: float images [N, 3, H, W].
    """
    found = {name: module for name, module in model.named_modules() if _is_windowed(module)}
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in found}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen[name].add(tuple(given[0].shape[1:3])))
        for name, module in found.items()
    ]
    try:
        if found:
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, sizes in seen.items():
        if len(sizes) == 1:
            model.set_submodule(name, WindowAttention(found[name], *sizes.pop()))


def _is_windowed(module: nn.Module) -> bool:
    return type(module).__module__ == MODULE and type(module).__name__ in NAMES


def computed_before(model: nn.Module, cleaned: nn.Module) -> set[str]:
    """Layers of `model` whose results are constants of `cleaned`, its clean-up."""
    left = {name for name, _ in cleaned.named_modules()}
    return {
        f"{name}.{layer}"
        for name, module in model.named_modules() if _is_windowed(module)
        for layer, _ in module.named_modules() if layer.startswith("cpb_mlp.") and f"{name}.{layer}" not in left
    }  # fmt: skip
