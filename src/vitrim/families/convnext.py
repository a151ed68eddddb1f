"""Family ``convnext``: timm's ConvNeXt, run piece by piece.

Served: ConvNeXt, its stem cutting patches or overlapping, its MLP on channels-last rows or as
convolutions of one place, in any depth, width, kernel size, norm, layer scale or none, output
stride and head; any image size that timm itself takes. A map is kept channels-last: timm's own
norms turn it so after the stem, and the permutations before and after its convolutions are views.

ConvNeXt-V2 is refused by name: inside of its MLP each channel is
divided by its norm over all positions, so that a position's features depend on those of the
positions that a method leaves out. Over the computed ones alone it would be another function, which
the weights never learned; over all of them, half of every MLP would be computed everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ConvMlp, GlobalResponseNormMlp, Mlp
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrim.costs.macs import conv_macs, linear_macs
from vitrim.errors import InputError
from vitrim.families.base import MapPyramid, check_channels, refuse_sizes
from vitrim.tokens.calls import called, kind
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid, Sizes

RESPONSE_NORM = (
    "ConvNeXt-V2's response norm divides by a norm over all positions, those too that are left out "
    "(served: ConvNeXt, version 1, such as convnext_tiny)"
)


class ConvNeXt(MapPyramid):
    """Runs one timm ConvNeXt piece by piece; holds no weights of its own."""

    name = "convnext"
    stages_name = "stages"
    classes = (TimmConvNeXt,)
    modules = ("convnext",)
    smallest: ClassVar[Mapping[str, Any]] = {"depths": (1, 1, 1, 1)}
    serves = "timm ConvNeXt, version 1 (convnext_tiny, _small, _base, _large, _xlarge and kin)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        if kind(model.stem[0]) is not nn.Conv2d:
            yield f"a stem that starts with {kind(model.stem[0]).__name__} (served: Conv2d)"
        if model.head.global_pool.is_identity():
            yield "global_pool='' (its forward returns a map; create the model with a pool)"
        for stage in model.stages:
            if kind(stage) is not ConvNeXtStage:
                yield f"stage type {kind(stage).__name__} (served: ConvNeXtStage)"
                return
            for block in stage.blocks:
                if kind(block) is not ConvNeXtBlock:
                    yield f"block type {kind(block).__name__} (served: ConvNeXtBlock)"
                elif kind(block.mlp) is GlobalResponseNormMlp:
                    yield RESPONSE_NORM
                elif kind(block.mlp) not in (Mlp, ConvMlp):
                    yield f"MLP type {kind(block.mlp).__name__} (served: Mlp, ConvMlp)"
                else:
                    continue
                return

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage.blocks) for stage in self.backbone.stages)

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm_pre", "head"

    def block(self, stage: int, index: int) -> Any:
        return self.backbone.stages[stage].blocks[index]

    def stage_dim(self, stage: int) -> int:
        return int(self.backbone.feature_info[stage]["num_chs"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone's weights are meant for (timm's record)."""
        _, height, width = self.backbone.pretrained_cfg["input_size"]
        return int(height), int(width)

    @property
    def reduction(self) -> int:
        downs = (self._downsample(stage) for stage in range(len(self.depths)))
        strides = (max(down.stride) for down in downs if down is not None)
        stem = (max(convolution.stride) for convolution in self._stem_convolutions)
        return int(math.prod(stem) * math.prod(strides))

    @property
    def _stem_convolutions(self) -> list[nn.Conv2d]:
        """One that cuts the image into patches, or several that overlap."""
        return [module for module in self.backbone.stem if isinstance(module, nn.Conv2d)]

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the map after the stem, from the image's (height, width)."""
        sides = list(image_size or self.image_size)
        for conv in self._stem_convolutions:
            padding: Any = conv.padding
            parts = zip(sides, conv.kernel_size, conv.stride, padding, strict=True)
            sides = [(side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in parts]
        return sides[0], sides[1]

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        """Rows and columns of the map in ``stage`` of an image with ``grid`` after the stem."""
        rows, columns = grid
        for down in (self._downsample(earlier) for earlier in range(stage + 1)):
            if down is not None:  # a kernel as large as its stride drops the odd row and column
                rows, columns = rows // down.stride[0], columns // down.stride[1]
        return rows, columns

    def _downsample(self, stage: int) -> Any:
        """The convolution between two stages, or None."""
        downsample = self.backbone.stages[stage].downsample
        return None if isinstance(downsample, nn.Identity) else downsample[1]

    def check_images(self, images: Tensor) -> None:
        check_channels(images, self.backbone.in_chans)
        shape = tuple(images.shape)
        if min(self.stage_grid(self.grid((shape[2], shape[3])), len(self.depths) - 1)) < 1:
            least = self.backbone.feature_info[-1]["reduction"]
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; this backbone needs {least} x {least} "
                "or more"
            )

    def stem(self, images: Tensor, sizes: Sizes = None) -> FeatureMap:
        """The map that an image is first cut into."""
        self.check_images(images)
        whole = (images.shape[2], images.shape[3])
        if len(self._stem_convolutions) > 1:
            refuse_sizes(sizes, "a ConvNeXt whose stem overlaps")
        images = images if sizes is None else self.real_pixels(images, sizes)
        return FeatureMap.of_padded(_nhwc(self.backbone.stem(images)), whole, sizes)

    def enter_stage(self, stage: int, fmap: FeatureMap) -> FeatureMap:
        """The downsampling before the blocks of ``stage``; nothing where there is none."""
        return fmap.with_x(_nhwc(self.backbone.stages[stage].downsample(_nchw(fmap.x_BHWC))))

    def run_block(self, stage: int, index: int, fmap: FeatureMap) -> FeatureMap:
        block: Callable[[Tensor], Tensor] = self.block(stage, index)
        if self.backbone.stages[stage].grad_checkpointing and torch.is_grad_enabled():
            x_BCHW = checkpoint(block, _nchw(fmap.x_BHWC), use_reentrant=False)
            return fmap.with_x(_nhwc(x_BCHW))
        return fmap.with_x(_nhwc(block(_nchw(fmap.x_BHWC))))

    def in_name_of(
        self, stage: int, index: int, run: Callable[[Tensor], Tensor], x_BHWC: Tensor
    ) -> Tensor:
        def forward(x_BCHW: Tensor) -> Tensor:
            return _nchw(run(_nhwc(x_BCHW)))

        return _nhwc(called(self.block(stage, index), forward, _nchw(x_BHWC)))

    def mix(self, stage: int, index: int, x_BHWC: Tensor, real_BHW: Tensor | None = None) -> Tensor:
        """The part of a block that mixes positions: its depthwise convolution, nothing else. The
        padding of a map is 0, as is what lies beyond the map.
        """
        block = self.block(stage, index)
        return _nhwc(block.conv_dw(_nchw(x_BHWC)))

    def channel(self, stage: int, index: int, x: Tensor) -> Tensor:
        """The part of a block on each position (..., C) alone, without the residual: norm, MLP and
        layer scale.
        """
        block = self.block(stage, index)
        if block.use_conv_mlp:  # convolutions of one place each: the rows as places of a map
            x_1CR1 = x.flatten(0, -2).transpose(0, 1)[None, :, :, None]
            out: Tensor = block.mlp(block.norm(x_1CR1))[0, :, :, 0].transpose(0, 1)
            out = out.reshape(x.shape)
        else:
            out = block.mlp(block.norm(x))
        return out if block.gamma is None else out * block.gamma

    def drop_path(self, stage: int, index: int) -> nn.Module:
        """The stochastic depth of :meth:`channel`'s branch."""
        module: nn.Module = self.block(stage, index).drop_path
        return module

    def head(self, fmap: FeatureMap) -> Tensor:
        """Logits (B, classes): pooling, norm and classifier, in the model's own order."""
        logits: Tensor = self.backbone.forward_head(self.normed(fmap))
        return logits

    def normed(self, fmap: FeatureMap) -> Tensor:
        """(B, C, H, W)"""
        features: Tensor = self.backbone.norm_pre(_nchw(fmap.x_BHWC))
        return features

    def pool(self, fmap: FeatureMap) -> Tensor:
        features: Tensor = self.backbone.forward_head(self.normed(fmap), pre_logits=True)
        return features

    def patch_features(self, fmap: FeatureMap) -> Tensor:
        """(B, N, C): each position after the final norm, wherever the model keeps that norm."""
        model, x = self.backbone, _nchw(fmap.x_BHWC)
        normed = model.head.norm(x) if hasattr(model.head, "norm") else model.norm_pre(x)
        return _nhwc(normed).flatten(1, 2)

    def stem_macs(self, grid: Grid) -> int:
        """MACs of the stem, whose convolutions but the last run on larger maps."""
        positions, total = math.prod(grid), 0
        for convolution in reversed(self._stem_convolutions):
            total += positions * conv_macs(convolution)
            positions *= math.prod(convolution.stride)
        return total

    def downsample_macs(self, stage: int, grid: Grid) -> int:
        """MACs of the downsampling before the blocks of ``stage``."""
        down = self._downsample(stage)
        positions = math.prod(self.stage_grid(grid, stage))
        return 0 if down is None else conv_macs(down) * positions

    def mix_macs(self, stage: int, index: int, grid: Grid) -> int:
        """MACs of :meth:`mix` on the whole map."""
        block = self.block(stage, index)
        return conv_macs(block.conv_dw) * math.prod(self.stage_grid(grid, stage))

    def channel_macs(self, stage: int, index: int, num_positions: Any) -> Any:
        """MACs of :meth:`channel` on ``num_positions`` positions."""
        mlp = self.block(stage, index).mlp
        return (linear_macs(mlp) + conv_macs(mlp)) * num_positions

    def head_macs(self) -> int:
        return linear_macs(self.backbone.head)


def _nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def _nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)
