"""Family ``naflex``: timm's ``NaFlexVit`` on whole images, as its ``forward`` takes them.

Served: NaFlex ViT, SigLIP2 and C-RADIO, with learned, factorised or rotary positions at any image
size, class token, registers, class-token, average or attention pooling. Batches of the patches of
several images of unlike sizes, which its loaders make, are no images, and are refused: give images,
a size at a time. All else is the families ``vit`` and ``eva``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitrim.costs.macs import conv_macs, linear_macs
from vitrim.errors import InputError
from vitrim.families.base import check_channels
from vitrim.families.blocks import block_obstacles
from vitrim.families.eva import WithRotary
from vitrim.families.vit import end_obstacles
from vitrim.tokens.plain import Grid, Tokens
from vitrim.tokens.rotary import Rotary


class NaFlex(WithRotary):
    """Runs one timm ``NaFlexVit`` piece by piece; holds no weights of its own."""

    name = "naflex"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (NaFlexVit,)
    modules: ClassVar[Sequence[str]] = ("naflexvit",)
    arguments = frozenset(field.name for field in fields(NaFlexVitCfg))
    serves = "timm NaFlexVit on images of one size (naflexvit_*)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        yield from end_obstacles(model)
        attentions = Attention, EvaAttention, AttentionRope
        yield from block_obstacles(model, (Block, EvaBlock), attentions)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone's weights are meant for (timm's record)."""
        _, height, width = self.backbone.pretrained_cfg["input_size"]
        return int(height), int(width)

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        rows, columns = self.backbone.embeds.dynamic_feat_size(image_size or self.image_size)
        return int(rows), int(columns)

    def check_images(self, images: Tensor) -> None:
        check_channels(images, self.backbone.in_chans)
        embeds = self.backbone.embeds
        height, width = embeds.patch_size
        if not embeds.dynamic_img_pad and (images.shape[2] % height or images.shape[3] % width):
            raise InputError(
                f"images are {images.shape[2]} x {images.shape[3]} pixels; both sides must be "
                f"multiples of the patch size {height} x {width}"
            )

    def stem(self, images: Tensor) -> Tokens:
        self.check_images(images)
        embedded = self.backbone._forward_embeds(images, None, None, None)
        angles = embedded["rope_embeds"]
        rotary = None if angles is None else Rotary.of(angles)
        return Tokens.of(embedded["patches"], self.num_prefix, rotary)

    def stem_macs(self, num_patches: int) -> int:
        projection = self.backbone.embeds.proj
        each = linear_macs(projection) + conv_macs(projection)
        return num_patches * each + self.rotary_macs(num_patches)
