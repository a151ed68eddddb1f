"""SaiT: one pruning layer, read off the attention; one set of weights at any density.

Li, Thorsley, Hassoun, "SaiT: Sparse Vision Transformers through Adaptive Token Pruning", 2022
(arXiv 2210.05832). There is no code by the authors. SaiT here follows the published abstract and
the text of the related patent: a single pruning layer, whose token importance score (TIS) decides
which patch tokens go on; training that alternates by epoch between dense and sparse; distillation
of the teacher's class token to the TIS; a number of kept tokens that depends on the image; and a
density that changes at run time, with the dense model, unchanged, as the lossless end.

This library's choices, as what we read does not say: the formula of the score, the selectors and
their names, the place of the layer, the draw of the density, the form and weights of the losses,
counting epochs from 1 (so that the first is dense), the schedules other than by epoch, and the
recipes. No table of the paper is reproduced.

* *Value-based* selectors keep a fixed number of tokens (``density``) or those whose score is above
  a share of the uniform one (``threshold``); the *mass-based* one (``mass``) the smallest set whose
  scores reach it; all scores sum to 1.
* No parameters are added, so any trained timm model can be used as it is, without training. Scores
  by the class token read one row of one block's attention beside the fused kernel; the others need
  one more ``q k^T`` (0.5 % of DeiT-S). Without a class token, the mean over all tokens is taken.
* Defaults were compared without training, on 200 images of ImageNet's training set at 0.65 of the
  dense MACs, by the KL to the dense model. Dropping mid-block beat dropping at the block's end in
  every pair (mean received attention after 4 of 12 blocks: DeiT-T 0.12 and 0.15, ViT-T 0.16 and
  0.20), and 4 blocks beat 3 (0.20, 0.19). No score wins on both models (class attention times the
  value's norm: 0.11, 0.21), and no selector stands out. Dropping a little in each of nine blocks
  gives 0.08 and 0.12: a single layer is what the method is, not the cheapest way.

Published (abstract): 39 to 43 % fewer FLOPs and 67 to 91 % more throughput for less than 0.5 %
accuracy, for various vision transformers. A granted patent of Samsung (US 12,299,960 B2, with
US 2023/0368494 A1 and EP 4276695 A1) describes adaptive token pruning of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vitrim import costs
from vitrim.config import check_weights, closest, normalise, require
from vitrim.errors import ConfigError
from vitrim.families import ViT
from vitrim.layers import dropping, losses
from vitrim.layers.merging import Moves
from vitrim.layers.token_scores import SCORES, on_grid
from vitrim.methods.base import SHARES, Method, require_one_stage, with_total
from vitrim.methods.records import DenseOutput, Dial, Plan, Told, TrainingOutput
from vitrim.tokens.graphs import exporting
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Grid, Tokens
from vitrim.tokens.projections import width_of

EPS = 1e-8
Selector = Literal["density", "threshold", "mass"]
Random = torch.Generator | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SaiTConfig:
    """How SaiT is set up. Ours, unless a field says otherwise."""

    prune_after: int | None = None
    """P, the pruning layer: tokens are scored in the P-th block (number P - 1, counted from 0) and
    blocks from number P on see the kept ones. That there is one such layer is the patent's; None
    takes a third of the depth, 4 of 12 blocks."""
    where: Literal["mid", "end"] = "mid"
    """Drop in the middle of the pruning block, between attention and MLP, or at its end."""
    score: str = "mean_received"
    """A name in ``SCORES``: ``mean_received``, ``cls``, ``cls_value_norm``, ``head_max``."""
    selector: Literal["density", "threshold", "mass", "dense"] = "mass"
    """Which of the next three fields decides what inference keeps; ``dense`` keeps everything."""
    density: float = 0.5
    """Share of the patch tokens that is kept, rounded up to whole tokens."""
    threshold: float = 1.0
    """Keep the tokens whose score is at least this many times the uniform score, 1 / N."""
    mass: float = 0.6
    """Keep the smallest set of tokens whose scores sum to this; 1 keeps all. The default costs
    about 0.63 of a dense DeiT-T."""
    min_kept: int = 16
    """Tokens that ``threshold`` and ``mass`` keep in any case."""
    max_kept: int | None = None
    """Tokens that ``threshold`` and ``mass`` keep at most; None sets no limit."""
    merge_dropped: bool = False
    """Ours: merge what is dropped into the kept token that is most like it, which counts in
    attention as the patches that it stands for; see ``layers.dropping``."""
    schedule: Literal["per_epoch", "per_iteration", "sandwich", "sparse"] = "per_epoch"
    """When training is dense: in odd epochs, counted from 1 (the patent's); in every other step;
    in each step, beside a sparse pass; or never."""
    train_selector: Selector = "density"
    """How sparse passes of training select; ``density`` stands for ``train_density``."""
    train_density: float | tuple[float, ...] = (0.3, 0.7)
    """Density of a sparse pass: drawn per batch between two numbers, or one fixed number."""
    classification_weight: float = 1.0
    """Weight of the cross entropy."""
    attention_weight: float = 1.0
    """Weight of KL(teacher's class attention || score). The term is the patent's, in dense and
    sparse passes alike; its form and weight are ours, and not tuned."""
    attention_direction: Literal["forward", "reverse"] = "forward"
    """``reverse`` swaps the two sides of that divergence."""
    attention_temperature: float = 1.0
    """Both sides of that divergence are raised to 1 / this, and normalised again."""
    teacher_block: int = -1
    """Block of the teacher whose class attention is taught; from the end if negative."""
    distill_weight: float = 0.0
    """Weight of KL(teacher || student) on the logits."""
    exact_last_block: bool = True
    """Whether the last block computes only what a class token's logits need; papers count all."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        require(
            self.score in SCORES,
            f"score is {self.score!r}{closest(self.score, SCORES)}; known: {', '.join(SCORES)}",
        )
        place = self.prune_after
        require(place is None or place > 0, f"prune_after is {place}; expected 1 or more blocks")
        for name in ("density", "mass"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name} is {value}; expected a number in (0, 1]")
        require(
            0 <= self.threshold < math.inf, f"threshold is {self.threshold}; expected 0 or more"
        )
        low, high = self.density_range
        require(
            0 < low <= high <= 1,
            f"train_density is {self.train_density}; expected a number in (0, 1], or the smaller "
            "and the larger of two",
        )
        least, most = self.min_kept, self.max_kept
        require(least >= 0, f"min_kept is {least}; expected 0 or more")
        require(
            most is None or most >= max(least, 1),
            f"max_kept is {most}; expected at least 1, and min_kept = {least} or more",
        )
        require(
            self.attention_temperature > 0,
            f"attention_temperature is {self.attention_temperature}; expected more than 0",
        )
        check_weights(self, "classification", "attention", "distill")

    @property
    def density_range(self) -> tuple[float, float]:
        """Smallest and largest density of a sparse pass of training."""
        if not isinstance(self.train_density, tuple):
            return self.train_density, self.train_density
        require(
            len(self.train_density) == 2,
            f"train_density is {self.train_density}; expected one number, or two",
        )
        return self.train_density[0], self.train_density[1]


@dataclass(frozen=True)
class SaiTOutput(TrainingOutput):
    """A training forward; ``logits`` are those of the sparse pass where there is one."""

    score_BN: Tensor
    """The token importance score: sums to 1, with gradients."""
    kept: Tokens | None
    """What went on from the pruning block in the sparse pass; None in a dense step."""
    dense_logits: Tensor | None
    """(B, classes) of the dense pass beside a sparse one; else None."""
    grid: tuple[int, int]
    """Rows and columns of the patch grid."""


Chosen = tuple[AnyTokens, Moves | None]  # what goes on, and what went into what
Choose = Callable[[Tokens, Tensor], Chosen]  # by the score (B, N)


class SaiT(Method):
    """The method on a plain vision transformer, and on LV-ViT."""

    name = "sait"
    config_class = SaiTConfig
    families = ("vit", "eva", "naflex", "lvvit")
    refusals: ClassVar[Mapping[str, str]] = {
        "pit": "what it drops is gone, and PiT pools a whole map; use spvit_pyramid",
        "swin_v2": "it scores by attention among all tokens; use dynamic_spatial",
        "swin": "it scores by attention among all tokens; use dynamic_spatial or stvit_r",
        "convnext": "it scores by attention, and ConvNeXt has none; use dynamic_spatial",
    }
    serves_dense = True
    follows_schedules = True
    most_stages = 1
    config: SaiTConfig

    def __init__(
        self, family: ViT, config: SaiTConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depth = family.depth
        place = max(1, depth // 3) if config.prune_after is None else config.prune_after
        require(
            place < depth,
            f"prune_after is {place}; the backbone has {depth} blocks, so at most {depth - 1} of "
            "them can come before the pruning",
        )
        self.config = config
        self.stages = (place,)
        self.has_class = family.has_class
        self.pools_patches = family.pools_patches
        self.sparse_turn = True
        """Whether the schedule is at a sparse pass; so until a training loop says otherwise."""

    @classmethod
    def kinds(cls) -> tuple[SaiTConfig, ...]:
        return tuple(
            SaiTConfig(selector=selector, merge_dropped=merge)
            for merge in (False, True)
            for selector in ("density", "mass")
        )

    @property
    def score_name(self) -> str:
        score = SCORES[self.config.score]
        if self.has_class or not score.of_class:
            return score.words.format(attention="the class token")
        return score.words.format(attention="all tokens") + " (the backbone has no class token)"

    def whole_last_block(self, family: ViT) -> str | None:
        dense = self.config.selector == "dense"
        return "dense is the timm model bit for bit" if dense else super().whole_last_block(family)

    def counts(self, family: ViT, grid: Grid) -> tuple[int, ...] | None:
        return self._counts(math.prod(grid))

    def _counts(self, num_patches: int) -> tuple[int, ...] | None:
        if self.config.selector == "dense":
            return (num_patches,)
        if self.config.selector == "density":
            return (_count(self.config.density, num_patches),)
        return None

    def infer(self, family: ViT, images: Tensor, recorder: Told | None = None) -> Tensor:
        stem = family.stem(images)
        counts = self._counts(stem.num_patches)
        if counts == (stem.num_patches,) and not (recorder and recorder.reads_scores):
            return family.answer(0, stem, self.whole_last_block(family) is None)

        def choose(tokens: Tokens, score_BN: Tensor) -> Chosen:
            merge = self.config.merge_dropped
            if counts is None:
                return dropping.keep_chosen(tokens, self._chosen(score_BN), merge)
            if counts[0] < tokens.num_patches:
                return dropping.keep_first(tokens, _ranking(score_BN), counts[0], merge)
            return tokens, None

        before = family.run_blocks(range(self.stages[0] - 1), stem)
        return self._finish(family, before, choose, recorder)[0]

    def _finish(
        self, family: ViT, before: Tokens, choose: Choose, recorder: Told | None = None
    ) -> tuple[Tensor, Tensor, AnyTokens]:
        """Logits, the score, and what goes on of the tokens ``before`` the block that scores."""
        read = SCORES[self.config.score].read
        chosen: list[tuple[Tensor, AnyTokens]] = []

        def between(tokens: AnyTokens, score_BN: Tensor) -> AnyTokens:
            assert isinstance(tokens, Tokens)
            score_BN = score_BN.float() / score_BN.float().sum(1, keepdim=True).clamp(min=EPS)
            kept, moves = choose(tokens, score_BN)
            if recorder:
                recorder.add(self.stages[0], tokens, score_BN, kept, moves)
            chosen.append((score_BN, kept))
            return kept

        block = self.stages[0] - 1
        if self.config.where == "mid":
            tokens, _ = family.split_block(block, before, read, between)
        else:
            tokens = between(*family.split_block(block, before, read))
        logits = family.answer(self.stages[0], tokens, self.whole_last_block(family) is None)
        return logits, *chosen[0]

    def _chosen(self, score_BN: Tensor) -> Tensor:
        """(B, N) bool: what an adaptive selector keeps."""
        order_BN = _ranking(score_BN)
        keep_BN = self._ranks_kept(score_BN.gather(1, order_BN), self.config.selector)
        return torch.zeros_like(keep_BN).scatter(1, order_BN, keep_BN)

    def _ranks_kept(self, falling_BN: Tensor, selector: str) -> Tensor:
        """(B, N) bool: which ranks an adaptive ``selector`` keeps of the scores from best to worst;
        always the head of each row.
        """
        num_patches = falling_BN.shape[1]
        if selector == "mass":
            mass = self.config.mass if self.config.mass < 1 else math.inf
            keep_BN = falling_BN.cumsum(1) - falling_BN < mass
        else:
            keep_BN = falling_BN * num_patches >= self.config.threshold
        rank_N = torch.arange(num_patches, device=falling_BN.device)
        least = max(self.config.min_kept, int(self.pools_patches))  # an empty pool has no mean
        most = self.config.max_kept or num_patches
        return (keep_BN | (rank_N < least)) & (rank_N < most)

    def begin_epoch(self, epoch: int) -> None:
        if self.config.schedule == "per_epoch":
            self.sparse_turn = epoch % 2 == 1  # counted from 0 here: the first epoch is dense

    def begin_step(self, step: int) -> None:
        if self.config.schedule == "per_iteration":
            self.sparse_turn = step % 2 == 1

    def train_forward(
        self, family: ViT, images: Tensor, generator: Random = None, recorder: Told | None = None
    ) -> SaiTOutput:
        before = family.run_blocks(range(self.stages[0] - 1), family.stem(images))
        grid = family.grid((images.shape[-2], images.shape[-1]))
        schedule = self.config.schedule
        sparse = self.sparse_turn or schedule in ("sandwich", "sparse")
        dense_logits = None
        if not sparse or schedule == "sandwich":
            dense_logits, score_BN, _ = self._finish(
                family, before, lambda tokens, _: (tokens, None)
            )
            if not sparse:
                return SaiTOutput(dense_logits, score_BN, None, None, grid)
        draw = partial(self._draw, generator=generator)
        logits, score_BN, kept = self._finish(family, before, draw, recorder)
        assert isinstance(kept, Tokens)
        return SaiTOutput(logits, score_BN, kept, dense_logits, grid)

    def _draw(self, tokens: Tokens, score_BN: Tensor, generator: Random) -> Chosen:
        """What goes on in a sparse pass of training; images that keep fewer are padded, masked."""
        order_BN, merge = _ranking(score_BN), self.config.merge_dropped
        if self.config.train_selector == "density":
            low, high = self.config.density_range
            device = None if generator is None else generator.device
            share = torch.rand((), generator=generator, device=device).item()
            count = _count(low + share * (high - low), tokens.num_patches)
            return dropping.keep_first(tokens, order_BN, count, merge)
        keep_BN = self._ranks_kept(score_BN.gather(1, order_BN), self.config.train_selector)
        longest, keep_BN = int(keep_BN.sum(1).max()), keep_BN.to(tokens.x.dtype)
        kept = tokens.gather(order_BN[:, :longest]).with_keep(keep_BN[:, :longest])
        if not merge:
            return kept, None
        return dropping.absorb(kept, tokens.gather(order_BN).with_keep(1 - keep_BN))

    @torch.no_grad()
    def teach(self, family: ViT, images: Tensor) -> DenseOutput:
        """The dense model's logits, and the class attention of its block ``teacher_block``."""
        depth, block = family.depth, self.config.teacher_block
        require(
            -depth <= block < depth,
            f"teacher_block is {block}; the teacher has blocks 0 to {depth - 1}",
        )
        block %= depth
        before = family.run_blocks(range(block), family.stem(images))
        tokens, attention = family.split_block(
            block, before, lambda record: record.patch_attention().mean(1)
        )
        assert isinstance(tokens, Tokens)
        tokens = family.run_blocks(range(block + 1, depth), tokens)
        features = family.patch_features(tokens)
        return DenseOutput(family.head(tokens), features, patch_attention=attention)

    def losses(
        self, output: SaiTOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        config, parts = self.config, dict[str, Tensor]()
        passes = [each for each in (output.logits, output.dense_logits) if each is not None]
        if target is not None:
            terms = [losses.classification_loss(logits, target) for logits in passes]
            parts["classification"] = torch.stack(terms).mean()
        if teacher is not None:
            parts["attention"] = self._attention_loss(output, teacher)
            if config.distill_weight:
                terms = [losses.distillation_loss(logits, teacher.logits) for logits in passes]
                parts["distill"] = torch.stack(terms).mean()
        require(len(parts) > 0, "SaiT learns from labels or from a dense teacher; give either")
        return with_total(config, parts)

    def _attention_loss(self, output: SaiTOutput, teacher: DenseOutput) -> Tensor:
        """KL of the teacher's class attention and the student's score, both summing to 1."""
        if teacher.patch_attention is None:
            raise ConfigError(
                "SaiT's loss needs a teacher's class attention; take the teacher from method.teach"
            )
        taught = on_grid(teacher.patch_attention.float(), output.grid)
        sides = [
            side.clamp(min=EPS).log() / self.config.attention_temperature
            for side in (output.score_BN, taught)
        ]
        if self.config.attention_direction == "reverse":
            sides.reverse()
        return losses.distillation_loss(*sides)

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches, block = math.prod(grid), self.stages[0] - 1
        exact = self.whole_last_block(family) is None
        if self._counts(num_patches) == (num_patches,):
            return costs.plain_steps(family, grid, exact)
        tokens, kept = num_patches + family.num_prefix, counts[0] + family.num_prefix
        steps = [costs.stem(family, num_patches)]
        steps += [costs.block(family, index, tokens) for index in range(block)]
        steps += self._select_steps(family, block, tokens, kept)
        steps += [costs.block(family, index, kept) for index in range(block + 1, family.depth - 1)]
        return [*steps, *costs.answer(family, kept, exact)]

    def _select_steps(self, family: ViT, block: int, tokens: int, kept: Any) -> list[costs.Step]:
        """The block at the point of pruning: tokens are scored, and the others leave it."""
        one_row = SCORES[self.config.score].of_class and self.has_class
        macs = costs.attention_macs(family, block, tokens)
        macs += width_of(family.backbone.blocks[block].attn) * tokens * (1 if one_row else tokens)
        if self.config.merge_dropped:
            prefix = family.num_prefix
            macs += costs.matching_macs(family, tokens - prefix, kept - prefix)
        adaptive = self.config.selector != "density"
        in_the_middle = self.config.where == "mid"
        macs += 0 if in_the_middle else family.mlp_macs(block, tokens)
        select = costs.select(self.select_name, block + 1, tokens, macs, adaptive)
        return [select, costs.mlp(family, block, kept)] if in_the_middle else [select]

    def dial(self) -> Dial:
        """The field that the selector in use goes by."""
        config = self.config
        if config.selector == "density":
            return Dial("density", config.density, cheapest=1e-3, dearest=1.0)
        if config.selector == "threshold":
            return Dial("threshold", config.threshold, 100.0, 1e-6, logarithmic=True)
        if config.selector == "mass":
            return Dial("mass", config.mass, cheapest=1e-3, dearest=1.0)
        raise ConfigError(
            "the model is set to be dense, which has one cost; set a density, or a selector with "
            'method.set_selector("mass")'
        )

    def turn(self, value: float) -> None:
        self.set_selector(self.dial().name, value)

    def set_selector(self, selector: str, value: float | None = None) -> None:
        """Select in another way from now on, without any change to the weights.

        Args:
            selector: ``density``, ``threshold``, ``mass`` or ``dense``.
            value: of the config field of that name; None leaves it as it is.
        """
        changed = {} if value is None or selector == "dense" else {selector: value}
        self.config = replace(self.config, selector=selector, **changed)  # type: ignore[arg-type]

    def set_density(self, density: float | None) -> None:
        """Keep this share of the patch tokens from now on; None is the dense model."""
        self.set_selector("dense" if density is None else "density", density)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """The same as :meth:`set_density`: there is one stage, and so one ratio."""
        if isinstance(keep_ratio, Sequence):
            raise ConfigError(f"SaiT drops tokens once; give one keep ratio, not {keep_ratio}")
        self.set_density(keep_ratio)

    def starts(self, family: ViT, grid: Grid) -> list[SaiTConfig]:
        """A density; another selector is calibrated whenever a result is saved."""
        if self.config.selector != "density":
            return [self.config]
        return [replace(self.config, density=share) for share in SHARES]

    @classmethod
    def one_stage(cls, config: SaiTConfig, block: int, ratio: float, depth: int) -> SaiTConfig:
        return replace(config, prune_after=block)

    @classmethod
    def says_where(cls, config: SaiTConfig) -> bool:
        return config.prune_after is not None

    @classmethod
    def follow(cls, config: SaiTConfig, plan: Plan) -> tuple[SaiTConfig, str | None]:
        require_one_stage(plan, "sait drops tokens once")
        density = plan.counts[0] / plan.patches
        (place,) = plan.stages
        return replace(config, prune_after=place, selector="density", density=density), None

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within this context the model is the dense one."""
        config = self.config
        self.set_density(None)
        try:
            yield
        finally:
            self.config = config


def _ranking(score_BN: Tensor) -> Tensor:
    """(B, N): positions from best to worst; of equal scores the earlier position first."""
    if exporting():  # runtimes know no stable sort
        return score_BN.topk(score_BN.shape[1], dim=1).indices
    return score_BN.argsort(dim=1, descending=True, stable=True)


def _count(density: float, num_patches: int) -> int:
    """The density in whole tokens, rounded up; 0.55 of 100 are 55, whatever floats say."""
    return max(1, math.ceil(density * num_patches - 1e-9))
