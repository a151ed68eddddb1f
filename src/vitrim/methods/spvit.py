"""SPViT: a multi-head selector drops patch tokens, and a package token keeps what they held.

Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning", ECCV
2022 (arXiv 2112.13890), and the authors' code, which we follow in its last version (one package
token per stage, head attention). Before block ``stages[s]`` a small selector looks at each head's
slice of every token, weighs the heads' opinions token by token, and keeps or drops. What a stage
drops is condensed into one package token, which stays with the prefix tokens: it is attended to,
seen by later selectors, never dropped.

* Training keeps all tokens in memory: a hard Gumbel draw, multiplied by the draws before it, hides
  dropped tokens from attention; the ratio loss holds the kept share of the whole batch at
  ``keep_ratio ** (s + 1)``, so that images may differ.
* Inference drops what is likelier to go than to stay, a number that depends on the image, and
  computes on nothing else. ``inference="top_k"`` keeps exactly ``int(N * keep_ratio ** (s + 1))``.

What differs from the authors' code: inference draws no noise and really removes tokens (theirs
draws and masks; ``inference="gumbel"`` and ``execution="mask"`` are there to compare); any image
size, number of stages and ratio per stage (theirs are fixed); the package is the mean of what a
stage dropped, weighted by the keep scores, as in the authors' other files and, by other people's
notes, the paper (``SPViTConfig.official()`` has the unnormalised sum of their last file); the
masked softmax cannot be poisoned by dropped keys (see ``attention.masked_softmax``). A stage that
drops nothing of an image gives it a zero package token, as the authors' sum does; a stage that
cannot drop anything (a ratio of 1, a threshold of 0) is skipped, and adds none. The latency table
and the search for stages are not in the authors' code. Ours: ``sampling="top_k"`` with
``score_weight``, which adapt a trained model on few unlabelled images.

Published (abstract): DeiT-T in 26 ms on a mobile device, 26 to 41 % less latency than earlier
methods. By other people's notes on the paper: LV-ViT-S 83.1 top-1 at 4.3 GMACs (dense 83.3 at 6.6).
The authors' log for DeiT-S ends at 79.07. We reproduce the forward, losses and gradients of the
code on fixed weights (its masked evaluation lets dropped tokens into LV-ViT's largest patch logit;
ours does not); training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.families import ViT
from vitrim.layers import losses, sampling
from vitrim.layers.selector import Scores, Selector, masked, package_of
from vitrim.layers.stages import check_stages, quarter_stages, stretches
from vitrim.methods.records import Decision, DenseOutput, SelectionOutput, Told
from vitrim.methods.selection import (
    SelectorConfig,
    SelectorMethod,
    check_scores,
    salient_teacher,
    selection_losses,
)
from vitrim.tokens.packed import AnyTokens, select
from vitrim.tokens.plain import Grid, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SPViTConfig(SelectorConfig):
    """How SPViT is set up. The authors keep 0.617, 0.369, 0.137 before blocks 3, 6, 9 of 12."""

    inference: Literal["argmax", "threshold", "top_k", "gumbel"] = "argmax"
    """How inference decides: the likelier class, per image (the paper); a keep score above
    ``threshold``, per image; a fixed number, the likeliest; or, as the authors' code does, a draw
    with noise, here from ``seed``."""
    seed: int = 0
    """Of the noise of ``inference="gumbel"``, which starts afresh in every forward."""
    execution: Literal["gather", "mask"] = "gather"
    """Whether inference removes dropped tokens, or computes on all of them and hides them, as the
    authors' code does: the same logits, no saving, and a shape that no image changes."""
    package_policy: Literal["append", "accumulate"] = "append"
    """Whether each stage brings a package token of its own (the authors' last file), or adds to the
    one that is there (their earlier ones)."""
    sampling: Literal["gumbel", "argmax", "top_k"] = "gumbel"
    """How training decides: a draw with Gumbel noise (the paper); the likelier class; or, ours, a
    fixed number, gathered. Then ``score_weight`` teaches the selectors."""
    score_weight: float = 0.0
    """Ours: weight of a loss that teaches the selectors to keep the tokens that matter most to the
    dense teacher's prediction (``ViT.saliency``), for adapting on few images. Authors: none."""
    score_noise: float = 0.0
    """Ours: with ``sampling="top_k"``, standard deviation of normal noise on a token's log-odds of
    being kept when training chooses, so that the backbone meets other choices. Authors: none."""
    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need: the same logits for
    fewer MACs. False is how the papers execute and count it."""

    def __post_init__(self) -> None:
        SelectorConfig.__post_init__(self)
        check_scores(self)

    @classmethod
    def official(cls, **changes: Any) -> SPViTConfig:
        """The settings of the authors' last code, with ``changes``."""
        fields = {"keep_ratio": (0.617, 0.369, 0.137), "package_mode": "sum"}
        return cls(**fields | changes)


