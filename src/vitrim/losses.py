"""Loss terms that several methods share. Each returns a scalar, unweighted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits_BC: Tensor, target: Tensor) -> Tensor:
    """Cross entropy against class numbers (B,) or soft targets (B, C) such as mixup makes."""
    return F.cross_entropy(logits_BC, target)


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over images.

    The direction is that of the released DynamicViT, SPViT and AS-ViT code.
    """
    student, teacher = F.log_softmax(student_BC, -1), F.log_softmax(teacher_BC, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kept_token_mse(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
    """Mean squared error over the kept tokens and the channels; 0 when nothing is kept."""
    kept = (keep_BN.detach() > 0.5).to(student_BNC.dtype)
    error_BN = (student_BNC - teacher_BNC).square().mean(-1)
    return (error_BN * kept).sum() / kept.sum().clamp(min=1)


def ratio_loss(keep_BN: Tensor, keep_ratio: float) -> Tensor:
    """Squared distance of each image's kept share from the target, mean over images."""
    return (keep_BN.mean(1) - keep_ratio).square().mean()
