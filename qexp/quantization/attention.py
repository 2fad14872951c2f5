"""Attention rewritten with linear layers as projections, which every engine quantizes; an exact part of cleanup.py."""

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

IN_PROJECTION = "in_proj"  # name of the layer that the clean-up makes of the first projection
PLAIN_OPTIONS = ("need_weights", "average_attn_weights")  # they change nothing but the weights, which nobody reads


class SelfAttention(nn.Module):
    """An `nn.MultiheadAttention` of tokens [N, tokens, width] with themselves.

    `nn.MultiheadAttention` holds its first projection as a bare parameter and calls a function for all of its work,
    so that engines which replace or annotate layers leave both projections in fp32.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weight, bias, last = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
        self.in_proj = _linear(weight, bias)
        self.out_proj = _linear(last.weight, last.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.in_proj(tokens).unflatten(-1, (3, self.heads, -1))  # [N, tokens, 3, heads, width / heads]
        query, key, value = parts.transpose(-2, -4).unbind(-3)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2))


def normalizes_tokens(model: nn.Module) -> bool:
    """Whether it has layer norm, as transformers and the convolutional networks like them do."""
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())


def replace_attention(model: fx.GraphModule) -> None:
    """Put `SelfAttention` in the place of every `nn.MultiheadAttention` that it can stand for."""
    calls: dict[str, list[fx.Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.MultiheadAttention:
            calls.setdefault(node.target, []).append(node)
    for name, nodes in calls.items():
        attention: Any = model.get_submodule(name)
        if not (_is_plain(attention) and all(_is_of_itself(model, node) for node in nodes)):
            continue
        model.set_submodule(name, SelfAttention(attention))
        for node in nodes:
            given = _arguments(node)
            node.args, node.kwargs = (given["query"],), {}
            for same in {given["key"], given["value"]} - {given["query"]}:
                if not same.users:  # nothing else reads it
                    model.graph.erase_node(same)
            for user in list(node.users):
                user.replace_all_uses_with(node)
                model.graph.erase_node(user)
    model.recompile()


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = weight
    layer.bias = bias
    return layer


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    same_width, extra = attention._qkv_same_embed_dim, attention.bias_k is not None or attention.add_zero_attn
    return attention.batch_first and same_width and not extra


def _is_of_itself(model: fx.GraphModule, node: fx.Node) -> bool:
    """Without masks, and nobody reads the attention weights, the second of its results."""
    given = _arguments(node)
    masks = [value for name, value in given.items() if name not in ("query", "key", "value", *PLAIN_OPTIONS) and value]
    firsts = [user.target is operator.getitem and user.args[1] == 0 for user in node.users if user.users]
    query, key, value = (given.get(name) for name in ("query", "key", "value"))
    return _are_equal(model, query, key) and _are_equal(model, query, value) and not masks and all(firsts)


def _are_equal(model: fx.GraphModule, one: Any, other: Any) -> bool:
    """Whether they are the same tokens: one value, or the layer norm of one that is computed anew for each use."""
    if one is other:
        return True
    if not all(isinstance(node, fx.Node) and node.op == "call_module" for node in (one, other)):
        return False
    same = (one.target, one.args, one.kwargs) == (other.target, other.args, other.kwargs)
    return same and type(model.get_submodule(one.target)) is nn.LayerNorm


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", *PLAIN_OPTIONS[1:], "is_causal")
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
