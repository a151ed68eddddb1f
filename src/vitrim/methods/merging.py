"""Merging: similar tokens become one, in a few blocks, by how little they matter.

ToMe's (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461): in a
block, between attention and MLP, a fixed number of patch tokens goes into others. Tokens at even
places of the sequence may go into tokens at odd places, each into the most similar one; attention
weighs a token as the patches that it stands for. :meth:`MergingConfig.tome` is that method as
published: compared by the mean of the keys over the heads, the most similar pairs first, the mean
weighted by sizes, in every block.

This library's, by experiments on real weights without training (``results/tried.md``):

* Tokens are compared by their features, not by their keys.
* Going costs ``(1 - cosine) * importance ** 0.5``. A token's importance is the attention that the
  class token pays to it, mean over the heads (without a class token, what all tokens pay to it).
* What becomes one is the mean weighted by importance.
* Few blocks merge, and many tokens at once: each block that merges takes time for it, whatever it
  merges, and few lose no accuracy.
* With a ``threshold``, every token goes whose going costs less: each image has counts of its own.

Keys with rotary positions are compared as attention compares them, turned by their places.

Where the code of ToMe is wrong (LayerScale and QK-norm are passed over by its blocks), this is not:
blocks are timm's own. Heads that pool the patch tokens weigh each by its size.

Nothing is learned: any trained model can be used as it is, and adapted by distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from vitrim import costs
from vitrim.config import check_weights, normalise, require
from vitrim.families import ViT
from vitrim.layers import sampling
from vitrim.layers.merging import Moves, match, merge, merge_below, most_sources, moves_of, rows_of
from vitrim.layers.stages import (
    check_keep_ratio,
    check_stages,
    fixed_counts,
    stage_ratios,
    stretches,
)
from vitrim.methods.base import RatioMethod, answer_losses, whole_answer
from vitrim.methods.records import Action, DenseOutput, Dial, Plan, Told, TrainingOutput
from vitrim.tokens.attention import AttentionRecord
from vitrim.tokens.packed import AnyTokens, PackedTokens
from vitrim.tokens.plain import Grid, Tokens
from vitrim.tokens.projections import width_of

EPS = 1e-6  # what 16 bits can tell from 0
USUAL_KEEP_RATIO = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class MergingConfig:
    """How merging is set up."""

    keep_ratio: float | tuple[float, ...] = USUAL_KEEP_RATIO
    """Share of the patches' number that goes on from the stages: one number r gives r, r^2, r^3
    ...; a tuple gives the share at each. Half of the tokens can go at once, no more do."""
    stages: tuple[int, ...] | None = None
    """Blocks before which tokens are fewer: they are merged between attention and MLP of the block
    before. None takes 4 to 9 of 12 blocks, and in proportion of others."""
    merged_per_block: float | None = None
    """ToMe's r: so many tokens are merged away in every block, in place of ``keep_ratio`` and
    ``stages``; of a fraction, as many as add up. Published: 13 for DeiT-S."""
    threshold: float | None = None
    """Merge every token whose going costs less than this, at every stage: a number that depends on
    the image, instead of a fixed count. Calibrate it; it is for images of the backbone's own size,
    and goes with the importance for others. Training merges fixed counts, by ``keep_ratio``. None:
    fixed counts (ToMe)."""
    action: Action | tuple[Action, ...] = "merge"
    """Whether tokens are merged, or the least important ones dropped; a tuple says it for each
    stage."""
    metric: Literal["features", "keys", "mean_keys"] = "features"
    """What tokens are compared by: their features, after the attention's residual; the keys of all
    heads; or the keys' mean over the heads (ToMe)."""
    importance_power: float = 0.5
    """Of the importance in the cost of going; 0 leaves it out (ToMe)."""
    weigh_by: Literal["importance", "size"] = "importance"
    """What weighs the tokens that become one; ToMe's are weighed by size."""
    train_keep_ratio: tuple[float, ...] | None = None
    """Training draws ``keep_ratio`` for each batch between these two numbers; None trains at
    ``keep_ratio``."""
    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need: the same logits for
    fewer MACs."""
    classification_weight: float = 1.0
    """Weight of the cross entropy."""
    distill_weight: float = 1.0
    """Weight of KL(teacher || student) on the logits."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        check_keep_ratio(self.keep_ratio)
        if self.stages is not None:
            _check_stages(self.stages)
            self.ratios(len(self.stages))
            self.actions(len(self.stages))
        power, per_block = self.importance_power, self.merged_per_block
        drawn = self.train_keep_ratio
        require(0 <= power < math.inf, f"importance_power is {power}; expected 0 or more")
        if per_block is not None:
            require(
                0 <= per_block < math.inf, f"merged_per_block is {per_block}; expected 0 or more"
            )
            require(self.stages is None, "merged_per_block merges in every block; leave out stages")
            require(
                self.keep_ratio == USUAL_KEEP_RATIO,
                "merged_per_block says how many tokens go on; leave out keep_ratio",
            )
        if self.threshold is not None:
            require(
                0 <= self.threshold < math.inf,
                f"threshold is {self.threshold}; expected a cost of 0 or more, or None",
            )
            require(
                per_block is None and "drop" not in self.action,
                "threshold says what merges; leave out merged_per_block and stages that drop",
            )
        require(
            drawn is None or (len(drawn) == 2 and 0 < drawn[0] <= drawn[1] <= 1),
            f"train_keep_ratio is {drawn}; expected the smaller and the larger of two ratios",
        )
        check_weights(self, "classification", "distill")

    @classmethod
    def tome(cls, merged_per_block: float = 13, **changes: Any) -> MergingConfig:
        """ToMe as published, with ``changes``."""
        fields: dict[str, Any] = {
            "merged_per_block": merged_per_block,
            "metric": "mean_keys",
            "importance_power": 0.0,
            "weigh_by": "size",
            "exact_last_block": False,
        }
        return cls(**fields | changes)

    def ratios(self, num_stages: int) -> tuple[float, ...]:
        """The share of the patches' number that goes on from each stage."""
        return stage_ratios(self.keep_ratio, num_stages)

    def actions(self, num_stages: int) -> tuple[Action, ...]:
        """What each stage does."""
        if not isinstance(self.action, tuple):
            return (self.action,) * num_stages
        require(
            len(self.action) == num_stages,
            f"action has {len(self.action)} entries for {num_stages} stages",
        )
        return self.action

    @property
    def asks_importance(self) -> bool:
        """Whether merging itself needs the tokens' importance."""
        return self.importance_power > 0 or self.weigh_by == "importance"


