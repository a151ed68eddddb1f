"""Family ``pit``: timm's PoolingVisionTransformer (PiT), run piece by piece.

Served: PiT Ti, XS, S and B, distilled ones too, in any image size that they were created for. Each
stage is a plain vision transformer of its own width; between two stages a strided convolution pools
the map of patch tokens, and a linear layer widens the prefix tokens. Every piece is timm's own
sub-module, called as timm calls it, so that a model from which nothing is dropped gives timm's
numbers exactly. What cannot be run so is refused by name.

Stages are counted from 0. A stage's pooling comes before its blocks, as timm builds it. Every
``grid`` is that of the stem; :meth:`PiT.stage_grid` gives that of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.pit import ConvEmbedding, Pooling, PoolingVisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor

from vitrim.costs.macs import conv_macs, linear_macs, transformer_block_macs
from vitrim.errors import InputError
from vitrim.families import blocks
from vitrim.families.base import Pyramid, check_channels, refuse_sizes
from vitrim.tokens.calls import kind
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Grid, Sizes, Tokens


class PiT(Pyramid):
    """Runs one timm pooling-based vision transformer piece by piece; holds no weights of its own.

    Between two stages the tokens must be a whole map again: none masked, each in its place.
    """

    name = "pit"
    stages_name = "transformers"
    classes = (PoolingVisionTransformer,)
    modules = ("pit",)
    serves = "timm PoolingVisionTransformer (pit_ti, pit_xs, pit_s, pit_b and their distilled kin)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        if kind(model.patch_embed) is not ConvEmbedding:
            yield f"patch embedding {kind(model.patch_embed).__name__} (served: ConvEmbedding)"
        if model.global_pool != "token":
            yield f"global_pool={model.global_pool!r} (served: token)"
        if model.distilled_training:
            yield "distilled_training=True (its forward returns two logits; switch it off)"
        stages = model.transformers
        all_blocks = [block for stage in stages for block in stage.blocks]
        parts = {
            "pooling": (Pooling, [stage.pool for stage in stages][1:]),
            "block": (Block, all_blocks),
            "attention": (Attention, [getattr(block, "attn", None) for block in all_blocks]),
            "MLP": (Mlp, [getattr(block, "mlp", None) for block in all_blocks]),
        }
        for part, (served, modules) in parts.items():
            strangers = sorted({kind(m).__name__ for m in modules if kind(m) is not served})
            if strangers:
                yield f"{part} type {', '.join(strangers)} (served: {served.__name__})"
                return

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage.blocks) for stage in self.backbone.transformers)

    @property
    def num_prefix(self) -> int:
        """The class token, and the distillation token if there is one."""
        return int(self.backbone.num_tokens)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.backbone.patch_embed.img_size
        return int(height), int(width)

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm", "head", "head_dist"

    def block(self, stage: int, index: int) -> Any:
        return self.backbone.transformers[stage].blocks[index]

    def stage_dim(self, stage: int) -> int:
        return int(self.block(stage, 0).norm1.weight.numel())

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the patches, which overlap, of an image of (height, width)."""
        conv = self.backbone.patch_embed.conv
        sides = zip(image_size or self.image_size, conv.kernel_size, conv.stride, strict=True)
        rows, columns = ((length - size) // stride + 1 for length, size, stride in sides)
        return int(rows), int(columns)

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        return -(-grid[0] // 2**stage), -(-grid[1] // 2**stage)

    def check_images(self, images: Tensor) -> None:
        check_channels(images, self.backbone.in_chans)
        shape = tuple(images.shape)
        if self.grid((shape[2], shape[3])) != self.grid():
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; this backbone takes "
                f"{self.image_size[0]} x {self.image_size[1]}. Resize them, or create the backbone "
                "with img_size=..."
            )

    def stem(self, images: Tensor, sizes: Sizes = None) -> Tokens:
        """Patch embedding, positions and prefix tokens: the tokens before stage 0."""
        refuse_sizes(sizes, self.name)
        self.check_images(images)
        model = self.backbone
        map_BCHW = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        return _tokens(map_BCHW, model.cls_token.expand(images.shape[0], -1, -1))

    def enter_stage(self, stage: int, tokens: Tokens) -> Tokens:
        """What a stage's blocks start from: the pooled map, and the prefix tokens (package tokens
        behind the model's own among them) widened; in stage 0 the same tokens.
        """
        part = self.backbone.transformers[stage]
        if part.pool is not None:
            tokens = _tokens(*part.pool(self.as_map(stage - 1, tokens), tokens.prefix_BPC))
        return tokens.with_x(part.norm(tokens.x))

    def as_map(self, stage: int, tokens: Tokens) -> Tensor:
        """(B, C, rows, columns): the patch tokens of a stage, all of them present and in order."""
        rows, columns = self.stage_grid(self.grid(), stage)
        patches = tokens.patches
        return patches.transpose(1, 2).reshape(patches.shape[0], patches.shape[2], rows, columns)

    def run_block(self, stage: int, index: int, tokens: AnyTokens) -> AnyTokens:
        """Block ``index`` of a stage: timm's own (fused) forward, masked, or packed."""
        return blocks.run_block(self.block(stage, index), tokens, has_class=True)

    def head(self, tokens: AnyTokens) -> Tensor:
        """Logits (B, classes): the final norm of the model's prefix tokens, and the classifier."""
        logits: Tensor = self.backbone.forward_head(self.normed(tokens))
        return logits

    def normed(self, tokens: AnyTokens) -> Tensor:
        """(B, P, C): the model's prefix tokens alone, as timm gives them."""
        features: Tensor = self.backbone.norm(tokens.prefix_BPC[:, : self.num_prefix])
        return features

    def pool(self, tokens: AnyTokens) -> Tensor:
        features: Tensor = self.backbone.forward_head(self.normed(tokens), pre_logits=True)
        return features

    def patch_features(self, tokens: Tokens) -> Tensor:
        """(B, N, C): the patch tokens after the last block; the model has no norm for them."""
        return tokens.patches

    def level_macs(self, stage: int, grid: Grid) -> int:
        num_tokens = math.prod(self.stage_grid(grid, stage)) + self.num_prefix
        blocks = (self.block_macs(stage, index, num_tokens) for index in range(self.depths[stage]))
        return int(self.downsample_macs(stage, grid, self.num_prefix) + sum(blocks))

    def stem_macs(self, grid: Grid) -> int:
        """MACs of the patch embedding."""
        return math.prod(grid) * conv_macs(self.backbone.patch_embed.conv)

    def downsample_macs(self, stage: int, grid: Grid, num_prefix: int) -> int:
        """MACs of a stage's pooling, given the prefix tokens that pass; 0 for stage 0."""
        pool = self.backbone.transformers[stage].pool
        if pool is None:
            return 0
        positions = math.prod(self.stage_grid(grid, stage))
        return positions * conv_macs(pool.conv) + num_prefix * linear_macs(pool.fc)

    def block_macs(self, stage: int, index: int, num_tokens: Any) -> Any:
        """MACs of a block on ``num_tokens`` tokens, prefix tokens included."""
        block = self.block(stage, index)
        return transformer_block_macs(num_tokens, linear_macs(block), block.attn.attn_dim)

    def head_macs(self) -> int:
        """MACs of the classifier, or of both."""
        model = self.backbone
        return sum(linear_macs(head) for head in (model.head, model.head_dist) if head is not None)


def _tokens(map_BCHW: Tensor, prefix_BPC: Tensor) -> Tokens:
    patches = Tokens.of(map_BCHW.flatten(2).transpose(1, 2), num_prefix=0)
    return patches.with_prefix(prefix_BPC)
