"""Choosing tokens: differentiable draws for training, exact selection for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hard_keep(
    log_probs_BN2: Tensor,
    *,
    noise: bool = True,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A 0/1 draw of class 0, "keep", with straight-through gradients (Gumbel-softmax).

    Args:
        log_probs_BN2: log-probabilities of (keep, drop) per token.
        noise: False takes the likelier class instead of drawing.
        temperature: of the relaxed distribution that gradients go through.
        generator: source of the Gumbel noise; None uses torch's global one.

    Returns:
        (B, N): exactly 0 or 1 forward, gradients of the relaxed draw.
    """
    logits = log_probs_BN2
    if noise:
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        logits = logits - exponential.log()
    soft = F.softmax(logits / temperature, dim=-1)[..., 0]
    hard = (logits[..., 0] >= logits[..., 1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def with_noise(
    score_BN: Tensor, deviation: float, generator: torch.Generator | None = None
) -> Tensor:
    """The scores with normal noise, to choose by; without gradients where there is noise."""
    if deviation == 0:
        return score_BN
    noise = torch.empty_like(score_BN).normal_(std=deviation, generator=generator)
    return score_BN.detach() + noise


def top_k(score_BN: Tensor, count: int) -> Tensor:
    """(B, count) positions of the best scores, in no order that a caller may rely on."""
    return torch.topk(score_BN, count, dim=1, sorted=False).indices


def at_least_best(keep_BN: Tensor, score_BN: Tensor) -> Tensor:
    """``keep_BN`` (bool), with the best token added for images that keep none.

    For heads that pool patches: an empty pool has no mean.
    """
    best = F.one_hot(score_BN.argmax(1), keep_BN.shape[1]).bool()
    return keep_BN | (best & ~keep_BN.any(1, keepdim=True))
