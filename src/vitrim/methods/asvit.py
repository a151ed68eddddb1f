"""AS-ViT: learned thresholds on class attention drop patch tokens between chosen blocks.

Liu et al., "Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting
Self-Attention", IJCAI 2023 (arXiv 2209.13802), and the authors' code. The attention of the block
before stage ``s`` scores the patch tokens, for next to nothing: token ``i`` gets the class token's
attention to it, averaged over the heads with weights proportional to the norm of each head's
context at ``i``. The tokens whose score is above the stage's threshold go on. A threshold per stage
is all that is learned, so each image keeps as many tokens as it needs.

* Training keeps all tokens in memory: ``score > threshold`` hides a token from attention, with the
  straight-through gradient of a steep sigmoid. One budget on the mean cost of the batch moves all
  thresholds.
* Inference computes on the kept tokens alone, a number per image (``mode="adaptive"``).

What differs from the authors' code: images of a batch do not influence each other (theirs give all
images the batch's mean count, which is ``mode="batch_mean"``); a dropped token stays dropped in
training (``monotone=False`` is theirs); one or no token kept is fine; the step is taken in float32;
any number of stages, backbones without a class token (scored by the mean attention a token
receives), any image size (a threshold is rescaled to the number of patches, as scores sum to 1);
the masked softmax cannot be poisoned by dropped keys (see ``attention.masked_softmax``). Tokens are
dropped before the MLP of the block that scores them: its output for them would be thrown away, so
the numbers are the same and the MACs fewer. Ours too: ``threshold_factor``, which moves the cost of
a trained or untrained model, ``learn_thresholds=False``, which adapts a calibrated one, and
``value_weighting`` of the score, which helps an untrained one.

Untrained, a dense model with calibrated thresholds is a usable start: DeiT-Tiny at 0.65 of its
MACs, on 96 images that calibrated it, is 0.12 nats from its dense self (mean KL divergence) with
equal thresholds at blocks 4, 7, 10 and 0.23 with the paper's 1 : 2 : 3. More stages change
little; stages before block 3, whose class attention says little yet, cost much.

Published: DeiT-S half as fast again for 0.2 points of top-1 (abstract). By other people's notes on
the paper: top-1 79.6 at 3.0 GMACs, 78.7 at 2.3; LV-ViT-S 83.1 at 4.6, 82.6 at 3.9. We reproduce
the forward, losses and gradients of the code on fixed weights; training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import check_weights, normalise, require
from vitrim.families import ViT
from vitrim.layers import dropping, losses, sampling
from vitrim.layers.merging import Moves
from vitrim.layers.stages import check_stages, stretches
from vitrim.layers.token_scores import token_score
from vitrim.methods.base import Method, answer_parts, whole_answer, with_total
from vitrim.methods.records import DenseOutput, Dial, Plan, Recorder, Told, TrainingOutput
from vitrim.tokens.attention import AttentionRecord
from vitrim.tokens.calls import hidden_of
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Grid, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ASViTConfig:
    """How AS-ViT is set up."""

    budget: float = 0.65
    """Mean cost that training aims at, as a share of the dense model's. Paper: 0.65 and 0.5."""
    stages: tuple[int, ...] | None = None
    """Blocks before which tokens are dropped, by the attention of the block before; None takes the
    blocks behind a quarter, a half and three quarters of the depth: the paper's 4, 7, 10 of 12."""
    thresholds: float | tuple[float, ...] | None = None
    """Where the learned thresholds start: one number for all stages or one for each. None is ours:
    0.001 at every stage, for 196 patches (other grids: in proportion to 1 / patches). Paper: 0.001,
    0.002, 0.003; without training, equal thresholds lose half as much (see the module)."""
    threshold_factor: float = 1.0
    """Ours: multiplies all thresholds; the dial of calibration. Paper: 1."""
    mode: Literal["adaptive", "batch_mean", "mask"] = "adaptive"
    """How inference runs. ``adaptive``: each image by itself, computing on what it keeps.
    ``batch_mean``: every image of a batch keeps its best tokens, as many as the batch would keep on
    average (the authors' evaluation). ``mask``: the decisions of ``adaptive``, with all tokens in
    memory and nothing saved; for export and comparison."""
    learn_thresholds: bool = True
    """False, ours, adapts the backbone to the thresholds it has: training runs as inference does,
    on the kept tokens alone, without the budget loss. Calibrate first."""
    head_weighting: bool = True
    """Weight the heads by the norm of their contexts (the paper); False takes their mean."""
    value_weighting: bool = False
    """Ours: also weight a token's attention by the norm of its values, as a token with small values
    changes little whatever attention it gets (the score of ATS, arXiv 2111.15667)."""
    merge_dropped: bool = False
    """Ours: merge what is dropped into the kept token that is most like it, which counts in
    attention as the patches that it stands for; see ``layers.dropping``. Needs ``monotone``."""
    monotone: bool = True
    """A token that is dropped in training stays dropped; False lets it return, as the authors' code
    does (where it hardly ever happens: what is masked out gets no attention)."""
    temperature: float = 1e-4
    """Of the sigmoid that gradients go through. Paper: 1e-4."""
    counting: Literal["exact", "authors", "elementwise"] = "exact"
    """What the budget counts: ``exact``, what this library executes; ``authors``, patch embedding
    and blocks, no classifier, and the dense reference without its class token; ``elementwise``, as
    the authors count for LV-ViT, the same with the element by element operations of the blocks."""
    classification_weight: float = 1.0
    """Weight of the cross entropy. Paper: 1."""
    budget_weight: float = 2.0
    """Weight of the distance of the batch's mean cost from the budget, in GMACs. Paper: 2."""
    distill_weight: float = 0.5
    """Weight of KL(teacher || student) on the logits. Paper: 0.5."""
    token_weight: float = 0.5
    """Weight of the same on the logits of the kept patch tokens, which LV-ViT has. Authors: 0.5."""
    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need: the same logits for
    fewer MACs. False is how the papers execute and count it."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        require(0 < self.budget <= 1, f"budget is {self.budget}; expected a share in (0, 1]")
        if self.stages is not None:
            _check_stages(self.stages)
            self.start(len(self.stages), 196)
        given = self.thresholds
        require(given != (), "thresholds is empty; give a number or one number per stage")
        for threshold in given if isinstance(given, tuple) else (given,):
            inside = threshold is None or 0 < threshold < 1
            require(inside, f"thresholds holds {threshold}; expected shares of attention in (0, 1)")
        factor = self.threshold_factor
        require(0 < factor < math.inf, f"threshold_factor is {factor}; expected a positive number")
        require(
            self.monotone or not self.merge_dropped,
            "merge_dropped needs monotone=True: a token that was merged cannot return",
        )
        require(self.temperature > 0, f"temperature is {self.temperature}; expected more than 0")
        check_weights(self, "classification", "budget", "distill", "token")

    def start(self, num_stages: int, num_patches: int) -> tuple[float, ...]:
        """The threshold of each stage before training."""
        if self.thresholds is None:
            return (0.001 * 196 / num_patches,) * num_stages
        if isinstance(self.thresholds, float):
            return (self.thresholds,) * num_stages
        require(
            len(self.thresholds) == num_stages,
            f"thresholds has {len(self.thresholds)} numbers for {num_stages} stages",
        )
        return self.thresholds


