"""Family ``swin_v2``: timm's SwinTransformerV2, run piece by piece.

Attention compares directions (cosines), by a learned scale and biases that a small network makes
of distances, and the norms stand behind attention and MLP. Windows, maps and stages are those of
the family ``swin``, and so is the rest. Methods that look into the first version's attention do not
run on it; images that were padded to one size are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
    WindowAttention,
)
from torch import Tensor

from vitrim.costs.macs import linear_macs
from vitrim.families.base import refuse_sizes
from vitrim.families.swin import Swin, part_obstacles
from vitrim.tokens.calls import in_features
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid, Sizes


class SwinV2(Swin):
    """Runs one timm Swin transformer V2 piece by piece; holds no weights of its own."""

    name = "swin_v2"
    classes = (SwinTransformerV2,)
    modules = ("swin_transformer_v2",)
    serves = "timm SwinTransformerV2 (swinv2_tiny, _small, _base, _large)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        served = SwinTransformerV2Stage, PatchMerging, SwinTransformerV2Block, WindowAttention
        yield from part_obstacles(model, *served)

    def stem(self, images: Tensor, sizes: Sizes = None) -> FeatureMap:
        refuse_sizes(sizes, self.name)
        return super().stem(images)

    def mix(self, stage: int, index: int, x_BHWC: Tensor, real_BHW: Tensor | None = None) -> Tensor:
        block = self.block(stage, index)
        mixed: Tensor = x_BHWC + block.drop_path1(block.norm1(block._attn(x_BHWC)))
        return mixed

    def channel(self, stage: int, index: int, x: Tensor) -> Tensor:
        block = self.block(stage, index)
        out: Tensor = block.norm2(block.mlp(x))
        return out

    def mix_macs(self, stage: int, index: int, grid: Grid) -> int:
        """MACs of :meth:`mix`: padding to whole windows, and the network that makes the biases,
        which runs once for all windows, included.
        """
        block, attention = self.block(stage, index), self.block(stage, index).attn
        sides = zip(self.stage_grid(grid, stage), block.window_size, strict=True)
        positions: int = math.prod(-(-length // window) * window for length, window in sides)
        each = linear_macs(attention.qkv) + linear_macs(attention.proj)
        each += 2 * in_features(attention.proj) * int(block.window_area)
        distances = attention.relative_coords_table.numel() // 2
        return positions * each + distances * linear_macs(attention.cpb_mlp)
