"""Family ``video_swin``: torchvision's SwinTransformer3d, run piece by piece.

Liu et al., "Video Swin Transformer", CVPR 2022 (arXiv 2106.13230). Served: ``swin3d_t``, ``_s`` and
``_b``, whoever made them, and any other SwinTransformer3d built of torchvision's parts, on clips
(B, channels, frames, height, width) of any size. Every piece is torchvision's own sub-module,
called as torchvision calls it, so that a model whose positions all get the full computation gives
torchvision's numbers exactly: with frames, height and width that are padded to whole patches and
windows, and windows that shrink, unshifted, to maps that are smaller.

Stages are counted from 0. A stage's downsampling comes before its blocks, as in timm. Every
``grid`` is that of the stem: the frames, rows and columns of the patches that a clip is first cut
into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import (
    PatchEmbed3d,
    ShiftedWindowAttention3d,
    SwinTransformer3d,
    shifted_window_attention_3d,
)
from torchvision.ops.misc import MLP

from vitrim.costs.macs import linear_macs
from vitrim.errors import ConfigError, InputError
from vitrim.families.base import MapPyramid
from vitrim.layers.semantic_attention import (
    Keys,
    WindowRecord,
    window_cross_attention,
    window_cross_attention_macs,
)
from vitrim.models import video_swin
from vitrim.tokens.calls import called, in_features, kind
from vitrim.tokens.clip_map import ClipMap, Volume
from vitrim.tokens.plain import Sizes

Places = tuple[Sequence[int], Sequence[int]]
"""Rows and columns of a window."""


class VideoSwin(MapPyramid):
    """Runs one of torchvision's Video Swin transformers piece by piece; holds no weights."""

    name = "video_swin"
    stages_name = "features"
    classes = (SwinTransformer3d,)
    modules = ("video_swin",)
    arguments = frozenset({"frames", "img_size"})
    smallest: ClassVar[dict[str, Any]] = {"depths": (1, 1, 2, 1)}
    serves = "torchvision SwinTransformer3d, of clips (swin3d_t, swin3d_s, swin3d_b)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        blocks = [block for stage in model.features[::2] for block in stage]
        parts = {
            "patch embedding": (PatchEmbed3d, [model.patch_embed]),
            "downsampling": (PatchMerging, model.features[1::2]),
            "block": (SwinTransformerBlock, blocks),
            "attention": (ShiftedWindowAttention3d, [getattr(b, "attn", b) for b in blocks]),
            "MLP": (MLP, [getattr(b, "mlp", b) for b in blocks]),
            "pooling": (nn.AdaptiveAvgPool3d, [model.avgpool]),
        }
        for part, (served, modules) in parts.items():
            strangers = {kind(m).__name__ for m in modules if kind(m) is not served}
            if strangers:
                found = ", ".join(sorted(strangers))
                yield f"{part} type {found} (served: {served.__name__})"
                return

    @classmethod
    def describe(cls, model: Any) -> tuple[str, dict[str, Any]]:
        """Torchvision keeps no record of how a model was made; its parts say it."""
        family = cls(model)
        block, last = family.block(0, 0), family.block(len(family.depths) - 1, -1)
        frames, *img_size = family.image_size
        return video_swin.named(
            {
                "patch_size": list(model.patch_embed.tuple_patch_size),
                "window_size": list(block.attn.window_size),
                "embed_dim": family.stage_dim(0),
                "depths": list(family.depths),
                "num_heads": [family.block(i, 0).attn.num_heads for i in range(len(family.depths))],
                "mlp_ratio": block.mlp[0].out_features / family.stage_dim(0),
                "dropout": model.pos_drop.p,
                "attention_dropout": block.attn.attention_dropout,
                "stochastic_depth_prob": last.stochastic_depth.p,
                "num_classes": getattr(model.head, "out_features", model.num_classes),
                "frames": frames,
                "img_size": img_size,
            }
        )

    @property
    def in_channels(self) -> int:
        return int(self.backbone.patch_embed.proj.in_channels)

    def containers(self) -> Iterator[tuple[str, nn.Module]]:
        yield self.stages_name, self.backbone.features
        for number in range(len(self.depths)):
            yield f"{self.stages_name}.{2 * number}", self.backbone.features[2 * number]

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage) for stage in self.backbone.features[::2])

    @property
    def clip_frames(self) -> int:
        return int(self.image_size[0])

    @property
    def image_size(self) -> Volume:
        """Frames, height and width of the clips that the backbone is meant for."""
        record = getattr(self.backbone, "pretrained_cfg", {})
        frames, height, width = video_swin.CLIP_SIZE
        size = record.get("input_size", (3, height, width))
        return (record.get("frames", frames), *size[1:])

    def size_of(self, images: Tensor) -> Volume:
        return tuple(images.shape[2:])

    @property
    def probe_size(self) -> Volume:
        """A clip of a quarter of the pixels, and a little longer than a window in time."""
        frames, height, width = self.image_size
        long = self.backbone.patch_embed.tuple_patch_size[0] * (self.window[0] + 1)
        return min(frames, long), -(-height // 2), -(-width // 2)

    @property
    def window(self) -> Volume:
        """Frames, rows and columns of the windows of all blocks, where a map is as large."""
        return tuple(self.block(0, 0).attn.window_size)

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm", "head"

    def block(self, stage: int, index: int) -> Any:
        return self.backbone.features[2 * stage][index]

    def stage_dim(self, stage: int) -> int:
        return in_features(self.block(stage, 0).attn.proj)

    @property
    def reduction(self) -> int:
        side: int = max(self.backbone.patch_embed.tuple_patch_size[1:])
        return side << len(self.depths) - 1

    def grid(self, image_size: Volume = None) -> Volume:
        """Frames, rows and columns of the patches of a clip of (frames, height, width)."""
        size, patch = image_size or self.image_size, self.backbone.patch_embed.tuple_patch_size
        return tuple(-(-length // side) for length, side in zip(size, patch, strict=True))

    def stage_grid(self, grid: Volume, stage: int) -> Volume:
        """The same in a stage: its rows and columns are halved before it, its frames are not."""
        frames, rows, columns = grid
        return frames, -(-rows // 2**stage), -(-columns // 2**stage)

    def check_images(self, images: Tensor) -> None:
        shape, channels = tuple(images.shape), self.in_channels
        if images.ndim == 4:
            raise InputError(
                f"images have shape {shape}; this model takes clips (batch, {channels}, frames, "
                "height, width)"
            )
        if images.ndim != 5 or shape[1] != channels or 0 in shape[2:]:
            raise InputError(
                f"clips have shape {shape}; expected (batch, {channels}, frames, height, width)"
            )

    def state(self, features: Tensor) -> ClipMap:
        return ClipMap(features)

    def stem(self, images: Tensor, sizes: Sizes = None) -> ClipMap:
        """The patch embedding: the maps before stage 0."""
        self.check_images(images)
        return ClipMap(self.backbone.pos_drop(self.backbone.patch_embed(images)))

    def enter_stage(self, stage: int, clip: ClipMap) -> ClipMap:
        """What a stage's blocks start from: merged patches, or the same maps in stage 0."""
        return clip.with_x(self.backbone.features[2 * stage - 1](clip.x_BTHWC)) if stage else clip

    def run_block(self, stage: int, index: int, clip: ClipMap) -> ClipMap:
        return clip.with_x(self.block(stage, index)(clip.x_BTHWC))

    def mix(
        self, stage: int, index: int, x_BTHWC: Tensor, places: Places, with_bias: bool = True
    ) -> Tensor:
        """The attention branch of a block among semantic tokens, without a residual: torchvision's
        own function, in windows of as many rows and columns as ``places`` has, shifted in time
        alone.

        Args:
            stage: of the block.
            index: of the block.
            x_BTHWC: semantic tokens, on the map of each frame.
            places: which row and which column of the backbone's windows each row and column of a
                window's tokens stands for.
            with_bias: add the position biases of the offsets between these places.
        """
        block, size = self.block(stage, index), tuple(x_BTHWC.shape[1:4])
        attention = block.attn
        lengths = (self.window[0], len(places[0]), len(places[1]))
        window = [min(pair) for pair in zip(lengths, size, strict=True)]
        shift = [attention.shift_size[0] if size[0] > window[0] else 0, 0, 0]
        bias = x_BTHWC.new_zeros(())
        if with_bias:
            bias = _biases(attention, window[0], places[0][: window[1]], places[1][: window[2]])

        def run(x_BTHWC: Tensor) -> Tensor:
            out: Tensor = shifted_window_attention_3d(
                x_BTHWC,
                attention.qkv.weight,
                attention.proj.weight,
                bias,
                window,
                attention.num_heads,
                shift_size=shift,
                attention_dropout=attention.attention_dropout,
                dropout=attention.dropout,
                qkv_bias=attention.qkv.bias,
                proj_bias=attention.proj.bias,
                training=attention.training,
            )
            return out

        return called(attention, run, block.norm1(x_BTHWC))

    def attend(
        self,
        stage: int,
        index: int,
        query_BTWQC: Tensor,
        memory_BTMC: Tensor,
        keys: Keys,
    ) -> tuple[Tensor, WindowRecord]:
        """A block's norm and attention in each frame between other windows than its own, without
        position biases and without a residual; see ``window_cross_attention``. The record is of the
        frames of all clips, one after the other.
        """
        block, frames = self.block(stage, index), query_BTWQC.shape[:2]
        query, memory = block.norm1(query_BTWQC), block.norm1(memory_BTMC)
        out, record = window_cross_attention(
            block.attn,
            query.flatten(0, 1),
            memory.flatten(0, 1),
            keys,
            inside=_InTimmsWords(block.attn),
        )
        return out.reshape(*frames, *out.shape[1:]), record

    def channel(self, stage: int, index: int, x: Tensor) -> Tensor:
        """The second half of a block without residual and drop path, on positions (..., C)."""
        block = self.block(stage, index)
        out: Tensor = block.mlp(block.norm2(x))
        return out

    def drop_path(self, stage: int, index: int) -> nn.Module:
        """What drops a half of a block for whole clips in training."""
        module: nn.Module = self.block(stage, index).stochastic_depth
        return module

    attention_drop_path = drop_path

    def head(self, clip: ClipMap) -> Tensor:
        """Logits (B, classes): final norm, pooling and classifier."""
        logits: Tensor = self.backbone.head(self.pool(clip))
        return logits

    def normed(self, clip: ClipMap) -> Tensor:
        """(B, T, H, W, C)"""
        features: Tensor = self.backbone.norm(clip.x_BTHWC)
        return features

    def pool(self, clip: ClipMap) -> Tensor:
        pooled: Tensor = self.backbone.avgpool(self.normed(clip).permute(0, 4, 1, 2, 3))
        return pooled.flatten(1)

    def patch_features(self, clip: ClipMap) -> Tensor:
        """(B, N, C): the positions of the last maps after the final norm."""
        return self.normed(clip).flatten(1, 3)

    def pyramid(
        self, images: Tensor, indices: Sequence[int] | None = None, sizes: Sizes = None
    ) -> tuple[list[Tensor], Any]:
        raise ConfigError(
            "video_swin gives no feature maps: what reads them are the tasks of images, and its "
            "maps are of clips; call the model for logits"
        )

    def stem_macs(self, grid: Volume) -> int:
        return math.prod(grid) * int(self.backbone.patch_embed.proj.weight.numel())

    def downsample_macs(self, stage: int, grid: Volume) -> int:
        return int(self.merge_macs(stage, math.prod(self.stage_grid(grid, stage)))) if stage else 0

    def merge_macs(self, stage: int, num_positions: Any) -> Any:
        """MACs of a stage's downsampling to ``num_positions`` positions (a number or a tensor)."""
        return linear_macs(self.backbone.features[2 * stage - 1]) * num_positions

    def mix_macs(self, stage: int, index: int, grid: Volume) -> int:
        return self.windows_macs(stage, index, self.stage_grid(grid, stage), self.window)

    def windows_macs(self, stage: int, index: int, size: Volume, window: Volume) -> int:
        """MACs of the attention branch of a block on maps of ``size`` positions, padded to whole
        windows; a window shrinks where they are smaller.
        """
        attention = self.block(stage, index).attn
        window = [min(pair) for pair in zip(window, size, strict=True)]
        sides = zip(size, window, strict=True)
        positions = math.prod(-(-length // side) * side for length, side in sides)
        width = in_features(attention.proj)
        area: int = math.prod(window)
        return int(positions * (linear_macs(attention) + 2 * width * area))

    def channel_macs(self, stage: int, index: int, num_positions: Any) -> Any:
        return linear_macs(self.block(stage, index).mlp) * num_positions

    def attend_macs(
        self, stage: int, index: int, num_queries: Any, num_rows: Any, num_keys: Any
    ) -> Any:
        """MACs of :meth:`attend`: all queries, rows that are projected, keys of each query."""
        attention = self.block(stage, index).attn
        return window_cross_attention_macs(attention, num_queries, num_rows, num_keys)

    def head_macs(self) -> int:
        return linear_macs(self.backbone.head)


def _biases(attention: Any, frames: int, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """(1, H, N, N): the position biases among these places of a window of so many frames."""
    _, height, width = attention.window_size
    index = attention.relative_position_index
    frame, row, column = (
        torch.as_tensor(place, device=index.device) for place in (range(frames), rows, columns)
    )
    place_N = ((frame[:, None, None] * height + row[:, None]) * width + column).flatten()
    index_NN = index[place_N][:, place_N]
    biases: Tensor = attention.relative_position_bias_table[index_NN]
    return biases.permute(2, 0, 1).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _InTimmsWords:
    """What timm calls the rest of torchvision's attention layer."""

    attention: Any
    fused_attn = True

    @property
    def training(self) -> bool:
        return bool(self.attention.training)

    @property
    def attn_drop(self) -> nn.Dropout:
        return nn.Dropout(self.attention.attention_dropout)

    def proj_drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.attention.dropout, self.training)
