"""Dense: no token is dropped, and the last block computes what the answer needs.

Only the class token's row of the last block reaches a class token's head. So that block needs one
query, and neither keys nor values of the other tokens: see
:func:`vitrim.tokens.attention.attention_of_first`. The logits are the backbone's own, to rounding;
for 8 % fewer MACs in DeiT-T, DeiT-S and DeiT-B alike. Heads that read the patch tokens (pooling,
LV-ViT's second classifier) need the whole block, and run it; ``vitrim info`` says so.

A model of clips has no such block either. It runs as torchvision runs it, and gets what that
library has not: checkpoints, recipes, exports.

This library's own; nothing is learned, and there is nothing to turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitrim import costs
from vitrim.config import check_weights, normalise
from vitrim.methods.base import Method, answer_losses, whole_answer
from vitrim.methods.records import DenseOutput, Told, TrainingOutput
from vitrim.tokens.plain import Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig:
    """How the dense model runs."""

    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need; False runs and
    counts timm's own model."""
    classification_weight: float = 1.0
    """Weight of the cross entropy."""
    distill_weight: float = 0.5
    """Weight of KL(teacher || student) on the logits."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        check_weights(self, "classification", "distill")


class Dense(Method):
    """A plain vision transformer, LV-ViT, or Video Swin, with all its tokens."""

    name = "dense"
    config_class = DenseConfig
    families = ("vit", "eva", "naflex", "lvvit", "video_swin")
    refusals: ClassVar[dict[str, str]] = dict.fromkeys(
        ("pit", "swin", "swin_v2", "convnext"),
        "the last block of a pyramid is a small part of it; take the timm model as it is",
    )
    drops = False
    config: DenseConfig

    def __init__(
        self, family: Any, config: DenseConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.stages = ()

    @classmethod
    def kinds(cls) -> tuple[DenseConfig, ...]:
        return ()

    def counts(self, family: Any, grid: Grid) -> tuple[int, ...]:
        return ()

    def infer(self, family: Any, images: Tensor, recorder: Told | None = None) -> Tensor:
        logits: Tensor
        if family.keeps_map:
            logits = family.head(family.dense(images))
        else:
            logits = family.answer(0, family.stem(images), self.config.exact_last_block)
        return logits

    def train_forward(
        self,
        family: Any,
        images: Tensor,
        generator: torch.Generator | None = None,
        recorder: Told | None = None,
    ) -> TrainingOutput:
        return TrainingOutput(family.head(family.dense(images)))

    def teach(self, family: Any, images: Tensor) -> DenseOutput:
        return whole_answer(family, images)

    def losses(
        self, output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        return answer_losses(self, output, target, teacher)

    def whole_last_block(self, family: Any) -> str | None:
        if family.keeps_map:
            return "the classifier reads the mean of all positions"
        return super().whole_last_block(family)

    def steps(self, family: Any, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        if family.keeps_map:
            steps: list[costs.Step] = family.dense_steps(grid)
            return steps
        return costs.plain_steps(family, grid, self.config.exact_last_block)
