"""Backbones that timm does not have, registered with it: importing this makes their names known."""

from __future__ import annotations

from vitrim.models.conv_stem_swin import SwinConvStem
from vitrim.models.lvvit import LVVisionTransformer
from vitrim.models.plain_vit import plain_vit
from vitrim.models.video_swin import SwinTransformer3d

__all__ = ["LVVisionTransformer", "SwinConvStem", "SwinTransformer3d", "plain_vit"]
