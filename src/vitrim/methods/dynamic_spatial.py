"""Dynamic spatial sparsification: learned predictors send map positions down a cheap path.

Rao et al., "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional
Neural Networks", T-PAMI 2023 (arXiv 2207.01580): what DynamicViT becomes on a hierarchical
backbone, which needs its whole map. Of the paper we read the abstract; all else follows the
authors' code. In the third stage of Swin or ConvNeXt a small predictor stands before each block of
``stages``. From the first of them to the end of the stage, the chosen positions take a block's own
MLP (the slow path) and the others one linear layer (the fast path); window attention and depthwise
convolution stay dense. Each choice is made among all positions: one may come back.

* Training keeps two maps, of all positions on either path, and merges them by a hard Gumbel draw
  per position where positions mix; the ratio loss holds the chosen share at ``ratios``.
* Inference chooses exactly ``int(N * ratio)`` of the N positions, the best scored, and computes the
  MLP of nothing else.

After a position changed its path the two differ: training goes on with the map that had been in
the shadow, where inference has one map only. This is the method as released, and ours.

What differs from the authors' code: any image size, number of predictors and ratio per predictor;
batches of two images, at which theirs fails on Swin; one gather instead of index pairs per path.
At inference on a CPU the MLPs of all other blocks run on slices of the map, which gives the same
numbers and saves time that dense timm models could save too.

Published (top-1 at GMACs, r = 0.7): Swin-T/S/B 80.91 / 83.21 / 83.43 at 4.0 / 6.9 / 12.1,
ConvNeXt-T/S/B 81.59 / 82.57 / 83.45 at 3.6 / 5.8 / 10.2. We reproduce the costs (4.041 / 6.846 /
12.063 and 3.579 / 5.772 / 10.177; theirs count norms too) and the forward, losses and gradients of
the code on fixed weights; training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.costs.macs import linear_macs
from vitrim.families import ConvNeXt, Swin
from vitrim.layers import losses
from vitrim.layers.predictor import Predictor
from vitrim.layers.sampling import hard_keep
from vitrim.layers.stages import check_stages
from vitrim.methods.base import RatioMethod, with_total
from vitrim.methods.records import DenseOutput, FeatureOutput, Recorder, TrainingOutput
from vitrim.methods.selection import RatioConfig
from vitrim.tokens.calls import bare, is_hooked
from vitrim.tokens.feature_map import (
    FeatureMap,
    Partition,
    add_in_slices,
    pays_in_slices,
    share_of,
)
from vitrim.tokens.plain import Grid, Sizes

STEP = 0.2
"""How much less each predictor's ratio is than the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicSpatialConfig(RatioConfig):
    """How dynamic spatial sparsification is set up."""

    keep_ratio: float | tuple[float, ...] = 0.7
    """Share of the positions that take the slow path. One number r gives r, r - 0.2, r - 0.4 at the
    predictors (the authors' rule); a tuple gives the share at each."""
    stages: tuple[int, ...] | None = None
    """Blocks of the sparse level before which positions are chosen; None takes the authors': 1, 2,
    3 of 6 or 9 blocks, 2, 4, 6 of 18 and 3, 6, 9 of 27."""
    level: int = 2
    """Which of the backbone's stages is made sparse, from 0. Paper: 2, the third."""
    sampling: Literal["gumbel", "argmax"] = "gumbel"
    """How training decides: a draw with Gumbel noise (the paper), or the likelier class."""
    fast_scale: float = 1e-6
    """First value of the fast path's layer scale, which ConvNeXt has. Paper: 1e-6."""
    ratio_weight: float = 10.0
    """Weight of the ratio loss, mean over predictors. Paper: 10."""
    may_rise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        RatioConfig.__post_init__(self)
        require(self.level >= 0, f"level is {self.level}; expected 0 or more")

    def ratios(self, num_stages: int) -> tuple[float, ...]:
        """The share of the slow path after each predictor, in the authors' arithmetic: 0.7 - 0.2
        is a little less than 0.5, and their counts follow that.
        """
        ratio = self.keep_ratio
        if isinstance(ratio, tuple):
            found = f"keep_ratio has {len(ratio)} numbers for {num_stages} stages"
            require(len(ratio) == num_stages, found)
            return ratio
        ratios = tuple(ratio - STEP * stage for stage in range(num_stages))
        require(
            ratios[-1] > 0,
            f"keep_ratio is {ratio}, so the last of {num_stages} predictors would keep "
            f"{ratios[-1]:.2g}, as each keeps {STEP} less than the one before; give more than "
            f"{STEP * (num_stages - 1):.1f}, or a tuple with one number per predictor",
        )
        return ratios


