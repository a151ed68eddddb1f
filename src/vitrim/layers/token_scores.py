"""Scores of patch tokens, read off one block's attention: a registry by name, for SaiT, and
AS-ViT's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.config import require
from vitrim.layers.losses import full
from vitrim.tokens.attention import AttentionRecord


@dataclass(frozen=True)
class TokenScore:
    """A way to read the importance of the patch tokens off one block's attention."""

    read: Callable[[AttentionRecord], Tensor]
    """Gives (B, N), not yet normalised."""
    words: str
    """What is read, for people; ``{attention}`` stands for the class token's or the mean one."""
    of_class: bool = False
    """Whether it wants the class token's attention; without one, the mean over all tokens."""


def _value_weighted(record: AttentionRecord) -> Tensor:
    value_BHND = record.v_BHND[:, :, record.num_prefix :]
    value_norm_BHN = torch.linalg.vector_norm(value_BHND, dim=-1)
    score_BN: Tensor = (record.patch_attention() * value_norm_BHN).mean(1)
    return score_BN


SCORES = {
    "mean_received": TokenScore(
        lambda record: record.received_attention().mean(1), "attention received from all tokens"
    ),
    "cls": TokenScore(
        lambda record: record.patch_attention().mean(1), "attention received from {attention}", True
    ),
    "cls_value_norm": TokenScore(
        _value_weighted, "attention received from {attention}, times the value's norm", True
    ),
    "head_max": TokenScore(
        lambda record: record.received_attention().amax(1),
        "attention received from all tokens in the head that pays most",
    ),
}
"""The scores by name. Which one the paper uses is not known to us."""


def token_score(
    record: AttentionRecord, head_weighting: bool = True, value_weighting: bool = False
) -> Tensor:
    """(B, N): attention that the class token pays each patch token, in float32 at least.

    The heads are weighted by the norm of their context at the token, ``sum_h R_hi A_hi`` with
    ``R_hi = |context_hi| / sum_h |context_hi|``; or equally. With ``value_weighting`` each ``A_hi``
    is multiplied by ``|value_hi|``, relative to the image's mean over heads and tokens. Only one
    row of the attention map is needed, and the contexts are what fused attention returns anyway.
    Without a class token, the mean attention that a token receives takes the row's place.
    """
    attention_BHN = full(record.patch_attention())
    if value_weighting:
        attention_BHN = attention_BHN * _relative_value_norm(record)
    if not head_weighting:
        return attention_BHN.mean(1)
    importance_BHN: Tensor = full(record.context_BHQD[:, :, record.num_prefix :]).norm(dim=-1)
    share_BHN = importance_BHN / (importance_BHN.sum(1, keepdim=True) + 1e-8)
    return (share_BHN * attention_BHN).sum(1)


def _relative_value_norm(record: AttentionRecord) -> Tensor:
    """(B, H, N): norms of the patch tokens' values over their mean in the image."""
    norm_BHN: Tensor = full(record.v_BHND[:, :, record.num_prefix :]).norm(dim=-1)
    if record.visible_BN is None:
        return norm_BHN / norm_BHN.mean((1, 2), keepdim=True)
    visible = record.visible_BN[:, None, record.num_prefix :].to(norm_BHN.dtype)
    total = (norm_BHN * visible).mean(1, keepdim=True).sum(-1, keepdim=True)
    return norm_BHN * visible.sum(-1, keepdim=True) / total.clamp(min=1e-8)


def on_grid(attention_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention on a teacher's patch grid, brought to the student's if they differ."""
    num_images, num_patches = attention_BN.shape
    if num_patches == grid[0] * grid[1]:
        return attention_BN
    scale = math.sqrt(num_patches / (grid[0] * grid[1]))
    rows, columns = round(grid[0] * scale), round(grid[1] * scale)
    require(
        rows * columns == num_patches,
        f"the teacher's {num_patches} patches are no grid of the shape {grid[0]} x {grid[1]}, the "
        "student's; take a teacher that sees the same image in square patches",
    )
    attention = attention_BN.view(num_images, 1, rows, columns)
    resized = F.interpolate(attention, grid, mode="bilinear", antialias=True)
    return resized.flatten(1)
