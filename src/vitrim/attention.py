"""Attention under a keep mask, for training.

Inference never comes here: tokens are gathered and timm's own fused attention runs. In training
all tokens stay in memory, so that gradients reach the decisions, and a dropped token is hidden as
a key (DynamicViT, section 3.3, eqs 10 and 11).
"""

from __future__ import annotations

import math

import torch
from timm.layers import Attention
from torch import Tensor

EPS = 1e-6
_MAX_EXPONENT = -math.log(EPS)


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


def masked_attention(attention: Attention, x_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    """Timm's attention layer with :func:`masked_softmax` in place of the softmax.

    Args:
        attention: a ``timm.layers.Attention``; its own projections and norms are used.
        x_BNC: all tokens, normalised for attention.
        keep_BN: one entry per token, prefix tokens included.
    """
    num_images, num_tokens, _ = x_BNC.shape
    heads = attention.num_heads
    qkv = attention.qkv(x_BNC).reshape(num_images, num_tokens, 3, heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    weights = masked_softmax(q * attention.scale @ k.transpose(-2, -1), keep_BN)
    out = attention.attn_drop(weights) @ v
    out = attention.norm(out.transpose(1, 2).reshape(num_images, num_tokens, attention.attn_dim))
    if attention.gate is not None:
        out = out * attention.gate(x_BNC).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(out))
    return projected
