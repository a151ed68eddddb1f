"""timm's vision transformer with settings that none of timm's names has, registered as
``plain_vit``: the epsilon of its norms, and gated MLPs. What models of other libraries become
(``vitrim.from_transformers``) is made again by this name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm, Mlp, SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

__all__ = ["ARGUMENTS", "plain_vit"]

ARGUMENTS = frozenset({"norm_eps", "gated_mlp", "distilled"})
"""What :func:`plain_vit` takes besides timm's arguments."""

default_cfgs = generate_default_cfgs(
    {
        "plain_vit": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def plain_vit(
    pretrained: bool = False,
    norm_eps: float = 1e-6,
    gated_mlp: bool = False,
    distilled: bool = False,
    **kwargs: Any,
) -> Any:
    """A vision transformer.

    Args:
        pretrained: there are no weights of this name.
        norm_eps: of every LayerNorm.
        gated_mlp: whether MLPs are SwiGLU, as DINOv2's largest has them.
        distilled: whether it has DeiT's distillation token and second classifier.
        kwargs: timm's arguments of a vision transformer.
    """
    return build_model_with_cfg(
        VisionTransformerDistilled if distilled else VisionTransformer,
        "plain_vit",
        pretrained,
        norm_layer=partial(LayerNorm, eps=norm_eps),
        mlp_layer=SwiGLUPacked if gated_mlp else Mlp,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
