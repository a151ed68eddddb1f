"""STViT on Swin: semantic tokens replace the image in the third stage and are not given back.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685), on backbones with windows. The first blocks of the third stage run on the whole
map. Then s x s centres P are pooled in every window, and two generation layers turn them into
semantic tokens S, each window's centres looking at themselves and at a larger window of the map:

    S1 = block(query P,      keys and values concat(P, X),   residual P)
    S2 = block(query S1 + G, keys and values concat(S1, X),  residual S1 + G)

with X the positions of the larger window, which are not updated and not used any more after this,
and G learned global centres. The other blocks of the stage, and those of the last stage, run on the
semantic tokens alone, all of them looking at all; in between they are merged 2 x 2, as the map
would be. Their mean after the final norm goes to the classifier. Depth stays as it was, and no
window is shifted. Training computes exactly what inference does.

The authors released no code of this variant, only STViT-R (``stvit_r``), and the text was known to
us through reading notes, which do not say how the layers are laid out. Ours is the regular layout
that costs what was published: 7 of 12 (Swin-T) or 14 of 24 blocks (Swin-S, Swin-B) before the
generation layers, larger windows of 10 for windows of 7, as in the released code, keys and values
projected once per token, no position biases among semantic tokens. Also ours: what happens at
borders (a window that hangs over sees no padding; semantic tokens that stand for padding alone are
dropped after the generation layers), and global centres at other image sizes (interpolated).

From a dense Swin every block maps one to one: generation and semantic layers take its projections,
norms and MLP, but not the position biases of its windows, which stay in the backbone and are not
used. New are the global centres and the parameters of a learned pooling or layer scale. The blocks
after the base layers meet other tokens than they knew, so a converted model must be trained.

Published (from notes; top-1 at GMACs, 9 tokens per window): Swin-T 81.0 at 3.14, Swin-S 82.8 at
5.95, Swin-B 83.2 at 10.48. Notes disagree about which rows belong to 16 and to 4 tokens. We
reproduce the costs; training on ImageNet was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.families import Swin
from vitrim.layers.pooling import POOLINGS
from vitrim.layers.semantic_attention import Keys, WindowRecord
from vitrim.layers.semantic_keys import own_and_near
from vitrim.layers.semantic_windows import Windows, global_centres, resized_centres
from vitrim.methods.records import Dial, PooledOutput, Recorder
from vitrim.methods.semantic import STAGE, WindowConfig, WindowMethod
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid

EVERYTHING = Keys(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class STViTSwinConfig(WindowConfig):
    """How STViT is set up on a Swin transformer."""

    base_layers: int | None = None
    """Blocks of the third stage on the whole map, before the generation layers; None brings the
    blocks before these to 7/12 of all: 3 (Swin-T), 10 (Swin-S and Swin-B). Ours."""
    centres_in_residual: bool = True
    """Whether that layer's residual holds G too, as in the released code."""

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        base = self.base_layers
        require(base is None or base >= 0, f"base_layers is {base}; expected 0 or more")


