"""The records of methods: what a stage decided, what training and a teacher say, what to follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vitrim.layers import losses
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Grid, Tokens

Action = Literal["merge", "drop"]
"""How a stage makes patch tokens fewer."""


@dataclass(frozen=True)
class StageTrace:
    """What one stage decided for a batch; places refer to ``grid``."""

    block: int
    """The stage acts before this block (0-based)."""
    scores: Tensor
    """(B, N): the method's score of each original patch, NaN where it was dropped earlier."""
    grid: Grid
    """Rows and columns of the places: the patch grid, or the map's where a backbone pools."""
    kept: list[Tensor]
    """Per image: sorted original places of the patches that go on; none where semantic tokens
    replace all patches."""
    counts: Tensor
    """(B,): how many go on: patches, or the semantic tokens that replace them."""
    assignment: Tensor | None = None
    """(B, S, N): how much each semantic token looks at each original patch, the mean over heads,
    where semantic tokens replace the patches."""
    groups: Tensor | None = None
    """(B, N) int64: for each original patch the place of the token that it is in, its own where
    nothing happened to it; -1 where it is gone. None where no patch tokens are dropped or merged:
    in maps, and where semantic tokens replace them."""

    def of_nothing(self) -> StageTrace:
        """The same for a batch without images."""
        looks = None if self.assignment is None else self.assignment[:0]
        groups = None if self.groups is None else self.groups[:0]
        scores, counts = self.scores[:0], self.counts[:0]
        return StageTrace(self.block, scores, self.grid, [], counts, looks, groups)


