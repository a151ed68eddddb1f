"""Family ``lvvit``: LV-ViT, whose patch tokens have a classifier of their own.

Its blocks, norms and tokens are those of timm's vision transformer, and run as the family ``vit``
runs them. What differs is at both ends: a stem of convolutions, and a head that adds half of the
largest logit that any patch token gives each class. Of dropped tokens the head sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitrim.costs.macs import conv_macs, linear_macs
from vitrim.errors import ConfigError
from vitrim.families.blocks import block_obstacles
from vitrim.families.vit import ViT
from vitrim.layers import losses
from vitrim.models.lvvit import AUX_WEIGHT, ConvStem, LVVisionTransformer
from vitrim.tokens.calls import kind
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Tokens


class LVViT(ViT):
    """Runs one LV-ViT piece by piece; holds no weights of its own."""

    name = "lvvit"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (LVVisionTransformer,)
    modules = ("lvvit",)
    serves = "vitrim's own lvvit_s and lvvit_m, and what timm.create_model makes of these names"
    labels_patches = True

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        if kind(model.patch_embed) is not ConvStem:
            yield f"patch embedding {kind(model.patch_embed).__name__} (served: ConvStem)"
        if isinstance(model.head, nn.Identity) or isinstance(model.aux_head, nn.Identity):
            yield "num_classes=0 (both classifiers are needed)"
        yield from block_obstacles(model, (Block,), (Attention,))

    @property
    def pools_patches(self) -> bool:
        """The largest logit of the patch tokens needs at least one."""
        return True

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm", "head", "aux_head"

    def head(self, tokens: AnyTokens) -> Tensor:
        """Logits (B, classes) of the class token and of the patch tokens that are kept.

        Package tokens behind the class token say nothing; where no patch is left, the class token
        speaks alone.
        """
        normed = tokens.with_x(self.backbone.norm(tokens.x))
        best = normed.max_per_image(self.backbone.aux_head(normed.patches))
        return self._class_logits(normed) + AUX_WEIGHT * best.where(best > -torch.inf, 0)

    def normed(self, tokens: AnyTokens) -> Tensor:
        if tokens.num_prefix > self.num_prefix:
            raise ConfigError(
                "LV-ViT's forward_head would take the package token for a patch; call the model"
            )
        return super().normed(tokens)

    def training_head(self, tokens: AnyTokens) -> Tensor:
        """Logits (B, classes) of the class token alone: the authors' losses see nothing else of
        the answer, and the patch tokens' logits by the token loss.
        """
        return self._class_logits(tokens.with_x(self.backbone.norm(tokens.x)))

    def _class_logits(self, normed: AnyTokens) -> Tensor:
        model = self.backbone
        logits: Tensor = model.head(model.head_drop(normed.prefix_BPC[:, 0]))
        return logits

    def patch_features(self, tokens: Tokens) -> Tensor:
        """(B, N, classes): the patch tokens' own logits."""
        model = self.backbone
        logits: Tensor = model.aux_head(model.norm(tokens.x)[:, tokens.num_prefix :])
        return logits

    @staticmethod
    def token_loss(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
        """KL(teacher || student) of the kept patch tokens' logits."""
        return losses.kept_token_divergence(student_BNC, teacher_BNC, keep_BN)

    def stem_macs(self, num_patches: int) -> int:
        """MACs of the convolutions; all but the last run at half of the image's resolution."""
        stem = self.backbone.patch_embed
        around = sum(conv_macs(conv) for conv in (stem.conv1, stem.conv2, stem.conv3))
        places = (stem.patch_size[0] // 2) * (stem.patch_size[1] // 2)
        return num_patches * int(places * around + conv_macs(stem.proj))

    def head_macs(self, num_tokens: Any, num_packages: Any = 0) -> Any:
        """MACs of both classifiers; the second one reads neither prefix nor package tokens."""
        model, num_patches = self.backbone, num_tokens - self.num_prefix - num_packages
        return linear_macs(model.head) + linear_macs(model.aux_head) * num_patches
