"""Family ``swin``: timm's SwinTransformer (the first version), run piece by piece.

Served: Swin T, S, B and L and the S3 variants, in any image size that timm itself takes: created
for it, or flexible (``dynamic_img_size=True``); with timm's patch embedding or the convolutional
stem of ``vitrim.models.conv_stem_swin``. Every piece is timm's own sub-module, called as timm calls
it, so that a model whose positions all get the full computation gives timm's numbers exactly. What
cannot be run so is refused by name.

Stages are counted from 0. A stage's downsampling comes before its blocks, as timm builds it. Every
``grid`` is that of the stem: the rows and columns of the patches that an image is first cut into;
:meth:`Swin.stage_grid` gives that of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, Mlp, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrim.costs.macs import conv_macs, linear_macs
from vitrim.families.base import MapPyramid, check_patched_images
from vitrim.layers.semantic_attention import (
    Keys,
    WindowRecord,
    window_cross_attention,
    window_cross_attention_macs,
)
from vitrim.layers.sparse_windows import real_attention
from vitrim.models.conv_stem_swin import SwinConvStem
from vitrim.tokens.calls import called, in_features, kind
from vitrim.tokens.feature_map import FeatureMap, real_places
from vitrim.tokens.plain import Grid, Sizes

_STEMS = (PatchEmbed, SwinConvStem)


class Swin(MapPyramid):
    """Runs one timm Swin transformer piece by piece; holds no weights of its own."""

    name = "swin"
    stages_name = "layers"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer,)
    modules: ClassVar[Sequence[str]] = ("swin_transformer", "conv_stem_swin")
    smallest: ClassVar[Mapping[str, Any]] = {"depths": (1, 1, 1, 1)}
    serves = "timm SwinTransformer, the first version (swin_tiny, _small, _base, _large, swin_s3)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        served = SwinTransformerStage, PatchMerging, SwinTransformerBlock, WindowAttention
        yield from part_obstacles(model, model.layers, _STEMS, *served)

    @property
    def _levels(self) -> Any:
        """Timm's stages."""
        return getattr(self.backbone, self.stages_name)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage.blocks) for stage in self._levels)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.backbone.patch_embed.img_size
        return int(height), int(width)

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm", "head"

    def block(self, stage: int, index: int) -> Any:
        return self._levels[stage].blocks[index]

    def stage_dim(self, stage: int) -> int:
        return int(self.block(stage, 0).dim)

    @property
    def reduction(self) -> int:
        side: int = max(self.backbone.patch_embed.patch_size)
        return side << len(self.depths) - 1

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the patch grid of an image of ``image_size`` (height, width)."""
        height, width = image_size or self.image_size
        rows, columns = self.backbone.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        return -(-grid[0] // 2**stage), -(-grid[1] // 2**stage)

    def check_images(self, images: Tensor) -> None:
        check_patched_images(images, self.backbone, not self.backbone.patch_embed.strict_img_size)

    def stem(self, images: Tensor, sizes: Sizes = None) -> FeatureMap:
        """The patch embedding: the map before stage 0."""
        self.check_images(images)
        embed, whole = self.backbone.patch_embed, (images.shape[2], images.shape[3])
        if sizes is None:
            return FeatureMap(embed(images))
        images = self.real_pixels(images, sizes)
        if kind(embed) is SwinConvStem:
            x_BHWC = called(embed, partial(_real_convolutions, embed, sizes), images)
        else:
            x_BHWC = embed(images)
        return FeatureMap.of_padded(x_BHWC, whole, sizes)

    def enter_stage(self, stage: int, fmap: FeatureMap) -> FeatureMap:
        """What a stage's blocks start from: merged patches, or the same map in stage 0."""
        return fmap.with_x(self._levels[stage].downsample(fmap.x_BHWC))

    def run_block(
        self, stage: int, index: int, fmap: FeatureMap, pad_first: bool = False
    ) -> FeatureMap:
        """Block ``index`` of a stage on every position: timm's own forward.

        Where windows hang over the border, timm shifts the map before it pads it, and the original
        Swin code after; ``pad_first`` asks for the latter. A map with padding of its own is padded
        first too, and no padding is seen.
        """
        block, real_BHW = self.block(stage, index), fmap.real_BHW
        run = partial(called, block, partial(_padded_first, block)) if pad_first else block
        if real_BHW is not None:
            run = partial(called, block, partial(_of_real, block, real_BHW))
        if self._levels[stage].grad_checkpointing and torch.is_grad_enabled():
            return fmap.with_x(checkpoint(run, fmap.x_BHWC, use_reentrant=False))
        return fmap.with_x(run(fmap.x_BHWC))

    def mix(self, stage: int, index: int, x_BHWC: Tensor, real_BHW: Tensor | None = None) -> Tensor:
        """The first half of a block: window attention with its norm and residual."""
        block = self.block(stage, index)
        x = block.norm1(x_BHWC)
        out = block._attn(x) if real_BHW is None else real_attention(block, x, real_BHW)
        mixed: Tensor = x_BHWC + block.drop_path1(out)
        return mixed

    def channel(self, stage: int, index: int, x: Tensor) -> Tensor:
        """The second half of a block without residual and drop path, on positions (..., C)."""
        block = self.block(stage, index)
        out: Tensor = block.mlp(block.norm2(x))
        return out

    def attention_drop_path(self, stage: int, index: int) -> nn.Module:
        """What drops the first half of a block for whole images in training."""
        module: nn.Module = self.block(stage, index).drop_path1
        return module

    def drop_path(self, stage: int, index: int) -> nn.Module:
        """What drops the second half of a block for whole images in training."""
        module: nn.Module = self.block(stage, index).drop_path2
        return module

    def attend(
        self,
        stage: int,
        index: int,
        query_BWQC: Tensor,
        memory_BMC: Tensor,
        keys: Keys,
        bias_HQK: Tensor | None = None,
        project_once: bool = True,
    ) -> tuple[Tensor, WindowRecord]:
        """A block's norm and attention between other windows than its own, without a residual; see
        ``window_cross_attention``.
        """
        block = self.block(stage, index)
        query, memory = block.norm1(query_BWQC), block.norm1(memory_BMC)
        return window_cross_attention(block.attn, query, memory, keys, bias_HQK, project_once)

    def head(self, fmap: FeatureMap) -> Tensor:
        """Logits (B, classes): final norm, pooling and classifier."""
        logits: Tensor = self.backbone.forward_head(self.normed(fmap))
        return logits

    def normed(self, fmap: FeatureMap) -> Tensor:
        """(B, H, W, C)"""
        features: Tensor = self.backbone.norm(fmap.x_BHWC)
        return features

    def pool(self, fmap: FeatureMap) -> Tensor:
        features: Tensor = self.backbone.forward_head(self.normed(fmap), pre_logits=True)
        return features

    def patch_features(self, fmap: FeatureMap) -> Tensor:
        """(B, N, C): the positions of the last map after the final norm."""
        features: Tensor = self.backbone.norm(fmap.x_BHWC).flatten(1, 2)
        return features

    def stem_macs(self, grid: Grid) -> int:
        """MACs of the patch embedding: one convolution, or several of which each halves the map."""
        modules = self.backbone.patch_embed.proj.modules()
        positions, total = math.prod(grid), 0
        for convolution in reversed([m for m in modules if isinstance(m, nn.Conv2d)]):
            total += positions * conv_macs(convolution)
            positions *= math.prod(convolution.stride)
        return total

    def downsample_macs(self, stage: int, grid: Grid) -> int:
        """MACs of a stage's downsampling; 0 for stage 0, which has none."""
        return int(self.merge_macs(stage, math.prod(self.stage_grid(grid, stage))))

    def merge_macs(self, stage: int, num_positions: Any) -> Any:
        """MACs of a stage's downsampling to ``num_positions`` positions (a number or a tensor)."""
        return linear_macs(self._levels[stage].downsample) * num_positions

    def mix_macs(self, stage: int, index: int, grid: Grid) -> int:
        """MACs of :meth:`mix`, padding to whole windows included."""
        block = self.block(stage, index)
        sides = zip(self.stage_grid(grid, stage), block.window_size, strict=True)
        positions: int = math.prod(-(-length // window) * window for length, window in sides)
        width = in_features(block.attn.proj)
        return positions * (linear_macs(block.attn) + 2 * width * int(block.window_area))

    def channel_macs(self, stage: int, index: int, num_positions: Any) -> Any:
        """MACs of :meth:`channel` on ``num_positions`` positions (a number or a tensor)."""
        return linear_macs(self.block(stage, index).mlp) * num_positions

    def attend_macs(
        self, stage: int, index: int, num_queries: Any, num_rows: Any, num_keys: Any
    ) -> Any:
        """MACs of :meth:`attend`: all queries, rows that are projected, keys of each query."""
        attention = self.block(stage, index).attn
        return window_cross_attention_macs(attention, num_queries, num_rows, num_keys)

    def head_macs(self) -> int:
        return linear_macs(self.backbone.head)


def _real_convolutions(embed: Any, sizes: Sequence[Grid], images: Tensor) -> Tensor:
    """The convolutional stem, its second convolution seeing 0 beyond each image's own border."""
    first, second = embed.proj[:2], embed.proj[2:]
    half = first(images)
    whole, grid = (images.shape[2], images.shape[3]), (half.shape[2], half.shape[3])
    real_BHW = real_places(sizes, whole, grid, images.device)
    x: Tensor = second(half.masked_fill(~real_BHW.unsqueeze(1), 0))
    return x.permute(0, 2, 3, 1)


def _of_real(block: Any, real_BHW: Tensor, x_BHWC: Tensor) -> Tensor:
    """A block on a map with padding of its own."""
    x = x_BHWC + block.drop_path1(real_attention(block, block.norm1(x_BHWC), real_BHW))
    out: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
    return out


def _padded_first(block: Any, x_BHWC: Tensor) -> Tensor:
    """A block on a map that is padded to whole windows before it is shifted."""
    height, width = x_BHWC.shape[1:3]
    rows, columns = block.window_size
    x = F.pad(block.norm1(x_BHWC), (0, 0, 0, -width % columns, 0, -height % rows))
    x = x_BHWC + block.drop_path1(block._attn(x)[:, :height, :width])
    out: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
    return out


def part_obstacles(
    model: Any, levels: Any, stems: Sequence[type[nn.Module]], *served: type[nn.Module]
) -> Iterator[str]:
    """What keeps a Swin transformer from being run piece by piece, of whose ``levels`` the stages,
    downsampling, blocks and attention layers are ``served``.
    """
    if kind(model.patch_embed) not in stems:
        names = ", ".join(stem.__name__ for stem in stems)
        yield f"patch embedding {kind(model.patch_embed).__name__} (served: {names})"
    if kind(model.head) is not ClassifierHead:
        yield f"head {kind(model.head).__name__} (served: ClassifierHead)"
    merging = [stage.downsample for stage in levels[1:]]
    blocks = [block for stage in levels for block in getattr(stage, "blocks", ())]
    inside = [[getattr(b, name, None) for b in blocks] for name in ("attn", "mlp")]
    parts = "stage", "downsampling", "block", "attention", "MLP"
    found = zip(parts, (*served, Mlp), (levels, merging, blocks, *inside), strict=True)
    for name, expected, modules in found:
        strangers = {kind(module).__name__ for module in modules if kind(module) is not expected}
        if strangers:
            yield f"{name} type {', '.join(sorted(strangers))} (served: {expected.__name__})"
            return
