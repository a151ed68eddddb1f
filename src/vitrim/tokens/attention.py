"""Attention with its inner values at hand: for scores, for keep masks, between two sets of tokens.

A block that nobody asks anything of runs timm's own fused attention and never comes here. Where a
method scores tokens, the same projections and the same fused kernel run, and the few attention rows
that the score needs are computed beside it. A layer with ``fused_attn=False`` has the whole map
computed, and handed through ``attn_drop``, as in timm. Only training under a mask computes the
whole map: all tokens stay in memory, so that gradients reach the decisions, and a dropped token is
hidden as a key (DynamicViT, section 3.3, eqs 10 and 11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vitrim.tokens.calls import called
from vitrim.tokens.graphs import exporting
from vitrim.tokens.projections import placed, project, weights_of, width_of

EPS = 1e-6
_MAX_EXPONENT = -math.log(EPS)


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """What went on in one attention layer; for padded sequences and for masked ones too."""

    q_BHQD: Tensor
    """Queries, after their norm, not yet scaled."""
    k_BHND: Tensor
    v_BHND: Tensor
    context_BHQD: Tensor
    """The weighted values: each head's context, before the output projection."""
    scale: float
    num_prefix: int
    """Prefix tokens at the head of the sequence."""
    has_class: bool
    """Whether token 0 is a class token."""
    visible_BN: Tensor | None = None
    """True for a token that is there: neither padding nor dropped; None: all are."""
    weights_BHQN: Tensor | None = None
    """The whole attention map, where it was computed."""
    bias: Tensor | None = None
    """What was added to the logits (B, H, Q, N), some of these 1; None: nothing."""

    def weights(self, num_queries: int | None = None) -> Tensor:
        """(B, H, num_queries, N): attention of the first queries, or of all of them."""
        if self.weights_BHQN is not None:
            return self.weights_BHQN[:, :, :num_queries]
        logits = (self.q_BHQD[:, :, :num_queries] * self.scale) @ self.k_BHND.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        if self.visible_BN is not None:
            logits = logits.masked_fill(~self.visible_BN[:, None, None, :], -math.inf)
        return logits.softmax(-1)

    def class_attention(self) -> Tensor:
        """(B, H, N): what the class token pays to each patch token, per head."""
        return self.weights(1)[:, :, 0, self.num_prefix :]

    def received_attention(self) -> Tensor:
        """(B, H, N): what each patch token receives, per head, as the mean over all tokens."""
        weights = self.weights()[..., self.num_prefix :]
        if self.visible_BN is None:
            return weights.mean(-2)
        visible = self.visible_BN.to(weights.dtype)[:, None, :, None]
        return (weights * visible).sum(-2) / visible.sum(-2)

    def patch_attention(self) -> Tensor:
        """(B, H, N): class attention, or received attention where there is no class token."""
        return self.class_attention() if self.has_class else self.received_attention()


Score = Callable[[AttentionRecord], Tensor]
"""A score (B, N) of the patch tokens, from the attention among all tokens."""