@dataclass(frozen=True, slots=True)
class Form:
    """How the authors' models of two families differ."""

    norm_eps: float
    """Of the norms in predictors and fast paths."""
    scales_fast_path: bool
    """Whether fast paths have a layer scale."""
    one_residual: bool
    """Whether one residual spans mixing and MLP, or each has its own."""


FORMS = {
    "swin": Form(norm_eps=1e-5, scales_fast_path=False, one_residual=False),
    "swin_v2": Form(norm_eps=1e-5, scales_fast_path=False, one_residual=False),  # ours
    "convnext": Form(norm_eps=1e-6, scales_fast_path=True, one_residual=True),
}


class FastPath(nn.Module):
    """What a position gets in place of the MLP: a norm and one linear layer, no activation."""

    def __init__(self, dim: int, norm_eps: float, scale: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.linear = nn.Linear(dim, dim)
        self.scale = None if scale is None else nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C), without the residual."""
        out: Tensor = self.linear(self.norm(x))
        return out if self.scale is None else out * self.scale

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of width 0.02 and zero biases, as the authors'."""
        nn.init.trunc_normal_(self.linear.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.linear.bias)


@dataclass(frozen=True, slots=True)
class TwoMaps:
    """The state of training: every position on both paths, and which one counts."""

    slow_BHWC: Tensor
    fast_BHWC: Tensor
    keep_BHW1: Tensor
    """1 for the slow path; with straight-through gradients."""

    def merged(self) -> Tensor:
        """(B, H, W, C): each position from the path that counts."""
        return self.slow_BHWC * self.keep_BHW1 + self.fast_BHWC * (1 - self.keep_BHW1)


@dataclass(frozen=True)
class SpatialOutput(TrainingOutput):
    """A training forward, and what the predictors drew."""

    patch_features: Tensor
    """(B, N, C): the positions of the last map after the final norm."""
    keeps_BN: tuple[Tensor, ...]
    """Per predictor (B, N): 1 for a position on the slow path, with straight-through gradients."""

    def kept_counts(self) -> list[Tensor]:
        return [keep_BN.sum(1) for keep_BN in self.keeps_BN]


