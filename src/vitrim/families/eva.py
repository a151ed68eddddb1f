"""Family ``eva``: timm's ``Eva``, a plain vision transformer whose tokens carry rotary positions.

Served: EVA, EVA-02, DINOv3, the Perception Encoder, Sapiens2 and the RoPE ViTs, with rotary
positions that all blocks share, that each block has of its own, or none; SwiGLU, norms inside of
attention and MLP, QK-norm, keys and values that heads share, norms before the branches or behind
them; class token, registers, or neither; class-token, average or attention pooling.

Angles are made once a forward, by the backbone's own embedding, and looked up for what is kept: see
:mod:`vitrim.tokens.rotary`. All else is the family ``vit``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from timm.layers import AttentionRope, RotaryEmbeddingMixed
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitrim.families.blocks import SomeTokens, block_obstacles
from vitrim.families.vit import ViT, end_obstacles, stem_obstacles
from vitrim.tokens.plain import Tokens
from vitrim.tokens.rotary import Rotary


class WithRotary(ViT):
    """A plain vision transformer that may have rotary positions, as its ``rope``."""

    @property
    def turns(self) -> bool:
        return self.backbone.rope is not None

    def state(self, features: Tensor) -> Tokens:
        """Features (B, N, C) as the first ``N`` tokens of an image between two blocks."""
        return Tokens.of(features, self.num_prefix, self.rotary())

    def rotary(self) -> Rotary | None:
        """Of an image of the size that the backbone was created for."""
        rope = self.backbone.rope
        if rope is None:
            return None
        known = getattr(rope, "feat_shape", None) is not None
        return Rotary.of(rope.get_embed() if known else rope.get_embed(list(self.grid())))

    def before(self, index: int, tokens: SomeTokens) -> SomeTokens:
        rotary = tokens.rotary and tokens.rotary.at(index)
        return replace(tokens, rotary=rotary)

    def run_blocks(self, indices: Sequence[int], tokens: SomeTokens) -> SomeTokens:
        if tokens.rotary is None or tokens.rotary.is_shared:
            return super().run_blocks(indices, tokens)
        for index in indices:
            tokens = super().run_blocks((index,), self.before(index, tokens))
        return tokens

    def rotary_macs(self, num_patches: int) -> int:
        """MACs of angles that each block has of its own: places times learned frequencies."""
        mixed = isinstance(self.backbone.rope, RotaryEmbeddingMixed)
        return num_patches * self.depth * self.embed_dim if mixed else 0


class Eva(WithRotary):
    """Runs one timm ``Eva`` piece by piece; holds no weights of its own."""

    name = "eva"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (TimmEva,)
    modules: ClassVar[Sequence[str]] = ("eva",)
    serves = "timm Eva (eva_*, eva02_*, vit_*_dinov3, vit_pe_*, vit_*_rope_*)"

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        yield from stem_obstacles(model)
        yield from end_obstacles(model)
        attentions = EvaAttention, AttentionRope
        yield from block_obstacles(model, (EvaBlock, EvaBlockPostNorm), attentions)

    @property
    def has_class(self) -> bool:
        return self.backbone.cls_token is not None

    @property
    def pools_prefix(self) -> bool:
        return bool(self.backbone.global_pool == "map")

    def stem(self, images: Tensor) -> Tokens:
        self.check_images(images)
        model = self.backbone
        x, angles = model._pos_embed(model.patch_embed(images))
        rotary = None if angles is None else Rotary.of(angles)
        return Tokens.of(model.norm_pre(x), self.num_prefix, rotary)

    def stem_macs(self, num_patches: int) -> int:
        return super().stem_macs(num_patches) + self.rotary_macs(num_patches)
