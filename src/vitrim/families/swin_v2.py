"""Family ``swin_v2``: timm's SwinTransformerV2 and SwinTransformerV2Cr, run piece by piece.

Attention compares directions (cosines), by a learned scale and biases that a small network makes
of distances, and the norms stand behind attention and MLP. Windows, maps and stages are those of
the family ``swin``, and so is the rest. Methods that look into the first version's attention do not
run on it; images that were padded to one size are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from timm.layers import PatchEmbed
from timm.models import swin_transformer_v2_cr as cr
from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
    WindowAttention,
)
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from vitrim.costs.macs import linear_macs
from vitrim.errors import InputError
from vitrim.families.base import check_channels, refuse_sizes
from vitrim.families.swin import Swin, part_obstacles
from vitrim.tokens.calls import in_features
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid, Sizes


class SwinV2(Swin):
    """Runs one timm Swin transformer V2 piece by piece; holds no weights of its own."""

    name = "swin_v2"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformerV2,)
    modules: ClassVar[Sequence[str]] = ("swin_transformer_v2",)
    serves = "timm SwinTransformerV2 (swinv2_tiny, _small, _base, _large)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        served = SwinTransformerV2Stage, PatchMerging, SwinTransformerV2Block, WindowAttention
        yield from part_obstacles(model, model.layers, (PatchEmbed,), *served)

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
        return positions * each + self.bias_macs(attention)

    def bias_macs(self, attention: Any) -> int:
        """MACs of the network that makes the biases of all distances."""
        distances: int = attention.relative_coords_table.numel() // 2
        return distances * linear_macs(attention.cpb_mlp)


class SwinV2Cr(SwinV2):
    """The same of timm's SwinTransformerV2Cr: another implementation, with biases of all pairs, and
    norms at the end of some blocks.
    """

    stages_name = "stages"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformerV2Cr,)
    modules: ClassVar[Sequence[str]] = ("swin_transformer_v2_cr",)
    serves = "timm SwinTransformerV2Cr (swinv2_cr_*)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        served = cr.SwinTransformerV2CrStage, cr.PatchMerging, cr.SwinTransformerV2CrBlock
        attention = cr.WindowMultiHeadAttention
        yield from part_obstacles(model, model.stages, (cr.PatchEmbed,), *served, attention)

    @property
    def head_parts(self) -> Sequence[str]:
        return ("head",)

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        height, width = image_size or self.image_size
        rows, columns = self.backbone.patch_embed.patch_size
        return height // rows, width // columns

    def check_images(self, images: Tensor) -> None:
        check_channels(images, self.backbone.in_chans)
        embed, size = self.backbone.patch_embed, (images.shape[2], images.shape[3])
        if (embed.strict_img_size and size != embed.img_size) or min(self.grid(size)) < 1:
            raise InputError(
                f"images are {size[0]} x {size[1]} pixels; this backbone takes "
                f"{' x '.join(map(str, embed.img_size))}. Resize them, or create the backbone with "
                "img_size=... or dynamic_img_size=True"
            )

    def stem(self, images: Tensor, sizes: Sizes = None) -> FeatureMap:
        refuse_sizes(sizes, self.name)
        self.check_images(images)
        return FeatureMap(self.backbone.patch_embed(images).permute(0, 2, 3, 1))

    def mix(self, stage: int, index: int, x_BHWC: Tensor, real_BHW: Tensor | None = None) -> Tensor:
        block = self.block(stage, index)
        mixed: Tensor = x_BHWC + block.drop_path1(block.norm1(block._shifted_window_attn(x_BHWC)))
        return mixed

    def finish(self, stage: int, index: int, x_BHWC: Tensor) -> Tensor:
        """The norm at the end of some blocks."""
        normed: Tensor = self.block(stage, index).norm3(x_BHWC)
        return normed

    def normed(self, fmap: FeatureMap) -> Tensor:
        """(B, C, H, W): the last block's own norm was the last."""
        return fmap.x_BCHW

    def patch_features(self, fmap: FeatureMap) -> Tensor:
        return fmap.x_BHWC.flatten(1, 2)

    def bias_macs(self, attention: Any) -> int:
        """MACs of the network that makes the biases of all pairs."""
        return len(attention.relative_coordinates_log) * linear_macs(attention.meta_mlp)
