"""STViT: a few semantic tokens, cluster centres of the image, replace the patch tokens.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685), on plain vision transformers. The first ``base_layers`` blocks run on all patch
tokens. Spatial pooling of their map gives initial centres P; two generation layers, blocks of the
backbone used as cross attention, turn these into semantic tokens S:

    S1 = block(query P,      keys and values X,              residual P)
    S2 = block(query S1 + G, keys and values concat(S1, X),  residual S1 + G)

with X the patch tokens, which are not updated and not used any more after this, and G learned
global centres. The remaining blocks run on the semantic tokens alone; their mean after the final
norm goes to the classifier. Depth stays as it was, and there is no class token. Training computes
exactly what inference does.

The authors released no code of this variant, only STViT-R on Swin, and the text was known to us
through reading notes. What the sources leave open, and our ruling:

* pooling: ``"max"`` is what the released code does (for Swin). ``"intra_inter"`` is our reading,
  not verified, of the learned pooling that the paper describes, whose equations we could not check.
* the residual of the second layer: the text as noted adds P, the released code adds the query.
* rotary positions: a semantic token is turned as the patch in the middle of its region; ours.
* training: the recipe for DeiT is in no source; ours are ``stvit-deit-*`` and ``stvit-adapt``.

From a dense class-token model every block maps one to one (the generation layers split the rows of
``attn.qkv`` into queries and keys with values, and share ``norm1``), and so do the patch embedding,
the positions of the patches, the final norm and the classifier. The class token and its position
stay in the backbone and are not used. New are the global centres and the parameters of a learned
pooling; and the classifier meets the mean of semantic tokens where it knew a class token, so a
converted model must be trained. Ours, for adapting a trained model on few images:
``keep_prefix``, which lets the class token travel with the semantic tokens. With it, mean pooling
over regions that tile the map (7 x 7 of 14 x 14) starts nearest to the dense model.

Published (from notes; top-1 at GMACs, 16 tokens): DeiT-T 72.2, DeiT-S 79.8 at 1.91, DeiT-B 81.8,
each equal to its dense model. We reproduce the costs (0.522, 1.907, 7.263, and those of other token
counts, depths and positions); training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.families import ViT
from vitrim.layers.pooling import POOLINGS, middles
from vitrim.methods.base import require_one_stage
from vitrim.methods.records import Dial, Plan, PooledOutput, Recorder
from vitrim.methods.semantic import SemanticConfig, SemanticMethod
from vitrim.tokens.attention import AttentionRecord
from vitrim.tokens.plain import Grid, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class STViTConfig(SemanticConfig):
    """How STViT is set up."""

    semantic_tokens: int | tuple[int, ...] = 16
    """How many semantic tokens: a square number, or (rows, columns) of the grid they are pooled
    on. Paper: 16."""
    base_layers: int | None = None
    """Blocks on all patch tokens, before the generation layers; None takes a third of the depth:
    the paper's 4 of 12."""
    generation_layers: int = 2
    """Blocks that make semantic tokens, 2 to 4. Paper: 2."""
    centres_in_residual: bool = True
    """Whether that layer's residual holds G too, as in the released code."""
    keep_prefix: bool = False
    """Ours: the class token (and registers) pass through all blocks, beside the semantic tokens
    from the generation layers on, and the backbone's own head reads them. After the generation
    layers each semantic token weighs as much in attention as the patches that it stands for (the
    proportional attention of ToMe, arXiv 2210.09461). Paper: no class token."""
    exact_last_block: bool = True
    """Whether the last block computes no more than a class token's logits need, where there is one
    (``keep_prefix``): the same logits for fewer MACs."""

    def __post_init__(self) -> None:
        SemanticConfig.__post_init__(self)
        _ = self.shape
        base, generation = self.base_layers, self.generation_layers
        require(base is None or base >= 0, f"base_layers is {base}; expected 0 or more")
        require(2 <= generation <= 4, f"generation_layers is {generation}; expected 2, 3 or 4")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the semantic tokens."""
        wanted = self.semantic_tokens
        if isinstance(wanted, tuple):
            good = len(wanted) == 2 and min(wanted) >= 1
            require(good, f"semantic_tokens is {wanted}; expected rows and columns, 1 or more each")
            return wanted[0], wanted[1]
        side = math.isqrt(max(wanted, 0))
        require(
            wanted >= 1 and side * side == wanted,
            f"semantic_tokens is {wanted}, which is no square number; give (rows, columns)",
        )
        return side, side


class STViT(SemanticMethod):
    """The method on a plain vision transformer."""

    name = "stvit"
    config_class = STViTConfig
    refusals: ClassVar[Mapping[str, str]] = {
        "pit": "its semantic tokens have no place in a map, which PiT pools; use spvit_pyramid",
        "convnext": "it has no attention; use dynamic_spatial",
        "swin": "use stvit_swin, or stvit_r, whose map survives",
        "swin_v2": "it has windows; use dynamic_spatial",
        "lvvit": "its patch tokens have a classifier of their own, which semantic tokens, in the "
        "patches' place, were never taught to use",
    }
    needs_training = "stvit-adapt"
    follows_schedules = True
    unscheduled = (
        "it drops no patches, and its cost goes by its semantic tokens, which vitrim sparsify "
        "--milliseconds sets"
    )
    config: STViTConfig

    def __init__(
        self, family: ViT, config: STViTConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depth, generation = family.depth, config.generation_layers
        base = depth // 3 if config.base_layers is None else config.base_layers
        require(
            base + generation <= depth,
            f"{base} base layers and {generation} generation layers do not fit in the backbone's "
            f"{depth} blocks; lower base_layers or generation_layers",
        )
        self.config = config
        self.base_layers = base
        self.stages = (base + generation,)
        self.grid = family.grid()
        self._check_shape(self.grid)
        self.pooling = POOLINGS[config.pooling](family.embed_dim)
        self.pooling.reset_parameters(generator)
        self.centres_SC: nn.Parameter | None = None
        if config.global_centres:
            rows, columns = config.shape
            centres = torch.empty(rows * columns, family.embed_dim)
            self.centres_SC = nn.Parameter(
                nn.init.trunc_normal_(centres, std=0.02, generator=generator)
            )
        scales = 0 if config.layer_scale is None else 2 * (depth - base)
        self.layer_scales = nn.ParameterList(
            nn.Parameter(torch.full((family.embed_dim,), config.layer_scale or 0.0))
            for _ in range(scales)
        )

    def _check_shape(self, grid: tuple[int, int]) -> None:
        rows, columns = self.config.shape
        require(
            rows <= grid[0] and columns <= grid[1],
            f"{rows} x {columns} semantic tokens were asked for; the patch grid is only "
            f"{grid[0]} x {grid[1]}",
        )

    @classmethod
    def must_learn(cls, config: STViTConfig) -> bool:
        """Behind the trained class token, plain means of the patches are a usable start."""
        is_new = config.global_centres or config.pooling == "intra_inter" or config.layer_scale
        return bool(is_new) or not config.keep_prefix

    def counts(self, family: ViT, grid: Grid) -> tuple[int, ...] | None:
        rows, columns = self.config.shape
        return (rows * columns,)

    def whole_last_block(self, family: ViT) -> str | None:
        if not self.config.keep_prefix:
            return "no class token goes with the semantic tokens (keep_prefix is false)"
        if len(self.layer_scales):
            return "its blocks have scales of the method's own (layer_scale)"
        if self.stages[0] == family.depth:
            return "semantic tokens are made up to the last block"
        return super().whole_last_block(family)

    def infer(self, family: ViT, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        semantic = self._make(family, images, recorder)
        if self.whole_last_block(family) is None:
            return family.answer(self.stages[0], semantic)
        semantic = self._rest(family, semantic)
        return family.head(semantic) if self.config.keep_prefix else family.patch_head(semantic.x)

    def _make(self, family: ViT, images: Tensor, recorder: Recorder | None = None) -> Tokens:
        """The semantic tokens that the generation layers make, behind the prefix if it is kept.

        Prefix tokens see each of them as the patches that it stands for.
        """
        tokens = family.stem(images)
        if not self.config.keep_prefix:
            tokens = Tokens.of(tokens.patches, 0, tokens.rotary)
        tokens = family.run_blocks(range(self.base_layers), tokens)
        grid = family.grid((images.shape[-2], images.shape[-1]))
        semantic, record = self._generate(family, tokens, grid)
        if recorder:
            num_patches, prefix = math.prod(grid), semantic.num_prefix
            looks_BSN = record.weights()[:, :, prefix:, -num_patches:].float().mean(1)
            count = semantic.num_patches
            recorder.stages.append(self.semantic_trace(self.stages[0], grid, looks_BSN, count))
        if not semantic.num_prefix:
            return semantic
        size = tokens.num_patches / semantic.num_patches
        return semantic.sized(semantic.x.new_full(semantic.index_BN.shape, size))

    def _rest(self, family: ViT, semantic: Tokens) -> Tokens:
        """The semantic tokens after the last block."""
        for block in range(self.stages[0], family.depth):
            if len(self.layer_scales):
                log_size = semantic.log_size
                bias_N = None if log_size is None else log_size[0, 0, 0]
                x, _ = self._cross_block(family, block, semantic, semantic.x, semantic, bias_N)
                semantic = semantic.with_x(x)
            else:
                semantic = family.run_blocks((block,), semantic)
        return semantic

    def _generate(
        self, family: ViT, tokens: Tokens, grid: tuple[int, int]
    ) -> tuple[Tokens, AttentionRecord]:
        """Semantic tokens in the place of the patch tokens, and the last layer's attention."""
        self._check_shape(grid)
        map_BCHW = tokens.patches.transpose(1, 2).reshape(tokens.num_images, -1, *grid)
        initial = self.pooling(map_BCHW, self.config.shape)
        index_BS = middles(grid, self.config.shape, initial.device).expand(initial.shape[0], -1)
        semantic = Tokens(initial, 0, index_BS, rotary=tokens.rotary)
        semantic = semantic.with_prefix(tokens.prefix_BPC)
        x, record = self._cross_block(family, self.base_layers, semantic, semantic.x, tokens)
        for block in range(self.base_layers + 1, self.stages[0]):
            semantic, residual = semantic.with_x(x), x
            x_BMC = torch.cat([x, tokens.patches], 1)
            index_BM = torch.cat([index_BS, tokens.index_BN], 1)
            memory = replace(semantic, x=x_BMC, index_BN=index_BM)
            if block == self.base_layers + 1 and self.centres_SC is not None:
                centres = F.pad(self.centres_SC, (0, 0, tokens.num_prefix, 0))
                semantic = semantic.with_x(x + centres)
                residual = semantic.x if self.config.centres_in_residual else x
            x, record = self._cross_block(family, block, semantic, residual, memory)
        return semantic.with_x(x), record

    def _cross_block(
        self,
        family: ViT,
        block: int,
        query: Tokens,
        residual: Tensor,
        memory: Tokens,
        bias_N: Tensor | None = None,
    ) -> tuple[Tensor, AttentionRecord]:
        first, scales = 2 * (block - self.base_layers), None
        if len(self.layer_scales):
            scales = self.layer_scales[first], self.layer_scales[first + 1]
        return family.cross_block(block, query, residual, memory, bias_N, scales)

    def train_forward(
        self, family: ViT, images: Tensor, generator: torch.Generator | None = None
    ) -> PooledOutput:
        semantic = self._rest(family, self._make(family, images))
        if self.config.keep_prefix:
            return PooledOutput(family.head(semantic), family.pool(semantic))
        return PooledOutput(family.patch_head(semantic.x), family.patch_pool(semantic.x))

    def steps(self, family: ViT, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        num_patches = math.prod(grid)
        prefix = family.num_prefix if self.config.keep_prefix else 0
        semantic, tokens = counts[0] + prefix, num_patches + prefix
        steps = [costs.stem(family, num_patches)]
        steps += [costs.block(family, block, tokens) for block in range(self.base_layers)]
        steps.append(self._generation(family, num_patches, counts[0], prefix))
        part = "cross" if len(self.layer_scales) else "block"
        rest = range(self.stages[0], family.depth)
        blocks = [costs.block(family, block, semantic, part) for block in rest]
        if self.whole_last_block(family) is None:
            return [*steps, *blocks[:-1], *costs.answer(family, semantic)]
        if self.config.keep_prefix:
            return [*steps, *blocks, costs.head(family, semantic)]
        head = costs.Step("head", semantic, family.patch_head_macs(counts[0]))
        return [*steps, *blocks, head]

    def _generation(self, family: ViT, num_patches: int, count: Any, prefix: int) -> costs.Step:
        """Pooling and the generation layers, which look at every patch."""
        semantic, tokens = count + prefix, num_patches + prefix
        macs = self.pooling.macs(num_patches, count)
        macs = macs + family.cross_block_macs(self.base_layers, semantic, tokens)
        for block in range(self.base_layers + 1, self.stages[0]):
            macs = macs + family.cross_block_macs(block, semantic, semantic + num_patches)
        part = costs.select_part(self.name, adaptive=False)
        return costs.Step(part, semantic, macs, self.base_layers, tokens)

    def dial(self) -> Dial:
        """The number of semantic tokens, in steps, where nothing was learned for one number.

        Raises:
            ConfigError: global centres or a learned pooling belong to the present number.
        """
        config, (rows, columns) = self.config, self.config.shape
        require(
            not config.global_centres and config.pooling != "intra_inter",
            f"this stvit learned to make {rows} x {columns} semantic tokens; to change their "
            'number later, make it sparse with global_centres=False and pooling "max" or "avg"',
        )
        counts = [rows * columns for rows, columns in self._shapes()]
        return Dial("semantic_tokens", rows * columns, float(min(counts)), float(max(counts)))

    def turn(self, value: float) -> None:
        dial = self.dial()
        require(math.isfinite(value), f"semantic_tokens is {value}; expected a number")
        if round(value) != dial.value:
            shape = min(self._shapes(), key=lambda shape: abs(math.prod(shape) - value))
            self.config = replace(self.config, semantic_tokens=shape)

    def variants(self, ratios: Sequence[float]) -> list[STViTConfig]:
        """The semantic tokens as set, and fewer and more, as the grid has room for them."""
        by_count = {}
        for scale in (0.5, 1, 1.5):
            rows, columns = (
                max(1, min(round(scale * side), most))
                for side, most in zip(self.config.shape, self.grid, strict=True)
            )
            by_count[rows * columns] = rows, columns
        shapes = [by_count[count] for count in sorted(by_count)]
        return [replace(self.config, semantic_tokens=shape) for shape in shapes]

    def starts(self, family: ViT, grid: Grid) -> list[STViTConfig]:
        """As near to every number of semantic tokens as square grids come."""
        shapes = [(rows, rows + more) for rows in range(1, min(grid)) for more in (0, 1)]
        return [replace(self.config, semantic_tokens=shape) for shape in [*shapes, grid]]

    @classmethod
    def one_stage(cls, config: STViTConfig, block: int, ratio: float, depth: int) -> STViTConfig:
        """No blocks after the generation layers."""
        return replace(config, base_layers=depth - config.generation_layers)

    @classmethod
    def follow(cls, config: STViTConfig, plan: Plan) -> tuple[STViTConfig, str | None]:
        require_one_stage(plan, "stvit replaces the patches once")
        stage, count = plan.stages[0], plan.counts[0]
        side = math.isqrt(count)
        shapes = [(side, side), (side, side + 1), (side + 1, side + 1)]
        shape = min(shapes, key=lambda shape: abs(math.prod(shape) - count))
        base = max(0, stage - config.generation_layers)
        remark = (
            f"the nearest that stvit can: {shape[0]} x {shape[1]} semantic tokens in place of "
            f"{count} patches, made by blocks {base} to {base + config.generation_layers - 1}"
        )
        return replace(config, base_layers=base, semantic_tokens=shape), remark

    def _shapes(self) -> list[tuple[int, int]]:
        """Rows and columns to choose from: not more than twice as slender as the patch grid, the
        least slender first, so that the numbers of tokens lie close together.
        """
        height, width = self.grid
        slender = {
            (rows, columns): abs(math.log(rows * width / (columns * height)))
            for rows in range(1, height + 1)
            for columns in range(1, width + 1)
            if rows * columns >= min(4, height * width)
        }
        return sorted((s for s in slender if slender[s] <= math.log(2)), key=lambda s: slender[s])
