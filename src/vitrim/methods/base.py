"""What every method offers to the rest of the library, and the records it leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.errors import ConfigError
from vitrim.families import ViT
from vitrim.tokens import Tokens


@dataclass(frozen=True)
class StageTrace:
    """What one stage decided for a batch; places refer to the original patch grid."""

    block: int
    """The stage acts before this block (0-based)."""
    scores: Tensor
    """(B, N): the method's score of each original patch, NaN where it was dropped earlier."""
    kept: list[Tensor]
    """Per image: sorted original places of the patches that go on."""
    counts: Tensor
    """(B,): how many patches go on."""


@dataclass
class Recorder:
    """Collects a :class:`StageTrace` per stage while a method runs inference."""

    num_patches: int
    stages: list[StageTrace] = field(default_factory=list)

    def add(self, block: int, before: Tokens, score_BN: Tensor, after: Tokens) -> None:
        """Record that ``before`` was scored and ``after`` goes on."""
        scores = score_BN.new_full((score_BN.shape[0], self.num_patches), torch.nan)
        scores.scatter_(1, before.index_BN, score_BN)
        kept = [places.sort().values for places in after.index_BN]
        counts = torch.tensor([len(places) for places in kept], device=score_BN.device)
        self.stages.append(StageTrace(block, scores, kept, counts))


@dataclass(frozen=True)
class DenseOutput:
    """What a dense teacher says of a batch."""

    logits: Tensor
    """(B, classes)"""
    patch_features: Tensor
    """(B, N, C): patch tokens after the final norm."""
    saliency: tuple[Tensor, ...] = ()
    """Per block of ``Method.saliency_blocks`` (B, N): how much each patch token entering it
    matters to the prediction; see ``ViT.saliency``."""


@dataclass(frozen=True)
class Decision:
    """What a stage decided in a training forward, about the K patch tokens that reached it."""

    log_probs: Tensor
    """(B, K, 2): log-probabilities of keep and drop."""
    before: Tokens
    """The tokens that the stage saw; under a mask, some were dropped already."""
    keep_BN: Tensor
    """(B, N), on the original grid: 1 for a patch that goes on; may carry straight-through
    gradients."""


@dataclass(frozen=True)
class TrainingOutput:
    """A differentiable training forward."""

    logits: Tensor
    """(B, classes)"""
    patch_features: Tensor
    """(B, K, C): patch tokens that reached the end, after the final norm."""
    tokens: Tokens
    """The tokens after the last block; says where the features belong, and which are masked."""
    decisions: tuple[Decision, ...]
    """One per stage."""


class Method(nn.Module, ABC):
    """One way of sparsifying: its parameters, its loop over the blocks, its losses.

    A method never holds the backbone: it is handed the family that runs it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    stages: tuple[int, ...]

    @property
    def saliency_blocks(self) -> tuple[int, ...]:
        """Blocks at which :meth:`losses` wants the teacher's saliency."""
        return ()

    @abstractmethod
    def infer(self, family: ViT, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        """Logits (B, classes), computing only what is kept; deterministic."""

    @abstractmethod
    def train_forward(
        self, family: ViT, images: Tensor, generator: torch.Generator | None = None
    ) -> TrainingOutput:
        """The differentiable forward, with the method's noise."""

    @abstractmethod
    def losses(
        self, output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        """Raw loss terms by name, and ``"total"``, their weighted sum.

        Terms that need labels or a teacher are left out when these are None.
        """

    @abstractmethod
    def counts(self, num_patches: int) -> tuple[int, ...] | None:
        """Kept patches after each stage, or None where they depend on the image."""

    @abstractmethod
    def macs(self, family: ViT, num_patches: int, counts: Sequence[Any]) -> Any:
        """MACs of one image, given the kept count after each stage (numbers or tensors)."""

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratio at run time, where the method has one."""
        raise ConfigError(f"{self.name} has no keep ratio to set")


def check_stages(stages: Sequence[int], depth: int | None = None) -> None:
    """Raise :class:`ConfigError` unless ``stages`` are sorted blocks of a backbone of ``depth``."""
    require(len(stages) > 0, "stages is empty; name at least one block, such as (3, 6, 9)")
    ordered = all(a < b for a, b in pairwise(stages))
    require(ordered, f"stages are {tuple(stages)}; expected increasing block numbers")
    require(stages[0] >= 0, f"stages are {tuple(stages)}; block numbers start at 0")
    if depth is not None:
        require(
            stages[-1] < depth,
            f"stage {stages[-1]} is outside the backbone, whose blocks are 0 to {depth - 1}",
        )