def _check_stages(stages: Sequence[int], depth: int | None = None) -> None:
    check_stages(stages, depth)
    require(
        stages[0] >= 1,
        "stage 0 has no block before it whose attention could score tokens; start at block 1",
    )


def straight_through(
    keep_BN: Tensor, score_BN: Tensor, threshold: Tensor, temperature: float
) -> Tensor:
    """``keep_BN`` (bool) as 0 and 1, with the gradients of ``sigmoid((score - threshold) / t)``."""
    soft = torch.sigmoid((score_BN - threshold) / temperature)
    return keep_BN.to(soft.dtype) + (soft - soft.detach())


def authors_block_cost(family: ViT, block: int, num_tokens: Any, elementwise: bool) -> Any:
    """A block's MACs, with what the authors add for LV-ViT if ``elementwise``.

    That is 6 operations per attention weight, 8 per activation of the MLP, 5 per channel of a norm,
    and 1 per channel of a residual and of a bias (the qkv projection has none).
    """
    macs = family.block_macs(block, num_tokens)
    if not elementwise:
        return macs
    part = family.backbone.blocks[block]
    per_token = 14 * family.embed_dim + 9 * hidden_of(part.mlp)
    return macs + per_token * num_tokens + 6 * part.attn.num_heads * num_tokens * num_tokens