class DynamicSpatial(RatioMethod):
    """The method on Swin, both versions, and ConvNeXt."""

    name = "dynamic_spatial"
    config_class = DynamicSpatialConfig
    needs_training = "dynamic_spatial-swin-t"
    serves_sizes = True
    families = ("swin", "swin_v2", "convnext")
    follows_schedules = False
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vit", "eva", "naflex", "lvvit"),
        "it needs a map in stages; use dynamicvit, the same idea on tokens",
    ) | {"pit": "it was made for Swin and ConvNeXt; use spvit_pyramid"}
    config: DynamicSpatialConfig

    def __init__(
        self,
        family: Swin | ConvNeXt,
        config: DynamicSpatialConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        num_levels = len(family.depths)
        require(
            config.level < num_levels,
            f"level is {config.level}; this backbone has levels 0 to {num_levels - 1}",
        )
        depth, dim = family.depths[config.level], family.stage_dim(config.level)
        stages = config.stages or default_stages(depth)
        check_stages(stages, depth)
        config.ratios(len(stages))
        self.config = config
        self.stages = stages
        self.form = FORMS[family.name]
        eps = self.form.norm_eps
        scale = config.fast_scale if self.form.scales_fast_path else None
        self.predictors = nn.ModuleList([Predictor(dim, eps) for _ in stages])
        self.fast_paths = nn.ModuleList(
            [FastPath(dim, eps, scale) for _ in range(stages[0], depth)]
        )
        for module in (*self.predictors, *self.fast_paths):
            module.reset_parameters(generator)

    def target_counts(self, family: Swin | ConvNeXt, grid: Grid) -> tuple[int, ...]:
        return self._fixed_counts(math.prod(family.stage_grid(grid, self.config.level)))

    def infer(
        self, family: Swin | ConvNeXt, images: Tensor, recorder: Recorder | None = None
    ) -> Tensor:
        return family.head(self._levels(family, images, recorder)[-1])

    def features(
        self, family: Swin | ConvNeXt, images: Tensor, indices: Sequence[int], sizes: Sizes = None
    ) -> FeatureOutput:
        levels = self._levels(family, images, sizes=sizes)
        return FeatureOutput([levels[index].x_BCHW for index in indices], levels[-1])

    def _levels(
        self,
        family: Swin | ConvNeXt,
        images: Tensor,
        recorder: Recorder | None = None,
        sizes: Sizes = None,
    ) -> list[FeatureMap]:
        """The map after each of the backbone's stages."""
        fmap, levels = family.stem(images, sizes), []
        for level, depth in enumerate(family.depths):
            fmap = family.enter_stage(level, fmap)
            if level == self.config.level:
                fmap = self._infer_level(family, fmap, recorder)
            else:
                for block in range(depth):
                    fmap = self._whole_block(family, level, block, fmap)
            levels.append(fmap)
        return levels

    def _infer_level(
        self, family: Swin | ConvNeXt, fmap: FeatureMap, recorder: Recorder | None
    ) -> FeatureMap:
        level = self.config.level
        partition: Partition | None = None
        for block in range(family.depths[level]):
            if block in self.stages:
                number = sum(family.depths[:level]) + block
                partition = self._choose(fmap, self.stages.index(block), number, recorder)
            if partition is None:
                fmap = self._whole_block(family, level, block, fmap)
            else:
                fmap = self._split_block(family, block, fmap, partition)
        return fmap

    def _choose(
        self, fmap: FeatureMap, stage: int, block: int, recorder: Recorder | None
    ) -> Partition | None:
        """The positions for the slow path and for the fast one; None: all take the slow one."""
        num_positions = math.prod(fmap.grid)
        count = self._fixed_counts(num_positions)[stage]
        if count == num_positions and not recorder:
            return None
        score_BN = self._log_probs(stage, fmap)[..., 0]
        if fmap.real_BN is None:
            partition = Partition.best(score_BN, count)
        else:
            score_BN = score_BN.masked_fill(~fmap.real_BN, -math.inf)
            ratio = self.config.ratios(len(self.stages))[stage]
            partition = Partition.best_of_each(score_BN, share_of(fmap.real_BN, ratio))
        if recorder:
            shape = fmap.x_BHWC.shape[:3]
            keep_BHW = partition.first_BN(len(score_BN)).view(shape)
            recorder.add_map(block, score_BN.exp().view(shape), keep_BHW)
        return None if count == num_positions else partition

    def _log_probs(self, stage: int, fmap: FeatureMap) -> Tensor:
        """(B, N, 2): of the slow path and the fast one, by a predictor that sees all positions."""
        out: Tensor = self.predictors[stage](fmap.tokens)
        return out

    def _whole_block(
        self, family: Swin | ConvNeXt, level: int, block: int, fmap: FeatureMap
    ) -> FeatureMap:
        """A block at inference where all positions take its MLP: timm's own, or the same numbers
        in less time.
        """
        if is_hooked(bare(family.block(level, block))) or not pays_in_slices(fmap.x_BHWC):
            return family.run_block(level, block, fmap)
        mixed = family.mix(level, block, fmap.x_BHWC, fmap.real_BHW)
        base = fmap.x_BHWC if self.form.one_residual else mixed
        x_BHWC = add_in_slices(base, partial(family.channel, level, block), mixed)
        return fmap.with_x(family.finish(level, block, x_BHWC))

    def _split_block(
        self, family: Swin | ConvNeXt, block: int, fmap: FeatureMap, partition: Partition
    ) -> FeatureMap:
        """A block at inference: mixing on the whole map, then each position on its own path."""
        level = self.config.level

        def run(x_BHWC: Tensor) -> Tensor:
            mixed = family.mix(level, block, x_BHWC, fmap.real_BHW)
            slow = partial(family.channel, level, block)
            branch = partition.run(mixed, slow, self.fast_paths[block - self.stages[0]])
            base = x_BHWC if self.form.one_residual else mixed
            return family.finish(level, block, base + branch)

        return fmap.with_x(family.in_name_of(level, block, run, fmap.x_BHWC))

    def train_forward(
        self, family: Swin | ConvNeXt, images: Tensor, generator: torch.Generator | None = None
    ) -> SpatialOutput:
        levels, keeps_BN = self._train_levels(family, images, None, generator)
        features = family.patch_features(levels[-1])
        return SpatialOutput(family.training_head(levels[-1]), features, tuple(keeps_BN))

    def train_features(
        self,
        family: Swin | ConvNeXt,
        images: Tensor,
        indices: Sequence[int],
        sizes: Sizes = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        levels, keeps_BN = self._train_levels(family, images, sizes, generator)
        keeps, level = [fmap.real_BHW for fmap in levels], self.config.level
        ratio = self._ratio_loss(keeps_BN, levels[level].real_BN)
        keeps[level] = keeps_BN[-1].view(levels[level].x_BHWC.shape[:3])
        maps, asked = [levels[index].x_BCHW for index in indices], [keeps[i] for i in indices]
        return FeatureOutput(maps, levels[-1], asked, {"ratio": ratio})

    def _train_levels(
        self,
        family: Swin | ConvNeXt,
        images: Tensor,
        sizes: Sizes,
        generator: torch.Generator | None,
    ) -> tuple[list[FeatureMap], list[Tensor]]:
        """The map after each stage in training, and what each predictor drew (B, N)."""
        fmap, levels, keeps_BN = family.stem(images, sizes), [], list[Tensor]()
        for level in range(len(family.depths)):
            if level == self.config.level:
                fmap = family.enter_stage(level, fmap)
                fmap = self._train_level(family, fmap, keeps_BN, generator)
            else:
                fmap = family.run_stage(level, fmap)
            levels.append(fmap)
        return levels, keeps_BN

    def _train_level(
        self,
        family: Swin | ConvNeXt,
        fmap: FeatureMap,
        keeps_BN: list[Tensor],
        generator: torch.Generator | None,
    ) -> FeatureMap:
        """The sparse level in training; what is drawn is added to ``keeps_BN``."""
        level = self.config.level
        for block in range(self.stages[0]):
            fmap = family.run_block(level, block, fmap)
        maps = TwoMaps(fmap.x_BHWC, fmap.x_BHWC, torch.ones_like(fmap.x_BHWC[..., :1]))
        for block in range(self.stages[0], family.depths[level]):
            if block in self.stages:
                log_probs = self._log_probs(len(keeps_BN), fmap.with_x(maps.merged()))
                keep_BN = hard_keep(
                    log_probs,
                    noise=self.config.sampling == "gumbel",
                    temperature=self.config.temperature,
                    generator=generator,
                )
                keep_BN = keep_BN if fmap.real_BN is None else keep_BN * fmap.real_BN
                keeps_BN.append(keep_BN)
                maps = replace(maps, keep_BHW1=keep_BN.view(maps.keep_BHW1.shape))
            maps = self._train_block(family, block, maps, fmap)
        return fmap.with_x(maps.merged())

    def _train_block(
        self, family: Swin | ConvNeXt, block: int, maps: TwoMaps, fmap: FeatureMap
    ) -> TwoMaps:
        """A block in training: the merged map is mixed, and each path goes on from what counts for
        it: the mixed features where it was chosen, its own old ones where not.

        Args:
            family: runs the backbone.
            block: of the sparse level.
            maps: what enters it.
            fmap: a map of the level, which says what of it is padding.
        """
        level, keep = self.config.level, maps.keep_BHW1
        drop_path = family.drop_path(level, block)
        left: list[Tensor] = []

        def run(x_BHWC: Tensor) -> Tensor:
            mixed = family.mix(level, block, x_BHWC, fmap.real_BHW)
            slow = family.channel(level, block, mixed * keep + maps.slow_BHWC * (1 - keep))
            fast_path = self.fast_paths[block - self.stages[0]]
            fast = fast_path(mixed * (1 - keep) + maps.fast_BHWC * keep)
            bases = (maps.slow_BHWC, maps.fast_BHWC) if self.form.one_residual else (mixed, mixed)
            left.append(family.finish(level, block, bases[1] + drop_path(fast)))
            return family.finish(level, block, bases[0] + drop_path(slow))

        slow = family.in_name_of(level, block, run, maps.merged())
        return TwoMaps(fmap.with_x(slow).x_BHWC, fmap.with_x(left[0]).x_BHWC, keep)

    def losses(
        self, output: SpatialOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        parts = {"ratio": self._ratio_loss(output.keeps_BN)}
        if target is not None:
            parts["classification"] = losses.classification_loss(output.logits, target)
        if teacher is not None:
            parts["distill"] = losses.distillation_loss(output.logits, teacher.logits)
            features = output.patch_features
            everywhere = features.new_ones(features.shape[:2])
            parts["token"] = losses.kept_token_mse(features, teacher.patch_features, everywhere)
        return with_total(self.config, parts)

    def _ratio_loss(self, keeps_BN: Sequence[Tensor], real_BN: Tensor | None = None) -> Tensor:
        pairs = zip(keeps_BN, self.config.ratios(len(self.stages)), strict=True)
        return torch.stack(
            [losses.ratio_loss(keep, ratio, real_BN) for keep, ratio in pairs]
        ).mean()

    def steps(self, family: Swin | ConvNeXt, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        levels = []
        for level in range(len(family.depths)):
            # Also dense, it is not run as the backbone runs it; see _whole_block.
            positions: Any = math.prod(family.stage_grid(grid, level))
            macs: Any = family.level_macs(level, grid)
            stages = self.stages if level == self.config.level else ()
            if stages:
                positions, macs = self._sparse_level(family, positions, macs, counts)
            levels.append(costs.sparse_levels(self.name, (level,), positions, macs, before=stages))
        return costs.pyramid_steps(family, grid, levels)

    def _sparse_level(
        self, family: Swin | ConvNeXt, num_positions: int, macs: Any, counts: Sequence[Any]
    ) -> tuple[Any, Any]:
        """Positions on the slow path, mean over the blocks that are split, and the level's MACs."""
        level, total_slow = self.config.level, 0
        for stage, predictor in enumerate(self.predictors):  # skipped where it decides nothing
            macs = macs + linear_macs(predictor) * num_positions * (counts[stage] != num_positions)
        for block in range(self.stages[0], family.depths[level]):
            slow = counts[sum(start <= block for start in self.stages) - 1]
            fast_path = self.fast_paths[block - self.stages[0]]
            macs = macs + linear_macs(fast_path) * (num_positions - slow)
            macs = macs - family.channel_macs(level, block, num_positions - slow)
            total_slow = total_slow + slow
        return total_slow / (family.depths[level] - self.stages[0]), macs

    @property
    def least_ratio(self) -> float:
        """As far as the authors' rule reaches."""
        return STEP * (len(self.stages) - 1) + 1e-3


def default_stages(depth: int) -> tuple[int, ...]:
    """The authors' places of three predictors among ``depth`` blocks, as far as they fit in."""
    step = max(1, depth // 9)
    return tuple(block for block in (step, 2 * step, 3 * step) if block < depth) or (0,)