class STViTSwin(WindowMethod):
    """The method on a Swin transformer."""

    name = "stvit_swin"
    config_class = STViTSwinConfig
    needs_training = "stvit_swin-t"
    config: STViTSwinConfig

    def __init__(
        self, family: Swin, config: STViTSwinConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depths = family.depths
        require(len(depths) > STAGE, f"the backbone has {len(depths)} stages; expected 3 or more")
        before, depth = sum(depths[:STAGE]), depths[STAGE]
        base = config.base_layers
        if base is None:
            base = min(max(0, 7 * sum(depths) // 12 - before), max(0, depth - 2))
        require(
            base + 2 <= depth,
            f"{base} base layers and 2 generation layers do not fit in the {depth} blocks of the "
            "third stage; lower base_layers",
        )
        self.config = config
        self.base_layers = base
        self.stages = (before + base + 2,)
        dim, grid = family.stage_dim(STAGE), family.grid()
        self.window: Grid = family.block(STAGE, 0).window_size
        self.centres_grid = self._windows(family, grid).tokens
        self.pooling = POOLINGS[config.pooling](dim)
        self.pooling.reset_parameters(generator)
        self.centres_SC: nn.Parameter | None = None
        if config.global_centres:
            self.centres_SC = global_centres(self.centres_grid, dim, generator)
        self.layer_scales = nn.ParameterDict()
        if config.layer_scale is not None:
            for stage, index in self._semantic_blocks(family):
                scales = torch.full((2, family.stage_dim(stage)), config.layer_scale)
                self.layer_scales[f"{stage}_{index}"] = nn.Parameter(scales)

    def _semantic_blocks(self, family: Swin) -> list[tuple[int, int]]:
        """Stage and index of the blocks that run on semantic tokens, generation layers first."""
        firsts = {STAGE: self.base_layers}
        return [
            (stage, index)
            for stage in range(STAGE, len(family.depths))
            for index in range(firsts.get(stage, 0), family.depths[stage])
        ]

    def unused(self, family: Swin) -> list[nn.Parameter]:
        """The position biases of the blocks that run on semantic tokens."""
        blocks = (family.block(*place) for place in self._semantic_blocks(family))
        return [block.attn.relative_position_bias_table for block in blocks]

    def _reach(self, windows: Windows) -> Grid:
        return windows.reach(self.config.key_window, 10 / 7)

    def infer(self, family: Swin, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        return family.head(self._run(family, images, recorder))

    def _run(self, family: Swin, images: Tensor, recorder: Recorder | None = None) -> FeatureMap:
        """The map of semantic tokens after the last block."""
        fmap = family.stem(images)
        windows = self._windows(family, fmap.grid)
        for stage in range(STAGE):
            fmap = family.run_stage(stage, fmap)
        fmap = family.enter_stage(STAGE, fmap)
        for index in range(self.base_layers):
            fmap = family.run_block(STAGE, index, fmap)
        fmap, record = self._generate(family, fmap, windows)
        if recorder:
            rows, columns = windows.visible_tokens
            looks = record.looks(windows, windows.num_tokens)[:, :rows, :columns]
            looks_BSN = looks.flatten(1, 2)
            count = looks_BSN.shape[1]
            recorder.stages.append(
                self.semantic_trace(self.stages[0], windows.grid, looks_BSN, count)
            )
        for stage in range(STAGE, len(family.depths)):
            first = self.base_layers + 2 if stage == STAGE else 0
            fmap = fmap if stage == STAGE else family.enter_stage(stage, fmap)
            for index in range(first, family.depths[stage]):
                fmap = self._semantic_block(family, stage, index, fmap)
        return fmap

    def _generate(
        self, family: Swin, fmap: FeatureMap, windows: Windows
    ) -> tuple[FeatureMap, WindowRecord]:
        """The map of semantic tokens, and the last generation layer's attention."""
        first, second = self.base_layers, self.base_layers + 1
        x_BNC = fmap.x_BHWC.flatten(1, 2)
        keys = own_and_near(windows, self._reach(windows), x_BNC.device)
        centres_BWSC = windows.pool(fmap.x_BHWC, self.pooling)
        memory = torch.cat([centres_BWSC.flatten(1, 2), x_BNC], 1)
        semantic, _ = self._block(family, STAGE, first, centres_BWSC, centres_BWSC, memory, keys)
        query = residual = semantic
        if self.centres_SC is not None:
            centres = resized_centres(self.centres_SC, self.centres_grid, windows.tokens)
            query = semantic + windows.split_tokens(centres)
            residual = query if self.config.centres_in_residual else semantic
        memory = torch.cat([semantic.flatten(1, 2), x_BNC], 1)
        semantic, record = self._block(family, STAGE, second, query, residual, memory, keys)
        rows, columns = windows.visible_tokens
        return FeatureMap(windows.join_tokens(semantic)[:, :rows, :columns]), record

    def _semantic_block(self, family: Swin, stage: int, index: int, fmap: FeatureMap) -> FeatureMap:
        """A block on the semantic tokens alone: all look at all."""
        x_BNC = fmap.x_BHWC.flatten(1, 2)
        query = x_BNC.unsqueeze(1)
        out, _ = self._block(family, stage, index, query, query, x_BNC, EVERYTHING)
        return FeatureMap(out.reshape(fmap.x_BHWC.shape))

    def _block(
        self,
        family: Swin,
        stage: int,
        index: int,
        query: Tensor,
        residual: Tensor,
        memory: Tensor,
        keys: Keys,
    ) -> tuple[Tensor, WindowRecord]:
        """A block of the backbone between the windows of ``query`` and the rows of ``memory``."""
        scale1 = scale2 = torch.ones((), device=query.device, dtype=query.dtype)
        if self.config.layer_scale is not None:
            scale1, scale2 = self.layer_scales[f"{stage}_{index}"]
        records: list[WindowRecord] = []

        def run(query: Tensor) -> Tensor:
            out, record = family.attend(stage, index, query, memory, keys)
            records.append(record)
            x = residual + family.block(stage, index).drop_path1(scale1 * out)
            out = family.channel(stage, index, x)
            after: Tensor = x + family.drop_path(stage, index)(scale2 * out)
            return after

        return family.in_name_of(stage, index, run, query), records[0]

    def train_forward(
        self, family: Swin, images: Tensor, generator: torch.Generator | None = None
    ) -> PooledOutput:
        semantic = self._run(family, images)
        return PooledOutput(family.head(semantic), family.pool(semantic))

    def counts(self, family: Swin, grid: Grid) -> tuple[int, ...] | None:
        return (math.prod(self._windows(family, grid).visible_tokens),)

    def steps(self, family: Swin, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        dense = costs.dense_levels(family, grid)[:STAGE]
        macs = self._semantic_macs(family, grid, counts[0])
        semantic = costs.sparse_levels(
            self.name,
            range(STAGE, len(family.depths)),
            counts[0],
            macs,
            before=(self.base_layers,),
        )
        return costs.pyramid_steps(family, grid, [*dense, semantic])

    def _semantic_macs(self, family: Swin, grid: Grid, count: Any) -> Any:
        """MACs from the third stage on, given how many semantic tokens an image has."""
        windows = self._windows(family, grid)
        positions = math.prod(windows.grid)
        made, own = windows.num_tokens, self.config.window_tokens
        keys = own + math.prod(self._reach(windows))
        total: Any = family.downsample_macs(STAGE, grid)
        total += sum(family.block_macs(STAGE, index, grid) for index in range(self.base_layers))
        for index in (self.base_layers, self.base_layers + 1):
            total += family.attend_macs(STAGE, index, made, made + positions, keys)
            total += family.channel_macs(STAGE, index, made)
        total += self.pooling.macs(math.prod(windows.whole), made)
        for stage, index in self._semantic_blocks(family)[2:]:
            merged = family.stage_grid(windows.visible_tokens, stage - STAGE)
            tokens = count * math.prod(merged) / math.prod(windows.visible_tokens)
            if stage > STAGE and index == 0:
                total = total + family.merge_macs(stage, tokens)
            total = total + family.attend_macs(stage, index, tokens, tokens, tokens)
            total = total + family.channel_macs(stage, index, tokens)
        return total

    def dial(self) -> Dial:
        """The number of semantic tokens per window, in steps, where nothing was learned for one.

        Raises:
            ConfigError: global centres or a learned pooling belong to the present number.
        """
        config = self.config
        require(
            not config.global_centres and config.pooling != "intra_inter",
            f"this stvit_swin learned to make {config.window_tokens} semantic tokens per window; "
            "to change their number later, make it sparse with global_centres=False and pooling "
            '"max" or "avg"',
        )
        most = min(self.window) ** 2
        return Dial("window_tokens", config.window_tokens, 1.0, float(most))

    def turn(self, value: float) -> None:
        dial = self.dial()
        require(math.isfinite(value), f"window_tokens is {value}; expected a number")
        if round(value) != dial.value:
            sides = range(1, min(self.window) + 1)
            side = min(sides, key=lambda side: abs(side * side - value))
            self.config = replace(self.config, window_tokens=side * side)
