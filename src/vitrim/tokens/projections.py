"""Queries, keys and values of timm's attention layers, whichever of them projects them.

``Attention`` has one linear layer for all three; ``EvaAttention`` and ``AttentionRope`` have one or
three. ``EvaAttention`` keeps the biases beside the one; heads of ``AttentionRope`` may share keys
and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vitrim.tokens.calls import linear_part


def width_of(attention: Any) -> int:
    """Channels of all heads together."""
    return int(attention.num_heads * attention.head_dim)


def linears_of(attention: Any) -> list[nn.Module]:
    """The layer that projects, or the three."""
    if attention.qkv is not None:
        return [attention.qkv]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def project(attention: Any, x: Tensor, start: int = 0, stop: int = 3) -> tuple[Tensor, ...]:
    """Of queries (0), keys (1) and values (2) those from ``start`` to ``stop``, (..., H, D) each,
    before any norm.
    """
    heads, dim = attention.num_heads, attention.head_dim
    if attention.qkv is None:
        parts = [linear(x).unflatten(-1, (-1, dim)) for linear in linears_of(attention)[start:stop]]
        return tuple(_for_all_heads(part, heads, -2) for part in parts)
    return project_as_one(attention, x, start, stop).unbind(-3)


def _for_all_heads(part: Tensor, heads: int, at: int) -> Tensor:
    """What several heads share, once for each, at this dimension."""
    shared = part.shape[at]
    return part if shared == heads else part.repeat_interleave(heads // shared, at)


def project_as_one(attention: Any, x: Tensor, start: int = 0, stop: int = 3) -> Tensor:
    """(..., stop - start, H, D): the same in one, of a layer with one linear layer for all; biases
    that stand beside it are added as timm adds them.
    """
    width, bias = width_of(attention), None
    first, last = start * width, stop * width
    heads = (*x.shape[:-1], stop - start, attention.num_heads, attention.head_dim)
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)[start:stop])
        if not attention.qkv_bias_separate:
            whole = F.linear(x, attention.qkv.weight[first:last], bias)
            return whole.view(heads)
    is_whole = stop - start == 3
    out: Tensor = attention.qkv(x) if is_whole else linear_part(attention.qkv, x, first, last)
    return (out if bias is None else out + bias).view(heads)


def placed(attention: Any, norm: nn.Module, x: Tensor, v: Tensor, angles: Tensor | None) -> Tensor:
    """Queries or keys after their norm, turned by the angles of their tokens, as timm turns them.

    Args:
        attention: the layer.
        norm: its ``q_norm`` or ``k_norm``.
        x: (..., D)
        v: values, of the type that turned ones come out in.
        angles: (..., 2 D), see :class:`vitrim.tokens.rotary.Rotary`; None: nothing turns.
    """
    normed: Tensor = norm(x)
    if angles is None:
        return normed
    return apply_rot_embed_cat(normed, angles, half=attention.rotate_half).to(v)


def weights_of(attention: Any, part: int) -> tuple[Tensor, Tensor | None]:
    """(H, D, C) and, where there is one, the bias (H, D) that make queries (0), keys (1) or values
    (2): of plain linear layers.
    """
    heads, dim = attention.num_heads, attention.head_dim
    rows = slice(part * heads * dim, (part + 1) * heads * dim)
    if attention.qkv is None:
        linear: Any = linears_of(attention)[part]
        weight, bias = linear.weight, linear.bias
    else:
        weight, bias = attention.qkv.weight[rows], attention.qkv.bias
        bias = None if bias is None else bias[rows]
    if getattr(attention, "q_bias", None) is not None:
        bias = (attention.q_bias, attention.k_bias, attention.v_bias)[part]
    bias = None if bias is None else _for_all_heads(bias.view(-1, dim), heads, 0)
    return _for_all_heads(weight.unflatten(0, (-1, dim)), heads, 0), bias
