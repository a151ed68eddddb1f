"""Loss terms that several methods share. Each returns a scalar, unweighted.

All are computed in float32 at least: in bfloat16 a small KL divergence comes out negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.layers.sampling import top_k


def classification_loss(logits_BC: Tensor, target: Tensor) -> Tensor:
    """Cross entropy against class numbers (B,) or soft targets (B, C) such as mixup makes."""
    return F.cross_entropy(full(logits_BC), target)


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over images.

    The direction is that of the released DynamicViT, SPViT and AS-ViT code.
    """
    student, teacher = F.log_softmax(full(student_BC), -1), F.log_softmax(full(teacher_BC), -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kept_token_mse(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    """Mean squared error over the kept tokens and the channels; 0 when nothing is kept."""
    error_BN = (full(student_BNC) - full(teacher_BNC)).square().mean(-1)
    kept = (keep_BN.detach() > 0.5).to(error_BN.dtype)
    return (error_BN * kept).sum() / kept.sum().clamp(min=1)


def kept_token_divergence(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    """KL(teacher || student) of the kept tokens' logits, mean over them; 0 when nothing is kept."""
    student = F.log_softmax(full(student_BNC), -1)
    teacher = F.log_softmax(full(teacher_BNC), -1)
    divergence_BN = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    kept = (keep_BN.detach() > 0.5).to(divergence_BN.dtype)
    return (divergence_BN * kept).sum() / kept.sum().clamp(min=1)


def selection_loss(log_probs_BK2: Tensor, best_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Negative log-likelihood that the tokens of ``best_BK`` are kept and the others dropped.

    Args:
        log_probs_BK2: log-probabilities of (keep, drop).
        best_BK: 1 for a token that should be kept, 0 for one that should go.
        weight_BK: share of each token in the mean.
    """
    keep, drop = log_probs_BK2.float().unbind(-1)
    nll_BK = -(best_BK * keep + (1 - best_BK) * drop)
    return (nll_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1)


def best_tokens_loss(
    log_probs_BK2: Tensor, value_BK: Tensor, alive_BK: Tensor | None, count: int
) -> Tensor:
    """:func:`selection_loss` for keeping the ``count`` tokens of the highest value.

    Args:
        log_probs_BK2: log-probabilities of (keep, drop).
        value_BK: what each token is worth, 0 or more.
        alive_BK: 1 for a token that is still there, 0 for one dropped before; None: all are.
        count: how many should be kept.
    """
    alive_BK = torch.ones_like(value_BK) if alive_BK is None else alive_BK.detach()
    value_BK = value_BK.masked_fill(alive_BK < 0.5, -1)  # what is gone is never among the best
    best_BK = torch.zeros_like(value_BK).scatter(1, top_k(value_BK, count), 1.0)
    return selection_loss(log_probs_BK2, best_BK, alive_BK)


def batch_ratio_loss(keep_BN: Tensor, keep_ratio: float, real_BN: Tensor | None = None) -> Tensor:
    """Squared distance of the whole batch's kept share from the target: images may differ; of
    positions that are no padding, where ``real_BN`` says which.
    """
    keep_BN = full(keep_BN)
    share = keep_BN.mean() if real_BN is None else keep_BN[real_BN].mean()
    return (share - keep_ratio).square()


def ratio_loss(keep_BN: Tensor, keep_ratio: float, real_BN: Tensor | None = None) -> Tensor:
    """Squared distance of each image's kept share from the target, mean over images; of positions
    that are no padding, where ``real_BN`` says which.
    """
    keep_BN = full(keep_BN)
    if real_BN is None:
        return (keep_BN.mean(1) - keep_ratio).square().mean()
    share_B = (keep_BN * real_BN).sum(1) / real_BN.sum(1)
    return (share_B - keep_ratio).square().mean()


def full(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
