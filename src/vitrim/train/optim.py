"""AdamW's parameter groups, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.train.recipe import OptimRecipe

EMBEDDINGS = ("cls_token", "dist_token", "pos_embed", "reg_token")
UNDECAYED = (*EMBEDDINGS, "relative_position_bias_table", "bias")
"""Last part of the names of what is never decayed, whatever its shape."""


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[dict[str, Any]]:
    """Groups {backbone, method} x {decay, no decay}; each carries ``role``, read by the schedule.

    A dense model has the role ``dense`` throughout; a task's head goes with the method. Vectors,
    biases (of positions too) and learned tokens are not decayed; with ``train_embeddings`` off the
    learned tokens stop requiring gradients and are in no group.
    """
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in EMBEDDINGS and not recipe.train_embeddings:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        role = _role(model, name)
        decays = parameter.ndim > 1 and last not in UNDECAYED
        groups.setdefault((role, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "role": role,
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (role, decays), parameters in groups.items()
    ]


def _role(model: nn.Module, name: str) -> str:
    """Whether a parameter is the timm model's own, under a method or a head, or came with these."""
    if hasattr(model, "task"):  # a head on a backbone, see vitrim/tasks/model.py
        own = "backbone.backbone." if hasattr(model.backbone, "method") else "backbone."
        return "backbone" if name.startswith(own) else "method"
    sparse = hasattr(model, "backbone") and hasattr(model, "method")
    return name.split(".", 1)[0] if sparse else "dense"


def create_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; the schedule sets the learning rates."""
    beta1, beta2 = recipe.betas
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=0.0, betas=(beta1, beta2))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates as a function of the optimiser step."""

    recipe: OptimRecipe
    """The rates, and the epochs of warm-up and freeze."""
    steps_per_epoch: int
    """Optimiser steps in an epoch."""
    epochs: int
    """Epochs that a cosine or a line spans."""
    global_batch: int
    """Images per optimiser step, which scale the rate where the recipe asks for it."""

    @property
    def peak(self) -> float:
        """The highest rate of the method's parameters."""
        recipe = self.recipe
        share = 1.0 if recipe.lr_batch is None else self.global_batch / recipe.lr_batch
        return recipe.lr * share

    def lr(self, step: int) -> float:
        """Rate of the method's (or a dense model's) parameters at ``step``, counted from 0."""
        recipe, peak = self.recipe, self.peak
        warmup = round(recipe.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return peak * step / warmup
        if recipe.schedule == "steps":
            passed = sum(step >= epoch * self.steps_per_epoch for epoch in recipe.step_epochs)
            return peak * 0.1**passed
        total = max(self.steps_per_epoch * self.epochs - warmup, 1)
        share = min((step - warmup) / total, 1.0)
        height = 1 - share if recipe.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return recipe.min_lr + (peak - recipe.min_lr) * height

    def backbone_lr(self, step: int) -> float:
        """Rate of the backbone under a method at ``step``."""
        recipe = self.recipe
        if step < recipe.freeze_backbone_epochs * self.steps_per_epoch:
            return 0.0
        lr = self.lr(step)
        if recipe.backbone_schedule == "constant":
            return min(recipe.backbone_lr_scale * self.peak, lr)
        return recipe.backbone_lr_scale * lr

    def apply(self, optimizer: Any, step: int) -> float:
        """Set every group's rate for ``step``; returns :meth:`lr`.

        A frozen backbone has rate 0, and AdamW multiplies its decay by the rate: nothing moves.
        """
        lr = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = self.backbone_lr(step) if group["role"] == "backbone" else lr
        return lr


class MovingAverage:
    """An exponential moving average of a model's weights, kept as a model of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards ``model`` by ``1 - decay``; what is no float is copied."""
        for mean, value in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - self.decay)
            else:
                mean.copy_(value)