class Merging(RatioMethod):
    """The method on a plain vision transformer, and on LV-ViT."""

    name = "merging"
    config_class = MergingConfig
    families = ("vit", "eva", "naflex", "lvvit")
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("swin", "swin_v2", "convnext"), "merged tokens have no place in a map; use dynamic_spatial"
    ) | {"pit": "merged tokens have no place in the map that it pools; use spvit_pyramid"}
    usual_stages = 6
    actions = ("merge", "drop")
    fixed_by = "threshold=None"
    config: MergingConfig

    def __init__(
        self, family: ViT, config: MergingConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depth, stages = family.depth, config.stages
        require(depth > 1, "the backbone has one block; merging needs two")
        if config.merged_per_block is not None:
            stages = tuple(range(1, depth))
        elif stages is None:
            stages = tuple(sorted({max(1, depth * part // 12) for part in range(4, 10)}))
        _check_stages(stages, depth)
        config.ratios(len(stages))
        config.actions(len(stages))
        self.config = config
        self.stages = stages
        self.has_class = family.has_class
        self.num_prefix = family.num_prefix
        self.native_patches = math.prod(family.grid())

    @classmethod
    def kinds(cls) -> tuple[MergingConfig, ...]:
        return MergingConfig(), MergingConfig(action="drop"), MergingConfig(threshold=0.01)

    @classmethod
    def decides(cls, config: MergingConfig) -> bool:
        return config.threshold is not None

    def own_kinds(self) -> tuple[MergingConfig, ...]:
        actions = dict.fromkeys(self.config.actions(len(self.stages)))
        return tuple(replace(self.config, action=action) for action in actions)

    @classmethod
    def one_stage(
        cls, config: MergingConfig, block: int, ratio: float, depth: int
    ) -> MergingConfig:
        action = config.action[0] if isinstance(config.action, tuple) else config.action
        changes: dict[str, Any] = {"stages": (block,), "keep_ratio": ratio, "action": action}
        return replace(config, merged_per_block=None, **changes)

    @classmethod
    def fewest(cls, count: int, num_prefix: int, action: Action) -> int:
        """Tokens at odd places stay; those at even places may all merge at once."""
        return max(1, count - most_sources(count, num_prefix)) if action == "merge" else 1

    @property
    def score_name(self) -> str:
        source = "the class token" if self.has_class else "all tokens"
        return f"attention received from {source}"

    def _fixed_counts(self, num_positions: int) -> tuple[int, ...]:
        return self._counts_of(self.config, num_positions)

    def _counts_of(self, config: MergingConfig, num_positions: int) -> tuple[int, ...]:
        stages, per_block = len(self.stages), config.merged_per_block
        if per_block is None:
            wanted = fixed_counts(config.ratios(stages), num_positions)
        else:
            wanted = tuple(num_positions - int(per_block * (n + 1)) for n in range(stages))
        before = num_positions
        counts: list[int] = []
        for count, action in zip(wanted, config.actions(stages), strict=True):
            least = self.fewest(before, self.num_prefix, action)
            before = min(before, max(count, least))
            counts.append(before)
        return tuple(counts)

    def infer(self, family: ViT, images: Tensor, recorder: Told | None = None) -> Tensor:
        stem = family.stem(images)
        counts = None if self.images_decide else self._fixed_counts(stem.num_patches)
        tokens, last = self._merged(family, stem, counts, recorder)
        return family.answer(last.start, tokens, self.config.exact_last_block)

    def _merged(
        self, family: ViT, stem: Tokens, counts: Sequence[int] | None, recorder: Told | None = None
    ) -> tuple[AnyTokens, range]:
        """The tokens behind the last stage, and the blocks that are left to run; the threshold says
        how many go on where there are no ``counts``.
        """
        *others, last = stretches(self.stages, family.depth)
        actions = self.config.actions(len(self.stages))
        tokens = cast(AnyTokens, stem)
        for stage, blocks in enumerate(others):
            fewer: Callable[..., AnyTokens] = partial(self._cheaper, num_patches=stem.num_patches)
            if counts is not None:
                assert isinstance(tokens, Tokens)
                count = counts[stage]
                if count == tokens.num_patches and not (recorder and recorder.reads_scores):
                    tokens = family.run_blocks(blocks, tokens)
                    continue
                fewer = partial(self.fewer, count=count, action=actions[stage])
            tokens = family.run_blocks(blocks[:-1], tokens)
            tokens = self._stage(family, blocks[-1], tokens, fewer, recorder)
        return tokens, last

    def _stage(
        self,
        family: ViT,
        block: int,
        tokens: AnyTokens,
        fewer: Callable[..., AnyTokens],
        recorder: Told | None,
    ) -> AnyTokens:
        """A block between whose halves tokens become ``fewer``."""
        records: list[AttentionRecord] = []

        def read(record: AttentionRecord) -> Tensor:
            records.append(record)
            if recorder and recorder.reads_scores:
                return record.patch_attention().mean(1)
            return record.k_BHND[:, 0, record.num_prefix :, 0]  # what is asked for is in the record

        def between(before: AnyTokens, score: Tensor) -> AnyTokens:
            moves: list[Moves] = []
            after = fewer(before, records[0], moves=moves if recorder else None)
            if recorder:
                recorder.add(block + 1, before, score, after, *moves)
            return after

        return family.split_block(block, tokens, read, between)[0]

    def fewer(
        self,
        tokens: Tokens,
        record: AttentionRecord,
        count: int,
        action: Action,
        moves: list[Moves] | None = None,
    ) -> Tokens:
        """``count`` tokens, by merging or by dropping, between the halves of a block.

        Where more than half of them go, those that stayed merge again: never at inference, but a
        schedule's effects are measured so.

        Args:
            tokens: after the block's attention.
            record: what that did.
            count: of patch tokens that go on.
            action: how they become so few.
            moves: told what went into what, if anybody asks.
        """
        if action == "drop":
            return tokens.gather(sampling.top_k(_importance(record), count))
        importance_BN = _importance(record) if self.config.asks_importance else None
        metric_BNC = self._metric(tokens, record)
        while tokens.num_patches > count:
            most = most_sources(tokens.num_patches, tokens.num_prefix)
            going = min(tokens.num_patches - count, most)
            cost_BN, weight_BN = self._weights(importance_BN)
            matching = match(metric_BNC, going, tokens.num_prefix, cost_BN)
            before, tokens = tokens, merge(tokens, matching, weight_BN)
            if moves is not None:
                moves.append(moves_of(before, matching, tokens))
            if tokens.num_patches > count:
                metric_BNC = rows_of(metric_BNC, matching.kept_BK)
                if importance_BN is not None:
                    importance_BN = importance_BN.gather(1, matching.kept_BK)
        return tokens

    def _cheaper(
        self,
        tokens: AnyTokens,
        record: AttentionRecord,
        num_patches: int,
        moves: list[Moves] | None = None,
    ) -> AnyTokens:
        """The same by the threshold: as many as each image has, of ``num_patches`` originally."""
        present = tokens.padded() if isinstance(tokens, PackedTokens) else tokens
        assert self.config.threshold is not None
        importance_BN = _importance(record) if self.config.asks_importance else None
        scale = (self.native_patches / num_patches) ** self.config.importance_power
        threshold, metric_BNC = self.config.threshold * scale, self._metric(present, record)
        weights = self._weights(importance_BN)
        after: AnyTokens
        after, moved = merge_below(present, metric_BNC, threshold, num_patches, *weights)
        if moves is not None:
            moves.append(moved)
        return after

    def _weights(self, importance_BN: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of the patch tokens (B, N): in the cost of going, and in means."""
        if importance_BN is None:
            return None, None
        cost_BN = importance_BN**self.config.importance_power
        return cost_BN, importance_BN if self.config.weigh_by == "importance" else None

    def _metric(self, tokens: Tokens, record: AttentionRecord) -> Tensor:
        """(B, N, C): what patch tokens are compared by."""
        if self.config.metric == "features":
            return tokens.patches
        keys_BNHD = record.k_BHND.transpose(1, 2)[:, tokens.num_prefix :]
        return keys_BNHD.flatten(2) if self.config.metric == "keys" else keys_BNHD.mean(2)

    def train_forward(
        self,
        family: ViT,
        images: Tensor,
        generator: torch.Generator | None = None,
        recorder: Told | None = None,
    ) -> TrainingOutput:
        stem, config = family.stem(images), self.config
        if config.train_keep_ratio is not None:
            low, high = config.train_keep_ratio
            device = None if generator is None else generator.device
            share = torch.rand((), generator=generator, device=device).item()
            ratio = low + share * (high - low)
            config = replace(config, keep_ratio=ratio, merged_per_block=None)
        counts = self._counts_of(config, stem.num_patches)
        tokens, last = self._merged(family, stem, counts, recorder)
        return TrainingOutput(family.head(family.run_blocks(last, tokens)))

    def teach(self, family: ViT, images: Tensor) -> DenseOutput:
        return whole_answer(family, images)

    def losses(
        self, output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        return answer_losses(self, output, target, teacher)

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches, prefix = math.prod(grid), family.num_prefix
        steps = [costs.stem(family, num_patches)]
        patches: Any = num_patches
        actions = self.config.actions(len(self.stages))
        going = pairwise((num_patches, *self._fixed_counts(num_patches)))
        acts = {
            stage: self.images_decide or before > after
            for stage, (before, after) in zip(self.stages, going, strict=True)
        }
        for block in range(family.depth - 1):
            if not acts.get(block + 1):
                steps.append(costs.block(family, block, patches + prefix))
                continue
            stage = self.stages.index(block + 1)
            macs = self._stage_macs(family, block, patches, actions[stage])
            name = self.name if actions[stage] == "merge" else f"{self.name}-drop"
            tokens, adaptive = patches + prefix, self.images_decide
            steps.append(costs.select(name, block + 1, tokens, macs, adaptive))
            patches = counts[stage]
            steps.append(costs.mlp(family, block, patches + prefix))
        return [*steps, *costs.answer(family, patches + prefix, self.config.exact_last_block)]

    def _stage_macs(self, family: ViT, block: int, patches: Any, action: Action) -> Any:
        """Attention, importance and matching."""
        tokens = patches + family.num_prefix
        macs = costs.attention_macs(family, block, tokens)
        if action == "drop" or self.config.asks_importance:
            macs = macs + family.score_macs(block, tokens)
        if action == "drop":
            return macs
        attention = family.backbone.blocks[block].attn
        width = {
            "features": family.embed_dim,
            "keys": width_of(attention),
            "mean_keys": attention.head_dim,
        }[self.config.metric]
        sources = most_sources(patches, family.num_prefix)
        return macs + width * sources * (patches - sources)

    def dial(self) -> Dial:
        per_block, threshold = self.config.merged_per_block, self.config.threshold
        if threshold is not None:
            # From one that no cost reaches, which are below 2, to one that hardly any does not.
            return Dial("threshold", max(threshold, 1e-6), 10.0, 1e-6, logarithmic=True)
        if per_block is None:
            return super().dial()
        most = float(most_sources(self.native_patches, self.num_prefix))
        return Dial("merged_per_block", per_block, cheapest=most, dearest=0.0)

    def turn(self, value: float) -> None:
        if self.config.merged_per_block is None:
            super().turn(value)
        else:
            self.config = replace(self.config, merged_per_block=value)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        require(
            self.config.merged_per_block is None,
            "merged_per_block says how many tokens are merged; make the model sparse with a "
            "keep_ratio to set ratios, or use set_budget",
        )
        super().set_keep_ratio(keep_ratio)

    @property
    def least_ratio(self) -> float:
        """One half goes at once, at most."""
        return 0.5

    @classmethod
    def follow(cls, config: MergingConfig, plan: Plan) -> tuple[MergingConfig, str | None]:
        action: Action | tuple[Action, ...] = plan.actions or config.action
        if isinstance(action, tuple) and len(action) != len(plan.stages):
            action = "merge"
        changes: dict[str, Any] = {"stages": plan.stages, "keep_ratio": plan.keep_ratios}
        followed = replace(config, merged_per_block=None, action=action, **changes)
        remark = "training merges to these counts; at inference every image decides"
        actions = followed.actions(len(plan.stages))
        steps = pairwise((plan.patches, *plan.counts))
        for (before, after), each in zip(steps, actions, strict=True):
            require(
                each == "drop" or 2 * after >= before - 1,
                f"the schedule leaves {after} of {before} patches at a stage, and half of them at "
                "most can merge at once; find a schedule for merging (vitrim schedule --method "
                'merging), or set action = "drop"',
            )
        return followed, remark if cls.decides(config) else None


def _importance(record: AttentionRecord) -> Tensor:
    """(B, N): the attention that patch tokens get from the class token, or from all."""
    return record.patch_attention().mean(1).clamp(min=EPS)


def _check_stages(stages: Sequence[int], depth: int | None = None) -> None:
    check_stages(stages, depth)
    require(
        stages[0] >= 1,
        "stage 0 has no block before it in which tokens could be merged; start at block 1",
    )