def scale_of(attention: Any, q: Tensor) -> float:
    """What timm's attention layer multiplies its logits by: fused, it does not ask ``scale``."""
    scale: float = q.shape[-1] ** -0.5 if attention.fused_attn else attention.scale
    return scale


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The heads' contexts (B, H, Q, D), by fused attention or plain products, as the layer is set.

    Args:
        attention: a layer of timm's, with ``fused_attn``, ``scale`` and ``attn_drop``.
        q: (B, H, Q, D), not yet scaled.
        k: (B, H, N, D)
        v: (B, H, N, D)
        mask: added to the logits (B, H, Q, N), some of these 1; None: nothing.
    """
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    logits = (q * attention.scale) @ k.transpose(-2, -1)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    context: Tensor = attention.attn_drop(weights) @ v
    return context


def merge(attention: Attention, x_BNC: Tensor, context_BHND: Tensor) -> Tensor:
    """The layer's output (B, N, C) from the heads' contexts; ``x_BNC`` feeds the gate, if any."""
    num_images, _, num_tokens, _ = context_BHND.shape
    out = context_BHND.transpose(1, 2).reshape(num_images, num_tokens, width_of(attention))
    out = attention.norm(out)
    if attention.gate is not None:
        out = out * attention.gate(x_BNC).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(out))
    return projected


def recorded_attention(
    attention: Attention,
    x_BNC: Tensor,
    num_prefix: int,
    has_class: bool,
    keep_BN: Tensor | None = None,
    bias: Tensor | None = None,
    angles: Tensor | None = None,
) -> tuple[Tensor, AttentionRecord]:
    """Timm's attention layer, and its inner values.

    Args:
        attention: an attention layer of timm's; its own projections and norms are used.
        x_BNC: all tokens, normalised for attention.
        num_prefix: prefix tokens at the head of the sequence.
        has_class: whether token 0 is a class token.
        keep_BN: one entry per token, prefix tokens included: then :func:`masked_softmax` takes the
            softmax's place, in an exported graph a plain mask; None runs the fused kernel.
        bias: added to the logits (B, H, Q, N), some of these 1, such as the logarithm of the number
            of patches that a key stands for; None: nothing.
        angles: (B, H, N, 2 D), some of these 1, that turn queries and keys; None: none do.
    """
    records: list[AttentionRecord] = []

    def run(x_BNC: Tensor) -> Tensor:
        record = _self_attention(attention, x_BNC, num_prefix, has_class, keep_BN, bias, angles)
        records.append(record)
        return merge(attention, x_BNC, record.context_BHQD)

    return called(attention, run, x_BNC), records[0]


def _self_attention(
    attention: Attention,
    x_BNC: Tensor,
    num_prefix: int,
    has_class: bool,
    keep_BN: Tensor | None,
    bias: Tensor | None,
    angles: Tensor | None,
) -> AttentionRecord:
    q, k, v = (part.transpose(1, 2) for part in project(attention, x_BNC))
    q = placed(attention, attention.q_norm, q, v, angles)
    k = placed(attention, attention.k_norm, k, v, angles)
    scale, weights, visible = scale_of(attention, q), None, None
    bias = None if bias is None else bias.to(q.dtype)
    if exporting() and not (keep_BN is None and bias is None):
        # Plain products: of fused attention some exporters want to know the number of tokens.
        logits = _biased(q * scale @ k.transpose(-2, -1), bias)
        if keep_BN is not None:
            visible = keep_BN > 0.5
            token_N = torch.arange(q.shape[2], device=q.device)
            itself = token_N.unsqueeze(1) == token_N  # is seen in any case
            logits = logits.masked_fill(~(visible[:, None, None, :] | itself), -math.inf)
        context = logits.softmax(-1) @ v
    elif keep_BN is None:
        context = attend(attention, q, k, v, bias)
    else:
        weights = masked_softmax(_biased(q * scale @ k.transpose(-2, -1), bias), keep_BN)
        context = attention.attn_drop(weights) @ v
        visible = keep_BN.detach() > 0.5
    return AttentionRecord(q, k, v, context, scale, num_prefix, has_class, visible, weights, bias)


def _biased(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias


def cross_attention(
    attention: Attention,
    query_BSC: Tensor,
    memory_BNC: Tensor,
    bias_N: Tensor | None = None,
    angles: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, AttentionRecord]:
    """A self-attention layer used between two sequences: the same projections, split by rows.

    Args:
        attention: a ``timm.layers.Attention``.
        query_BSC: what asks, normalised for attention.
        memory_BNC: what is looked at, likewise; it gives keys and values.
        bias_N: added to the logits of each key, such as the logarithm of the number of tokens that
            a key stands for.
        angles: that turn queries, and keys; see :func:`recorded_attention`.

    Returns:
        the layer's output (B, S, C), and its inner values.
    """
    records: list[AttentionRecord] = []

    def run(query_BSC: Tensor) -> Tensor:
        record = _cross_attention(attention, query_BSC, memory_BNC, bias_N, angles)
        records.append(record)
        return merge(attention, query_BSC, record.context_BHQD)

    return called(attention, run, query_BSC), records[0]


def _cross_attention(
    attention: Attention,
    query_BSC: Tensor,
    memory_BNC: Tensor,
    bias_N: Tensor | None,
    angles: tuple[Tensor | None, Tensor | None],
) -> AttentionRecord:
    (q,) = project(attention, query_BSC, 0, 1)
    k, v = project(attention, memory_BNC, 1, 3)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    q = placed(attention, attention.q_norm, q, v, angles[0])
    k = placed(attention, attention.k_norm, k, v, angles[1])
    bias = None if bias_N is None else bias_N.to(q.dtype).expand(q.shape[2], -1)
    context = attend(attention, q, k, v, bias)
    return AttentionRecord(q, k, v, context, scale_of(attention, q), 0, False, bias=bias)


def attention_of_first(
    attention: Attention,
    x_BNC: Tensor,
    rows: int,
    bias: Tensor | None = None,
    angles: Tensor | None = None,
) -> Tensor:
    """The first ``rows`` rows (B, rows, C) of what timm's attention layer gives, and no others.

    With few queries neither keys nor values of the other tokens are needed. Per head,
    ``q . (W_k y) = (W_k^T q) . y``, so the tokens ``y`` themselves stand in for the keys, and for
    the values too: ``sum p W_v y = W_v sum p y``, as the weights ``p`` sum to 1. The bias of the
    keys adds the same to all logits of a head. All heads ask the same tokens, as so many queries of
    one wide head; for so few, plain products beat the fused kernel. Where keys are normed or
    turned, they are not linear in ``y``, and are made.

    Args:
        attention: an attention layer of timm's that projects by plain linear layers.
        x_BNC: all tokens, normalised for attention.
        rows: how many, from the first.
        bias: added to the logits of each key, (B, 1, 1, N); None: nothing.
        angles: by which queries and keys are turned, see :func:`recorded_attention`.
    """
    first = x_BNC[:, :rows]
    q = project(attention, first, 0, 1)[0].transpose(1, 2)
    q = placed(attention, attention.q_norm, q, q, None if angles is None else angles[:, :, :rows])
    scale = scale_of(attention, q)
    if angles is None and isinstance(attention.k_norm, nn.Identity):
        logits = _of_all_heads(q * scale @ weights_of(attention, 1)[0], x_BNC.transpose(-2, -1))
    else:
        k = project(attention, x_BNC, 1, 2)[0].transpose(1, 2)
        k = placed(attention, attention.k_norm, k, q, angles)
        logits = (q * scale) @ k.transpose(-2, -1)
    weights_BHRN = _biased(logits, bias).softmax(-1).to(x_BNC.dtype)
    seen_BHRC = _of_all_heads(weights_BHRN, x_BNC)
    weight_HDC, bias_HD = weights_of(attention, 2)
    context_BHRD = seen_BHRC @ weight_HDC.transpose(-2, -1)
    if bias_HD is not None:
        context_BHRD = context_BHRD + bias_HD.unsqueeze(1)
    return merge(attention, first, context_BHRD)


def _of_all_heads(rows_BHRX: Tensor, matrix_BXY: Tensor) -> Tensor:
    """(B, H, R, Y): all heads' rows times their image's matrix."""
    if exporting():  # exporters lose the reshapes below where there are as many images as heads
        return rows_BHRX @ matrix_BXY.unsqueeze(1)
    product_BQY = rows_BHRX.flatten(1, 2) @ matrix_BXY
    return product_BQY.view(*rows_BHRX.shape[:3], -1)


def masked_softmax(logits_BHNN: Tensor, keep_BN: Tensor, eps: float = EPS) -> Tensor:
    """Softmax over the kept keys; each query sees itself even when it is dropped.

    ``out_ij = (E_ij + eps / N) / (sum_j E_ij + eps)`` with ``E_ij = exp(A_ij - m_i) G_ij`` and
    ``G_ij = keep_j`` off the diagonal, 1 on it. Computed in float32, returned in the logits' dtype.

    The released code takes the maximum ``m_i`` over all keys. When a dropped key beats every kept
    one by more than about 14, the kept terms sink below ``eps`` there and the row drifts to a
    uniform mix that includes the dropped tokens. Here ``m_i`` is taken over the visible keys, which
    is the same softmax without that failure: the two are equal where no dropped key beats the kept
    ones, and differ by about ``eps exp(lead)`` where one leads. A dropped key's weight is capped at
    1e6, which bounds the straight-through gradient of ``keep_j`` as their ``eps`` does.

    Args:
        logits_BHNN: scaled attention logits.
        keep_BN: 1 for a visible key, 0 for a dropped one; may carry straight-through gradients.
        eps: the released code's constant; 0 gives the plain softmax over the visible keys.
    """
    num_tokens = logits_BHNN.shape[-1]
    logits = logits_BHNN.float()
    keep_B11N = keep_BN.float()[:, None, None, :]
    eye = torch.eye(num_tokens, device=logits.device)
    visible = keep_B11N + (1 - keep_B11N) * eye
    hidden = visible.detach() < 0.5
    peak = logits.detach().masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
    weights = (logits - peak).clamp(max=_MAX_EXPONENT).exp() * visible
    out = (weights + eps / num_tokens) / (weights.sum(-1, keepdim=True) + eps)
    return out.to(logits_BHNN.dtype)
