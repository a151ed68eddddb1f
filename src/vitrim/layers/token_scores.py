"""Scores of patch tokens, read off one block's attention: a registry by name, for SaiT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