@dataclass(frozen=True)
class ASViTOutput(TrainingOutput):
    """A training forward, its decisions and its cost."""

    keeps: tuple[Tensor, ...]
    """Per stage (B, N): 1 for a patch that goes on; with straight-through gradients."""
    macs_B: Tensor
    """(B,): what each image costs, as ``counting`` counts; with gradients."""
    dense_macs: float
    """What the dense model costs, counted likewise."""
    patch_features: Tensor | None
    """(B, N, classes): the patch tokens' own logits, where they have a classifier."""
    token_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The family's, of these logits."""

    def kept_counts(self) -> list[Tensor]:
        return [keep_BN.sum(1) for keep_BN in self.keeps]


class ASViT(Method):
    """The method on a plain vision transformer, and on LV-ViT."""

    name = "asvit"
    config_class = ASViTConfig
    families = ("vit", "eva", "naflex", "lvvit")
    refusals: ClassVar[Mapping[str, str]] = {
        "pit": "what it drops is gone, and PiT pools a whole map; use spvit_pyramid",
        "swin_v2": "it scores by class attention, and Swin has none; use dynamic_spatial",
        "swin": "it scores by class attention, and Swin has none; use dynamic_spatial, "
        "spvit_pyramid, stvit_swin or stvit_r",
        "convnext": "it scores by attention, and ConvNeXt has none; use dynamic_spatial",
    }
    follows_schedules = True
    config: ASViTConfig

    def __init__(
        self, family: ViT, config: ASViTConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depth = family.depth
        stages = config.stages
        if stages is None:
            require(depth > 1, "the backbone has one block; AS-ViT needs two to drop in between")
            stages = tuple(sorted({min(depth * q // 4 + 1, depth - 1) for q in (1, 2, 3)}))
        _check_stages(stages, depth)
        self.config = config
        self.stages = stages
        self.has_class = family.has_class
        rows, columns = family.grid()
        self.native_patches = rows * columns
        start = config.start(len(stages), self.native_patches)
        self.thresholds = nn.Parameter(torch.tensor(start), requires_grad=config.learn_thresholds)

    @property
    def score_name(self) -> str:
        """What scores the tokens, in words."""
        source = "class attention" if self.has_class else "mean received attention"
        if self.config.head_weighting:
            source += ", heads weighted by context norm"
        return f"{source}, times the value's norm" if self.config.value_weighting else source

    def threshold(self, stage: int, num_patches: int) -> Tensor:
        """The threshold in force (0-dim) for images of ``num_patches`` patches."""
        scale = self.config.threshold_factor * self.native_patches / num_patches
        return losses.full(self.thresholds[stage]) * scale

    @classmethod
    def kinds(cls) -> tuple[ASViTConfig, ...]:
        return ASViTConfig(), ASViTConfig(merge_dropped=True)

    def counts(self, family: ViT, grid: Grid) -> tuple[int, ...] | None:
        return None

    def infer(self, family: ViT, images: Tensor, recorder: Told | None = None) -> Tensor:
        stem = family.stem(images)
        *others, last = stretches(self.stages, family.depth)
        tokens = cast(AnyTokens, stem)
        for stage, (*whole, block) in enumerate(others):  # tokens leave in the middle of a block

            def drop(before: AnyTokens, score: Tensor, stage: int = stage) -> AnyTokens:
                kept, moves = self._drop(family, before, score, stem.num_patches, stage)
                if recorder:
                    recorder.add(self.stages[stage], before, score, kept, moves)
                return kept

            tokens = family.run_blocks(whole, tokens)
            tokens, _ = family.split_block(block, tokens, self._score, drop)
        return family.answer(last.start, tokens, self.config.exact_last_block)

    def _score(self, record: AttentionRecord) -> Tensor:
        head_weighting, value_weighting = self.config.head_weighting, self.config.value_weighting
        return token_score(record, head_weighting, value_weighting)

    def _drop(
        self, family: ViT, tokens: AnyTokens, score: Tensor, num_patches: int, stage: int
    ) -> tuple[AnyTokens, Moves | None]:
        """The tokens that go on at inference, and what became of the others."""
        threshold, merge = self.threshold(stage, num_patches), self.config.merge_dropped
        if self.config.mode == "adaptive":
            score_BN = tokens.on_grid(score, num_patches, -math.inf)
            return dropping.keep_chosen(tokens, _above(family, score_BN, threshold), merge)
        assert isinstance(tokens, Tokens)
        if self.config.mode == "batch_mean":
            count = int((score > threshold).sum()) // tokens.num_images
            count = max(count, int(family.pools_patches))
            return dropping.keep_best(tokens, score, count, merge)
        keep_BN = _above(family, _without_dropped(tokens, score), threshold)
        return dropping.hide(tokens, keep_BN.to(tokens.x.dtype), merge)

    def train_forward(
        self,
        family: ViT,
        images: Tensor,
        generator: torch.Generator | None = None,
        recorder: Told | None = None,
    ) -> TrainingOutput:
        if not self.config.learn_thresholds:
            return TrainingOutput(self.infer(family, images, recorder))
        tokens = family.stem(images)
        num_patches = tokens.num_patches
        keeps: list[Tensor] = []
        for block in range(family.depth):
            if block + 1 not in self.stages:
                tokens = family.run_blocks((block,), tokens)
                continue
            threshold = self.threshold(len(keeps), num_patches)

            def mask(before: AnyTokens, score: Tensor, threshold: Tensor = threshold) -> AnyTokens:
                assert isinstance(before, Tokens)
                keeps.append(self._mask(family, before, score, threshold))
                kept, moves = dropping.hide(before, keeps[-1], self.config.merge_dropped)
                if recorder:
                    recorder.add(self.stages[len(keeps) - 1], before, score, kept, moves)
                return kept

            tokens = cast(Tokens, family.split_block(block, tokens, self._score, mask)[0])
        macs_B, dense_macs = self.budget_macs(family, num_patches, [keep.sum(1) for keep in keeps])
        features = family.patch_features(tokens) if family.labels_patches else None
        logits, token_loss = family.training_head(tokens), family.token_loss
        return ASViTOutput(logits, tuple(keeps), macs_B, dense_macs, features, token_loss)

    @torch.no_grad()
    def teach(self, family: ViT, images: Tensor) -> DenseOutput:
        if self.config.learn_thresholds:
            return super().teach(family, images)
        return whole_answer(family, images)  # the student answers as it does at inference

    def _mask(self, family: ViT, tokens: Tokens, score: Tensor, threshold: Tensor) -> Tensor:
        """(B, N): 1 for a token that goes on in training, with straight-through gradients."""
        previous_BN = tokens.keep_BN if self.config.monotone else None
        candidates = score if previous_BN is None else _without_dropped(tokens, score)
        keep_BN = straight_through(
            _above(family, candidates, threshold), score, threshold, self.config.temperature
        )
        return keep_BN if previous_BN is None else previous_BN * keep_BN

    def budget_macs(
        self, family: ViT, num_patches: int, counts: Sequence[Tensor]
    ) -> tuple[Tensor, float]:
        """What each image and the dense model cost, as the budget counts.

        Args:
            family: runs the backbone.
            num_patches: of the images.
            counts: per stage (B,), kept patches; gradients flow through them.
        """
        blocks = range(family.depth)
        dense_tokens = num_patches + family.num_prefix
        if self.config.counting == "exact":
            dense = family.stem_macs(num_patches) + family.head_macs(dense_tokens)
            dense += sum(family.block_macs(block, dense_tokens) for block in blocks)
            sparse = costs.total_macs(self._sparse_steps(family, num_patches, counts))
            return sparse, dense
        elementwise = self.config.counting == "elementwise"
        total: Any = family.stem_macs(num_patches)
        for block in blocks:
            stage = sum(block >= first for first in self.stages)
            tokens = dense_tokens if stage == 0 else counts[stage - 1] + family.num_prefix
            total = total + authors_block_cost(family, block, tokens, elementwise)
        dense = family.stem_macs(num_patches)
        for block in blocks:
            dense += authors_block_cost(family, block, num_patches, elementwise)
        return total, dense

    def losses(
        self, output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        parts = self.own_losses(output) | answer_parts(output, target, teacher)
        if (
            teacher is not None
            and isinstance(output, ASViTOutput)
            and output.patch_features is not None
        ):
            features, taught = output.patch_features, teacher.patch_features
            parts["token"] = output.token_loss(features, taught, output.keeps[-1])
        require(len(parts) > 0, "learn_thresholds=False learns from labels or a teacher; give one")
        return with_total(self.config, parts)

    def own_losses(self, output: TrainingOutput) -> dict[str, Tensor]:
        if not isinstance(output, ASViTOutput):
            return {}
        excess = output.macs_B.mean() - self.config.budget * output.dense_macs
        return {"budget": excess.abs() / 1e9}

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches = math.prod(grid)
        if self.config.mode == "mask":
            return self._masked_steps(family, num_patches)
        return self._sparse_steps(family, num_patches, counts)

    def _sparse_steps(
        self, family: ViT, num_patches: int, counts: Sequence[Any]
    ) -> list[costs.Step]:
        steps = [costs.stem(family, num_patches)]
        tokens: Any = num_patches + family.num_prefix
        for block in range(family.depth - 1):
            if block + 1 not in self.stages:
                steps.append(costs.block(family, block, tokens))
                continue
            macs = costs.attention_macs(family, block, tokens) + family.score_macs(block, tokens)
            kept = counts[self.stages.index(block + 1)]
            if self.config.merge_dropped:
                macs = macs + costs.matching_macs(family, tokens - family.num_prefix, kept)
            steps.append(costs.select(self.select_name, block + 1, tokens, macs, adaptive=True))
            tokens = kept + family.num_prefix
            steps.append(costs.mlp(family, block, tokens))
        return [*steps, *costs.answer(family, tokens, self.config.exact_last_block)]

    def _masked_steps(self, family: ViT, num_patches: int) -> list[costs.Step]:
        """Nothing is saved; scores after the first read the map that a masked block makes."""
        tokens, first = num_patches + family.num_prefix, self.stages[0] - 1
        steps = [costs.stem(family, num_patches)]
        steps += [costs.block(family, block, tokens) for block in range(first)]
        macs = costs.attention_macs(family, first, tokens) + family.score_macs(first, tokens)
        if self.config.merge_dropped:  # at every stage, all tokens with all
            macs += len(self.stages) * num_patches**2 * family.embed_dim
        steps.append(costs.select(self.select_name, first + 1, tokens, macs, adaptive=True))
        steps.append(costs.mlp(family, first, tokens))
        between = range(first + 1, family.depth - 1)
        steps += [costs.block(family, block, tokens, "masked") for block in between]
        return [*steps, *costs.answer(family, tokens, self.config.exact_last_block, "masked")]

    def dial(self) -> Dial:
        """The factor on all thresholds: from one that drops everything to one that drops nothing.

        A score is a share of the attention, about 1 / (tokens present), so thresholds that keep
        their proportions keep the proportions of the counts.

        Raises:
            ConfigError: the mode is ``mask``, whose cost is the dense model's whatever is kept.
        """
        require(
            self.config.mode != "mask",
            'asvit in mode="mask" computes every token, so nothing changes its cost; calibrate in '
            'mode="adaptive" and change the mode afterwards',
        )
        factor = self.config.threshold_factor
        return Dial("threshold_factor", factor, cheapest=1e4, dearest=1e-4, logarithmic=True)

    def turn(self, value: float) -> None:
        self.config = replace(self.config, threshold_factor=value)

    def starts(self, family: ViT, grid: Grid) -> list[ASViTConfig]:
        """Its own budget, of MACs, leaves the loss for the one in milliseconds."""
        return [replace(self.config, budget_weight=0.0)]

    @classmethod
    def one_stage(cls, config: ASViTConfig, block: int, ratio: float, depth: int) -> ASViTConfig:
        given = config.thresholds
        thresholds = given[0] if isinstance(given, tuple) else given
        return replace(config, stages=(block,), thresholds=thresholds)

    @classmethod
    def follow(cls, config: ASViTConfig, plan: Plan) -> tuple[ASViTConfig, str | None]:
        changes: dict[str, Any] = {"stages": plan.stages}
        if isinstance(config.thresholds, tuple) and len(config.thresholds) != len(plan.stages):
            changes["thresholds"] = None
        if plan.macs is not None:
            changes["budget"] = min(plan.macs, 1.0)
        remark = "the thresholds that keep these shares on average are found on images"
        return replace(config, **changes), remark

    def fit(self, family: ViT, plan: Plan, batches: Sequence[Tensor]) -> None:
        """Thresholds by which as many patches go on from each stage as the plan says, mean over the
        images: a pass over them per stage, as what an earlier one keeps decides what the next sees.
        """
        require(
            self.config.mode == "adaptive",
            f"asvit's mode is {self.config.mode!r}; thresholds are fitted in mode='adaptive', "
            "change the mode afterwards",
        )
        for stage, ratio in enumerate(plan.keep_ratios):
            scores, wanted = list[Tensor](), 0.0
            for images in batches:
                recorder = Recorder(family.grid((images.shape[-2], images.shape[-1])))
                self.infer(family, images.to(self.thresholds[stage].device), recorder)
                found = recorder.stages[stage].scores.cpu()
                scores.append(found[~found.isnan()])
                wanted += len(images) * found.shape[1] * ratio
            falling = torch.cat(scores).sort(descending=True).values
            place = round(wanted)
            if place < len(falling):
                threshold = float(falling[max(place - 1, 0) : place + 1].mean())
            else:  # the stages before have dropped too much already
                threshold = float(falling[-1]) / 2 if len(falling) else 1 / plan.patches
            parameter = self.thresholds[stage]
            parameter.mul_(threshold / self.threshold(stage, plan.patches).to(parameter).item())


def _above(family: ViT, score_BN: Tensor, threshold: Tensor) -> Tensor:
    """(B, N) bool: the tokens above the threshold; the best one at least where the head pools."""
    keep_BN = score_BN > threshold
    return sampling.at_least_best(keep_BN, score_BN) if family.pools_patches else keep_BN


def _without_dropped(tokens: Tokens, score_BN: Tensor) -> Tensor:
    """The scores, below any threshold where a token was dropped."""
    if tokens.keep_BN is None:
        return score_BN
    return score_BN.masked_fill(tokens.keep_BN < 0.5, -math.inf)