class Told(Protocol):
    """What is told of each stage at which patch tokens are dropped or merged."""

    @property
    def reads_scores(self) -> bool:
        """Whether it reads the scores, and so is told of stages that can drop nothing too."""

    def add(
        self,
        block: int,
        before: AnyTokens,
        scores: Tensor,
        after: AnyTokens,
        moves: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Before ``block``, ``before`` was scored, one score per patch token; ``after`` goes on;
        ``moves`` says what went into what, see :data:`vitrim.layers.merging.Moves`.
        """


@dataclass
class Recorder:
    """Collects a :class:`StageTrace` per stage while a method runs inference."""

    reads_scores: ClassVar[bool] = True
    grid: Grid
    """Of the original patches."""
    stages: list[StageTrace] = field(default_factory=list)

    def add(
        self,
        block: int,
        before: AnyTokens,
        scores: Tensor,
        after: AnyTokens,
        moves: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Record a stage, see :class:`Told`."""
        if isinstance(before, Tokens) and before.keep_BN is not None:
            scores = scores.masked_fill(before.keep_BN < 0.5, torch.nan)
        score_BN = before.on_grid(scores.detach().float(), math.prod(self.grid), torch.nan)
        kept = after.places()
        self._append(block, self.grid, score_BN, kept, self._grouped(kept, moves, score_BN))

    def _grouped(
        self, kept: list[Tensor], moves: tuple[Tensor, Tensor] | None, like_BN: Tensor
    ) -> Tensor:
        """The groups after a stage: where the tokens of those before it went."""
        num_images, num_patches = like_BN.shape
        nowhere = num_patches  # a place more, which -1 stands for
        into_BN = like_BN.new_full((num_images, num_patches + 1), -1, dtype=torch.int64)
        for image, places in enumerate(kept):
            into_BN[image, places] = places
        if moves is not None:
            source_BD, target_BD = moves
            into_BN.scatter_(1, source_BD % (nowhere + 1), target_BD)
            into_BN[:, nowhere] = -1
        if not self.stages:
            return into_BN[:, :nowhere]
        groups = self.stages[-1].groups
        assert groups is not None
        return into_BN.gather(1, groups % (nowhere + 1))

    def add_map(self, block: int, score_BHW: Tensor, keep_BHW: Tensor) -> None:
        """Record a decision on the whole map that a hierarchical backbone has before a block.

        Args:
            block: the stage acts before it.
            score_BHW: of every position.
            keep_BHW: bool, the positions that get the full computation.
        """
        rows, columns = score_BHW.shape[1:]
        kept = [keep_N.nonzero().squeeze(1) for keep_N in keep_BHW.flatten(1)]
        self._append(block, (rows, columns), score_BHW.detach().float().flatten(1), kept)

    def _append(
        self,
        block: int,
        grid: Grid,
        score_BN: Tensor,
        kept: list[Tensor],
        groups: Tensor | None = None,
    ) -> None:
        counts = torch.tensor([len(places) for places in kept], device=score_BN.device)
        trace = StageTrace(block, score_BN, grid, kept, counts, groups=groups)
        self.stages.append(trace)


@dataclass(frozen=True)
class DenseOutput:
    """What a dense teacher says of a batch."""

    logits: Tensor
    """(B, classes): what the losses look at, ``training_head`` for most methods."""
    patch_features: Tensor
    """(B, N, C): patch tokens after the final norm, or their logits where they have a classifier
    of their own: what the family's ``token_loss`` compares."""
    saliency: tuple[Tensor, ...] = ()
    """Per block that the method asked for (B, N): how much each patch token entering it matters to
    the prediction; see ``ViT.saliency``."""
    patch_attention: Tensor | None = None
    """(B, N): what the class token pays to each patch token in the last block, mean over heads
    (received attention where there is no class token); where the method asked for it."""
    pooled_features: Tensor | None = None
    """(B, C): what the classifier reads; where the method asked for it."""


@dataclass(frozen=True)
class TrainingOutput:
    """A differentiable training forward; methods add what their losses need."""

    logits: Tensor
    """(B, classes)"""

    def kept_counts(self) -> list[Tensor]:
        """(B,) per stage: how many patches of each image go on, with the decisions' gradients; none
        where nothing that is learned changes them.
        """
        return []


@dataclass(frozen=True)
class FeatureOutput:
    """A pyramid, and what else is known of it."""

    levels: list[Tensor]
    """(B, C, H, W) each."""
    state: Any
    """What left the last block: the tokens, or the map, which a head reads."""
    keeps: list[Tensor | None] = field(default_factory=list)
    """In training, per level (B, H, W): 1 for a position that took the full computation to the
    level's end, 0 for the others and padding. None: all did."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """In training, the method's own loss terms by name, not weighted: of its decisions, such as
    ``ratio``."""


@dataclass(frozen=True)
class Decision:
    """What a learned selector decided in training, about the K patch tokens that reached it."""

    log_probs: Tensor
    """(B, K, 2): log-probabilities of keep and drop."""
    before: Tokens
    """The tokens that the stage saw; under a mask, some were dropped already."""
    keep_BN: Tensor
    """(B, N), on the original grid: 1 for a patch that goes on; may carry straight-through
    gradients."""


@dataclass(frozen=True)
class SelectionOutput(TrainingOutput):
    """A training forward with learned selectors, and their decisions."""

    patch_features: Tensor
    """(B, K, C): of the patch tokens that reached the end; see :class:`DenseOutput`."""
    tokens: Tokens
    """The tokens after the last block; says where the features belong, and which are masked."""
    decisions: tuple[Decision, ...]
    """One per stage."""
    token_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = losses.kept_token_mse
    """The family's: compares a student's features with a teacher's where tokens are kept."""

    def kept_counts(self) -> list[Tensor]:
        return [decision.keep_BN.sum(1) for decision in self.decisions]


@dataclass(frozen=True)
class PooledOutput(TrainingOutput):
    """A training forward where semantic tokens stand for the patches, which have no features."""

    features_BC: Tensor
    """What the classifier reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Stages of a plain vision transformer, and how many patches go on from each."""

    stages: tuple[int, ...]
    """Blocks before which patches become fewer."""
    counts: tuple[int, ...]
    """Patches that go on from each stage; a mean, where every image decides."""
    patches: int
    """Of the whole image."""
    actions: tuple[Action, ...] = ()
    """What each stage does; empty: what the method does if it is not told."""
    macs: float | None = None
    """Predicted, as a share of the dense model's MACs."""

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """The kept share of the original patches at each stage; rounded down, it is ``counts``."""
        return tuple(_ratio(count, self.patches) for count in self.counts)


def _ratio(count: int, num_patches: int) -> float:
    """The smallest share that rounds down to ``count`` patches in floating point."""
    ratio = count / num_patches
    return ratio if int(num_patches * ratio) == count else math.nextafter(ratio, 2.0)


@dataclass(frozen=True)
class Dial:
    """The one number that moves a method's cost, from cheapest to dearest."""

    name: str
    """Field of the config that it turns."""
    value: float
    cheapest: float
    dearest: float
    logarithmic: bool = False
    """Whether equal factors, not equal steps, make equal differences."""

    def at(self, position: float) -> float:
        """The value at a position from 0, the cheapest, to 1, the dearest."""
        if position <= 0 or position >= 1:
            return self.cheapest if position <= 0 else self.dearest
        if self.logarithmic:
            return self.cheapest * math.exp(position * math.log(self.dearest / self.cheapest))
        return (1 - position) * self.cheapest + position * self.dearest

    def position(self, value: float) -> float:
        """Where ``value`` lies from 0, the cheapest, to 1, the dearest; see :meth:`at`."""
        if self.logarithmic:
            return math.log(value / self.cheapest) / math.log(self.dearest / self.cheapest)
        return (value - self.cheapest) / (self.dearest - self.cheapest)
