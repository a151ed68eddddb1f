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
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitrim import costs
from vitrim.families import Swin
from vitrim.layers.semantic_attention import Keys
from vitrim.methods.records import Recorder
from vitrim.methods.semantic import STAGE, GenerationConfig, GenerationMethod
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid

EVERYTHING = Keys(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class STViTSwinConfig(GenerationConfig):
    """How STViT is set up on a Swin transformer."""


class STViTSwin(GenerationMethod):
    """The method on a Swin transformer."""

    name = "stvit_swin"
    config_class = STViTSwinConfig
    needs_training = "stvit_swin-t"
    base_share = (7, 12)  # 3 base layers (Swin-T), 10 (Swin-S and Swin-B)
    config: STViTSwinConfig

    def unused(self, family: Swin) -> list[nn.Parameter]:
        """The position biases of the blocks that run on semantic tokens."""
        blocks = (family.block(*place) for place in self._semantic_blocks(family))
        return [block.attn.relative_position_bias_table for block in blocks]

    def _run(self, family: Swin, images: Tensor, recorder: Recorder | None = None) -> FeatureMap:
        """The map of semantic tokens after the last block."""
        fmap = self._base(family, images)
        windows = self._windows_on(fmap.grid)
        x_BHWC, record = self._generate(family, fmap.x_BHWC, windows)
        if recorder:
            rows, columns = windows.visible_tokens
            looks = record.looks(windows, windows.num_tokens)[:, :rows, :columns]
            looks_BSN = looks.flatten(1, 2)
            count = looks_BSN.shape[1]
            recorder.stages.append(
                self.semantic_trace(self.stages[0], windows.grid, looks_BSN, count)
            )
        fmap = FeatureMap(x_BHWC)
        for stage, index in self._semantic_blocks(family)[2:]:
            if stage > STAGE and index == 0:
                fmap = family.enter_stage(stage, fmap)
            fmap = self._semantic_block(family, stage, index, fmap)
        return fmap

    def _semantic_block(self, family: Swin, stage: int, index: int, fmap: FeatureMap) -> FeatureMap:
        """A block on the semantic tokens alone: all look at all."""
        x_BNC = fmap.x_BHWC.flatten(1, 2)
        query = x_BNC.unsqueeze(1)
        out, _ = self._cross_block(family, index, query, query, x_BNC, EVERYTHING, stage)
        return FeatureMap(out.reshape(fmap.x_BHWC.shape))

    def counts(self, family: Swin, grid: Grid) -> tuple[int, ...] | None:
        return (math.prod(self._windows(family, grid).visible_tokens),)

    def steps(self, family: Swin, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        macs = self._semantic_macs(family, grid, counts[0])
        return self._steps(family, grid, counts[0], macs)

    def _semantic_macs(self, family: Swin, grid: Grid, count: Any) -> Any:
        """MACs from the third stage on, given how many semantic tokens an image has."""
        windows = self._windows(family, grid)
        total: Any = self._base_macs(family, grid) + self._generation_macs(family, windows)
        for stage, index in self._semantic_blocks(family)[2:]:
            merged = family.stage_grid(windows.visible_tokens, stage - STAGE)
            tokens = count * math.prod(merged) / math.prod(windows.visible_tokens)
            if stage > STAGE and index == 0:
                total = total + family.merge_macs(stage, tokens)
            total = total + family.attend_macs(stage, index, tokens, tokens, tokens)
            total = total + family.channel_macs(stage, index, tokens)
        return total