class SPViT(SelectorMethod):
    """The method on a plain vision transformer, and on LV-ViT."""

    name = "spvit"
    config_class = SPViTConfig
    families = ("vit", "eva", "naflex", "lvvit")
    refusals: ClassVar[Mapping[str, str]] = {
        "pit": "its map is pooled between stages; use spvit_pyramid",
        "swin": "its map is merged between stages; use spvit_pyramid",
        "swin_v2": "its map is merged between stages; use dynamic_spatial",
        "convnext": "its selector reads attention heads, ConvNeXt has none; use dynamic_spatial",
    }
    needs_training = "spvit-adapt"
    config: SPViTConfig

    def __init__(
        self, family: ViT, config: SPViTConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        stages = config.stages or quarter_stages(family.depth)
        check_stages(stages, family.depth)
        config.ratios(len(stages))
        self.config = config
        self.stages = stages
        blocks = family.backbone.blocks
        selectors = [
            Selector(family.embed_dim, blocks[block].attn.num_heads, config) for block in stages
        ]
        for selector in selectors:
            selector.reset_parameters(generator)
        self.selectors = nn.ModuleList(selectors)

    def _drops_nothing(self, stage: int, num_patches: int) -> bool:
        """Whether inference is bound to keep everything at ``stage``, which is then skipped."""
        if self.config.inference != "top_k":
            return self.config.inference == "threshold" and self.config.threshold == 0
        counts = self._fixed_counts(num_patches)
        return counts[stage] == (num_patches, *counts)[stage]

    def infer(self, family: ViT, images: Tensor, recorder: Told | None = None) -> Tensor:
        stem = family.stem(images)
        num_patches, noise = stem.num_patches, None
        if self.config.inference == "gumbel":
            noise = torch.Generator(images.device).manual_seed(self.config.seed)
        tokens = cast(AnyTokens, stem)
        *others, last = stretches(self.stages, family.depth)
        for stage, blocks in enumerate(others):
            before = tokens = family.run_blocks(blocks, tokens)
            skips = self._drops_nothing(stage, num_patches)
            if skips and not (recorder and recorder.reads_scores):
                continue
            scores = self._score(family, stage, before)
            if not skips:
                tokens = self._drop(family, stage, before, scores, num_patches, noise)
            if recorder:
                recorder.add(self.stages[stage], before, self._rank(scores), tokens)
        return family.answer(last.start, tokens, self.config.exact_last_block)

    def _score(self, family: ViT, stage: int, tokens: AnyTokens) -> Scores:
        scores: Scores = self.selectors[stage](tokens, tokens.prefix_BPC[:, family.num_prefix :])
        return scores

    def _rank(self, scores: Scores) -> Tensor:
        """What inference compares, in [0, 1]."""
        if self.config.inference == "threshold":
            return scores.keep_score
        return scores.log_probs[..., 0].exp()

    def _drop(
        self,
        family: ViT,
        stage: int,
        tokens: AnyTokens,
        scores: Scores,
        num_patches: int,
        noise: torch.Generator | None,
    ) -> AnyTokens:
        """The tokens that go on in inference, and the package of the others."""
        if self.config.inference == "top_k":
            assert isinstance(tokens, Tokens)
            count = self._fixed_counts(num_patches)[stage]
            return self._keep_best(family, tokens, scores, scores.log_odds, count)
        if self.config.inference == "threshold":
            keep = scores.keep_score > self.config.threshold
        else:
            draw = sampling.hard_keep(scores.log_probs, noise=noise is not None, generator=noise)
            keep = draw > 0.5
        prefix = self._prefix(family, tokens, scores, (~keep).to(scores.keep_score.dtype))
        if self.config.execution == "mask":
            assert isinstance(tokens, Tokens)
            return masked(tokens, keep.to(tokens.x.dtype)).with_prefix(prefix)
        keep_BN = tokens.on_grid(keep, num_patches, False)
        if prefix.shape[1] == tokens.num_prefix:
            return select(tokens.with_prefix(prefix), keep_BN)
        return select(tokens, keep_BN, prefix[:, tokens.num_prefix :])

    def _keep_best(
        self, family: ViT, tokens: Tokens, scores: Scores, ranks: Tensor, count: int
    ) -> Tokens:
        """The ``count`` tokens that rank highest, and the package of the others."""
        if tokens.keep_BN is not None:
            ranks = ranks.masked_fill(tokens.keep_BN < 0.5, -torch.inf)
        best = sampling.top_k(ranks, count)
        keep = torch.zeros_like(ranks).scatter(1, best, 1.0)
        prefix = self._prefix(family, tokens, scores, 1 - keep)
        masks = self.config.execution == "mask" and not self.training
        kept = masked(tokens, keep) if masks else tokens.gather(best)
        return kept.with_prefix(prefix)

    def _prefix(self, family: ViT, tokens: AnyTokens, scores: Scores, dropped: Tensor) -> Tensor:
        """(B, P, C): the prefix tokens with the package of what a stage drops among them."""
        prefix = tokens.prefix_BPC
        package = package_of(tokens, scores, dropped, self.config.package_mode).unsqueeze(1)
        if self.config.package_policy == "accumulate" and prefix.shape[1] > family.num_prefix:
            return torch.cat([prefix[:, :-1], prefix[:, -1:] + package], 1)
        return torch.cat([prefix, package], 1)

    def train_forward(
        self,
        family: ViT,
        images: Tensor,
        generator: torch.Generator | None = None,
        recorder: Told | None = None,
    ) -> SelectionOutput:
        tokens = family.stem(images)
        num_patches = tokens.num_patches
        decisions: list[Decision] = []
        for block in range(family.depth):
            if block in self.stages:
                before, stage = tokens, len(decisions)
                scores = self._score(family, stage, before)
                tokens = self._draw(family, stage, before, scores, num_patches, generator)
                if recorder:
                    recorder.add(block, before, self._rank(scores), tokens)
                keep_BN = tokens.keep_on_grid(num_patches)
                decisions.append(Decision(scores.log_probs, before, keep_BN))
            tokens = family.run_blocks((block,), tokens)
        logits, features = family.training_head(tokens), family.patch_features(tokens)
        return SelectionOutput(logits, features, tokens, tuple(decisions), family.token_loss)

    def _draw(
        self,
        family: ViT,
        stage: int,
        tokens: Tokens,
        scores: Scores,
        num_patches: int,
        generator: torch.Generator | None,
    ) -> Tokens:
        """The tokens that go on in training: under a mask, or gathered as at inference."""
        config = self.config
        if config.sampling == "top_k":
            count = self._fixed_counts(num_patches)[stage]
            if count == tokens.num_patches:
                return tokens
            ranks = sampling.with_noise(scores.log_odds, config.score_noise, generator)
            return self._keep_best(family, tokens, scores, ranks, count)
        keep_BN = sampling.hard_keep(
            scores.log_probs,
            noise=config.sampling == "gumbel",
            temperature=config.temperature,
            generator=generator,
        )
        prefix = self._prefix(family, tokens, scores, 1 - keep_BN)
        return masked(tokens, keep_BN).with_prefix(prefix)

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
        terms = [losses.batch_ratio_loss(decision.keep_BN, ratio) for decision, ratio in pairs]
        return {"ratio": torch.stack(terms).mean()}

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches, prefix = math.prod(grid), family.num_prefix
        steps = [costs.stem(family, num_patches)]
        patches: Any = num_patches
        part = "block"
        for block in range(family.depth):
            if block in self.stages:
                stage = self.stages.index(block)
                if not self._drops_nothing(stage, num_patches):
                    packages, tokens = prefix - family.num_prefix, patches + prefix
                    macs = self.selectors[stage].macs(patches, packages)  # type: ignore[operator]
                    steps.append(costs.select(self.name, block, tokens, macs, self.images_decide))
                    if packages == 0 or self.config.package_policy == "append":
                        prefix += 1
                    part = "masked" if self.config.execution == "mask" else "block"
                if self.config.execution == "gather":
                    patches = counts[stage]
            if block < family.depth - 1:
                steps.append(costs.block(family, block, patches + prefix, part))
        exact, packages = self.config.exact_last_block, prefix - family.num_prefix
        return [*steps, *costs.answer(family, patches + prefix, exact, part, packages)]
