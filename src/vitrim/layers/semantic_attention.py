"""Attention between windows of a map and rows of a memory, for semantic tokens.

Keys and values are projected once per row of a memory, then gathered for each window: windows
overlap, and a projection per window would repeat the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.costs.macs import linear_macs
from vitrim.layers.semantic_windows import Windows
from vitrim.tokens.attention import attend, scale_of
from vitrim.tokens.calls import called, in_features, is_hooked, linear_part


@dataclass(frozen=True, slots=True)
class Keys:
    """Which rows of a memory the queries of each window look at."""

    index_WK: Tensor | None
    """None: one window, which looks at all rows."""
    bias_WK: Tensor | None = None
    """Added to the attention logits: -inf hides a key; None hides none. (B, W, K) where images hide
    other keys."""


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """What went on in one layer of attention between windows."""

    q_BWHQD: Tensor
    k_BWHKD: Tensor
    mask: Tensor | None
    """Added to the logits."""
    keys: Keys
    scale: float

    def weights(self) -> Tensor:
        """(B, W, H, Q, K)"""
        logits = (self.q_BWHQD * self.scale) @ self.k_BWHKD.transpose(-2, -1)
        if self.mask is not None:
            logits = logits + self.mask
        weights: Tensor = logits.softmax(-1)
        return weights

    def looks(self, windows: Windows, first_row: int) -> Tensor:
        """(B, rows, columns, N): how much each semantic token, on their map, looks at each place,
        the mean over heads; the positions begin at ``first_row`` of the memory.
        """
        weights_BWQK = self.weights().float().mean(2)
        last_row = first_row + math.prod(windows.grid)
        looks = weights_BWQK
        if self.keys.index_WK is not None:
            index = self.keys.index_WK[None, :, None, :].expand_as(weights_BWQK)
            num_rows = max(last_row, int(self.keys.index_WK.max()) + 1)
            looks = weights_BWQK.new_zeros(*index.shape[:3], num_rows)
            looks = looks.scatter_add(3, index, weights_BWQK)
        looks_BWSN = looks[..., first_row:last_row]
        looks_BWSN = looks_BWSN.reshape(len(looks), windows.count, -1, last_row - first_row)
        return windows.join_tokens(looks_BWSN)


def window_cross_attention(
    attention: Any,
    query_BWQC: Tensor,
    memory_BMC: Tensor,
    keys: Keys,
    bias_HQK: Tensor | None = None,
    project_once: bool = True,
    inside: Any = None,
) -> tuple[Tensor, WindowRecord]:
    """A Swin attention layer used between windows: its projections, split by rows, and no shift.

    Args:
        attention: its position biases are not used.
        query_BWQC: what asks, window by window, normalised for attention.
        memory_BMC: what is looked at, likewise; it gives keys and values.
        keys: which rows of the memory each window looks at.
        bias_HQK: added to the logits of every window.
        project_once: project each row of the memory once; else again for each window that looks at
            it, which gives the same numbers.
        inside: ``fused_attn``, ``scale``, ``attn_drop``, ``proj_drop`` and ``training`` of a layer
            that is not timm's; None reads them off ``attention``.

    Returns:
        the layer's output (B, W, Q, C), and its inner values.
    """
    records: list[WindowRecord] = []
    inner = attention if inside is None else inside

    def run(query_BWQC: Tensor) -> Tensor:
        context, record = _contexts(
            attention, query_BWQC, memory_BMC, keys, bias_HQK, project_once, inner
        )
        records.append(record)
        projected: Tensor = inner.proj_drop(attention.proj(context))
        return projected

    return called(attention, run, query_BWQC), records[0]


def _contexts(
    attention: Any,
    query_BWQC: Tensor,
    memory_BMC: Tensor,
    keys: Keys,
    bias_HQK: Tensor | None,
    project_once: bool,
    inner: Any,
) -> tuple[Tensor, WindowRecord]:
    """(B, W, Q, C): what the heads find, one behind the other."""
    batch, windows, queries, _ = query_BWQC.shape
    width, heads = in_features(attention.proj), attention.num_heads

    def keys_and_values(memory: Tensor) -> Tensor:
        return linear_part(attention.qkv, memory, width, 3 * width)

    q = linear_part(attention.qkv, query_BWQC, 0, width)
    q = q.view(batch, windows, queries, heads, -1).permute(0, 3, 1, 2, 4)
    if project_once:
        kv = keys_and_values(memory_BMC).view(*memory_BMC.shape[:2], 2, heads, -1)
        kv = _rows_for_windows(kv.permute(2, 0, 3, 1, 4), keys.index_WK, 3)
    else:
        kv = keys_and_values(_rows_for_windows(memory_BMC, keys.index_WK, 1))
        kv = kv.view(*kv.shape[:3], 2, heads, -1).permute(3, 0, 4, 1, 2, 5)
    k, v = kv.unbind(0)
    mask, scale = _mask(keys, bias_HQK, q.dtype), scale_of(inner, q)
    spread = None if mask is None else _for_heads(mask, batch, heads, queries)
    parts = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if is_hooked(inner.attn_drop):  # somebody reads the attention maps
        context = attend(inner, *parts, spread)
    else:  # whatever timm says of its own windows: plain products of wide ones fill the memory
        dropout = inner.attn_drop.p if inner.training else 0.0
        context = F.scaled_dot_product_attention(*parts, spread, dropout, scale=scale)
    context = context.view(batch, heads, windows, queries, -1).permute(0, 2, 3, 1, 4)
    record = WindowRecord(q.transpose(1, 2), k.transpose(1, 2), mask, keys, scale)
    return context.reshape(batch, windows, queries, width), record


def _rows_for_windows(memory: Tensor, index_WK: Tensor | None, dim: int) -> Tensor:
    """``memory`` (..., M, ...) with each window's rows (..., W, K, ...) in place of ``dim``."""
    if index_WK is None:
        return memory.unsqueeze(dim)
    gathered = memory.contiguous().index_select(dim, index_WK.flatten())
    return gathered.view(*memory.shape[:dim], *index_WK.shape, *memory.shape[dim + 1 :])


def _for_heads(mask: Tensor, batch: int, heads: int, queries: int) -> Tensor:
    """(B * H or 1, W, Q, K): a mask ([B,] W, H, Q, K) for heads that come before windows."""
    mask = mask.transpose(-4, -3).expand(*[-1] * (mask.ndim - 2), queries, -1)
    if mask.ndim == 4 and len(mask) == 1:
        return mask
    return mask.expand(batch, heads, *mask.shape[-3:]).flatten(0, 1)


def _mask(keys: Keys, bias_HQK: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the logits ([B,] W, H, Q, K), some of these 1; None: nothing."""
    mask = None if keys.bias_WK is None else keys.bias_WK[..., None, None, :]
    if bias_HQK is not None:
        mask = bias_HQK[None] if mask is None else mask + bias_HQK
    return None if mask is None else mask.to(dtype)


def window_cross_attention_macs(
    attention: Any, num_queries: Any, num_rows: Any, num_keys: Any
) -> Any:
    """MACs of :func:`window_cross_attention`.

    Args:
        attention: the layer.
        num_queries: of all windows together.
        num_rows: rows that are projected to keys and values: those of the memory, or those of all
            windows if each projects its own.
        num_keys: that each query looks at.
    """
    per_row = 2 * linear_macs(attention.qkv) // 3
    per_query = linear_macs(attention) - per_row
    attending = 2 * in_features(attention.proj) * num_queries * num_keys
    return per_query * num_queries + per_row * num_rows + attending
