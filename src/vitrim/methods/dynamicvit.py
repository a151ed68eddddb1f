"""DynamicViT: learned predictors drop patch tokens before chosen blocks.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS
2021 (arXiv 2106.02034), and the authors' code, which differs from the text in places; where they
differ we follow the code. Before block ``stages[s]`` a small predictor scores the patch tokens.

* Training keeps all tokens in memory: a hard Gumbel draw per token, multiplied by the draws before
  it, hides dropped tokens from attention (section 3.3); the ratio loss holds the kept share at
  ``keep_ratio ** (s + 1)``.
* Inference keeps exactly ``int(N * keep_ratio ** (s + 1))`` of the N original patches, the best
  scored, and computes on nothing else.

What differs from the authors' code: any image size, number of stages and ratio per stage; the
masked softmax cannot be poisoned by dropped keys (see ``attention.masked_softmax``); the pooling
of the predictor stays finite when an image keeps nothing; ``topk`` instead of a full sort; blocks
before the first stage run plain attention in training (theirs is the same up to 1e-6); class 0 is
"keep", as in their code (the text says 1). Ours: ``threshold``, a count that depends on the image;
``sampling="top_k"`` with ``score_weight``, which adapt a trained model on few unlabelled images.

Published (top-1 at GMACs, r = 0.7): DeiT-S 79.3 at 2.9, DeiT-B 81.3 at 11.2, DeiT-256 76.5 at 1.3,
LV-ViT-S 83.0 at 4.6, LV-ViT-M 83.8 at 8.5. We reproduce the costs (2.981, 11.476, 1.375, 4.650,
8.593; theirs is a hand count) and the forward, losses and gradients of the code on fixed weights;
training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.costs.macs import linear_macs
from vitrim.families import ViT
from vitrim.layers import dropping, losses, sampling
from vitrim.layers.merging import Moves
from vitrim.layers.predictor import Predictor
from vitrim.layers.stages import check_stages, quarter_stages, stretches
from vitrim.methods.base import RatioMethod
from vitrim.methods.records import Decision, DenseOutput, SelectionOutput, Told
from vitrim.methods.selection import RatioConfig, check_scores, salient_teacher, selection_losses
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Grid, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicViTConfig(RatioConfig):
    """How DynamicViT is set up. The paper's ratio rule: r, r^2, r^3; its stages: 3, 6, 9 of 12
    blocks, 4, 8, 12 of 16, 5, 10, 15 of 20. The authors use ``ratio_weight=5`` for DeiT-B.
    """

    threshold: float | None = None
    """Keep the tokens whose keep probability is above this, a count that depends on the image,
    instead of a fixed count. Between 0 and 1; None (the paper) keeps fixed counts."""
    sampling: Literal["gumbel", "argmax", "top_k"] = "gumbel"
    """How training decides: a draw with Gumbel noise (the paper); the likelier class; or, ours,
    exactly as inference does, gathering the best. Then only ``score_weight`` teaches the
    predictors."""
    score_weight: float = 0.0
    """Ours: weight of a loss that teaches the predictors to keep the tokens that matter most to
    the dense teacher's prediction (``ViT.saliency``), for adapting on few images. Paper: none."""
    score_noise: float = 0.0
    """Ours: with ``sampling="top_k"``, standard deviation of normal noise on a token's log-odds of
    being kept when training chooses, so that the backbone meets other choices. Paper: none."""
    merge_dropped: bool = False
    """Ours: merge what is dropped into the kept token that is most like it, which counts in
    attention as the patches that it stands for; see ``layers.dropping``. Paper: gone is gone."""
    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need: the same logits for
    fewer MACs. False is how the papers execute and count it."""

    def __post_init__(self) -> None:
        RatioConfig.__post_init__(self)
        threshold = self.threshold
        require(
            threshold is None or 0 <= threshold < 1,
            f"threshold is {threshold}; expected a probability in [0, 1), or None",
        )
        check_scores(self)


class DynamicViT(RatioMethod):
    """The method on a plain vision transformer, and on LV-ViT."""

    name = "dynamicvit"
    config_class = DynamicViTConfig
    families = ("vit", "eva", "naflex", "lvvit")
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("swin", "swin_v2", "convnext"),
        "it drops tokens, and theirs stand in a map; use dynamic_spatial",
    ) | {"pit": "what it drops is gone, and PiT pools a whole map; use spvit_pyramid"}
    needs_training = "dynamicvit-adapt"
    fixed_by = "threshold=None"
    config: DynamicViTConfig

    def __init__(
        self, family: ViT, config: DynamicViTConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        stages = config.stages or quarter_stages(family.depth)
        check_stages(stages, family.depth)
        config.ratios(len(stages))
        self.config = config
        self.stages = stages
        predictors = [Predictor(family.embed_dim) for _ in stages]
        for predictor in predictors:
            predictor.reset_parameters(generator)
        self.predictors = nn.ModuleList(predictors)

    @classmethod
    def decides(cls, config: DynamicViTConfig) -> bool:
        return config.threshold is not None

    @classmethod
    def kinds(cls) -> tuple[DynamicViTConfig, ...]:
        return tuple(
            DynamicViTConfig(threshold=threshold, merge_dropped=merge)
            for merge in (False, True)
            for threshold in (None, 0.5)
        )

    def infer(self, family: ViT, images: Tensor, recorder: Told | None = None) -> Tensor:
        stem = family.stem(images)
        tokens = cast(AnyTokens, stem)
        *others, last = stretches(self.stages, family.depth)
        for stage, blocks in enumerate(others):
            tokens = family.run_blocks(blocks, tokens)
            tokens = self._drop(family, tokens, stage, stem.num_patches, recorder)
        return family.answer(last.start, tokens, self.config.exact_last_block)

    def _drop(
        self,
        family: ViT,
        tokens: AnyTokens,
        stage: int,
        num_patches: int,
        recorder: Told | None,
    ) -> AnyTokens:
        """The tokens that go on: the best of a fixed number, or those above the threshold."""
        merge, moves = self.config.merge_dropped, None
        if self.config.threshold is not None:
            score = self.predictors[stage](tokens)[..., 0].exp()
            score_BN = tokens.on_grid(score, num_patches, -1.0)
            keep_BN = score_BN > self.config.threshold
            if family.pools_patches:
                keep_BN = sampling.at_least_best(keep_BN, score_BN)
            kept, moves = dropping.keep_chosen(tokens, keep_BN, merge)
        else:
            assert isinstance(tokens, Tokens)
            count = self._fixed_counts(num_patches)[stage]
            if count == tokens.num_patches and not (recorder and recorder.reads_scores):
                return tokens
            log_keep = self.predictors[stage](tokens)[..., 0]
            score, kept = log_keep.exp(), tokens
            if count < tokens.num_patches:
                kept, moves = dropping.keep_best(tokens, log_keep, count, merge)
        if recorder:
            recorder.add(self.stages[stage], tokens, score, kept, moves)
        return kept

    def train_forward(
        self,
        family: ViT,
        images: Tensor,
        generator: torch.Generator | None = None,
        recorder: Told | None = None,
    ) -> SelectionOutput:
        tokens = family.stem(images)
        num_patches = tokens.num_patches
        counts = self._fixed_counts(num_patches)
        decisions: list[Decision] = []
        for block in range(family.depth):
            if block in self.stages:
                stage = len(decisions)
                log_probs = self.predictors[stage](tokens)
                before = tokens
                tokens, moves = self._draw(before, log_probs, counts[stage], generator)
                if recorder:
                    recorder.add(block, before, log_probs[..., 0].exp(), tokens, moves)
                decisions.append(Decision(log_probs, before, tokens.keep_on_grid(num_patches)))
            tokens = family.run_blocks((block,), tokens)
        logits, features = family.training_head(tokens), family.patch_features(tokens)
        return SelectionOutput(logits, features, tokens, tuple(decisions), family.token_loss)

    def _draw(
        self, tokens: Tokens, log_probs: Tensor, count: int, generator: torch.Generator | None
    ) -> tuple[Tokens, Moves | None]:
        """The tokens that go on in training: under a mask, or gathered as at inference; and what
        became of the others.
        """
        merge = self.config.merge_dropped
        if self.config.sampling == "top_k":
            log_odds = log_probs[..., 0] - log_probs[..., 1]
            log_odds = sampling.with_noise(log_odds, self.config.score_noise, generator)
            return dropping.keep_best(tokens, log_odds, count, merge)
        keep_BN = sampling.hard_keep(
            log_probs,
            noise=self.config.sampling == "gumbel",
            temperature=self.config.temperature,
            generator=generator,
        )
        keep_BN = keep_BN if tokens.keep_BN is None else tokens.keep_BN * keep_BN
        return dropping.hide(tokens, keep_BN, merge)

    def teach(self, family: ViT, images: Tensor) -> DenseOutput:
        if not self.config.score_weight:
            return super().teach(family, images)
        return salient_teacher(family, images, self.stages)

    def losses(
        self, output: SelectionOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        counts = self._fixed_counts(output.decisions[0].keep_BN.shape[1])
        own = self.own_losses(output)
        return selection_losses(self.config, output, own, target, teacher, counts)

    def own_losses(self, output: SelectionOutput) -> dict[str, Tensor]:
        pairs = zip(output.decisions, self.config.ratios(len(self.stages)), strict=True)
        terms = [losses.ratio_loss(decision.keep_BN, ratio) for decision, ratio in pairs]
        return {"ratio": torch.stack(terms).mean()}

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches, prefix = math.prod(grid), family.num_prefix
        steps = [costs.stem(family, num_patches)]
        patches: Any = num_patches
        for block in range(family.depth):
            if block in self.stages:
                stage = self.stages.index(block)
                macs = linear_macs(self.predictors[stage]) * patches
                if self.images_decide or not _is_same_count(counts[stage], patches):
                    tokens = patches + prefix
                    if self.config.merge_dropped:
                        macs += costs.matching_macs(family, patches, counts[stage])
                    name, adaptive = self.select_name, self.images_decide
                    steps.append(costs.select(name, block, tokens, macs, adaptive))
                patches = counts[stage]
            if block < family.depth - 1:
                steps.append(costs.block(family, block, patches + prefix))
        exact = self.config.exact_last_block
        return [*steps, *costs.answer(family, patches + prefix, exact)]


def _is_same_count(after: Any, before: Any) -> bool:
    """Whether a fixed-count stage keeps everything, in which case its predictor is skipped."""
    if isinstance(after, Tensor) or isinstance(before, Tensor):
        return bool(torch.as_tensor(after == before).all())
    return bool(after == before)
