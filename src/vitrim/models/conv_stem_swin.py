"""Swin transformers with a convolutional stem, registered with timm: ``conv_stem_swin_tiny`` ...

STViT-R (Chang et al., CVPR 2023) replaces Swin's patch embedding by two 3 x 3 convolutions of
stride 2, each with BatchNorm and Hardswish, without a norm behind them. Everything else is timm's
own model, so that it can be trained, used dense and made sparse like any other Swin. There are no
published dense weights of it.
"""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from torch import nn

__all__ = ["SwinConvStem"]

_CONFIG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj.0.c",
    "classifier": "head.fc",
}
default_cfgs = generate_default_cfgs(
    {f"conv_stem_swin_{size}": _CONFIG for size in ("tiny", "small", "base")}
)


class ConvNorm(nn.Module):
    """A 3 x 3 convolution of stride 2, and BatchNorm."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Any) -> Any:
        return self.bn(self.c(x))


class SwinConvStem(PatchEmbed):
    """Patches of 4 x 4 pixels by two convolutions; images are padded below and right to fit."""

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        if to_2tuple(patch_size) != (4, 4):
            raise ValueError(f"patch_size is {patch_size}; the convolutional stem makes 4 x 4")
        super().__init__(
            img_size,
            4,
            in_chans,
            embed_dim,
            output_fmt=output_fmt,
            strict_img_size=strict_img_size,
            dynamic_img_pad=True,
        )
        half = embed_dim // 2
        steps = [ConvNorm(in_chans, half), nn.Hardswish(), ConvNorm(half, embed_dim)]
        self.proj: nn.Module = nn.Sequential(*steps, nn.Hardswish()).to(**factory)  # type: ignore[assignment]

    def _init_img_size(self, img_size: Any) -> Any:
        height, width = to_2tuple(img_size)
        grid = -(-height // 4), -(-width // 4)
        return (height, width), grid, grid[0] * grid[1]


def _create(name: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> Any:
    sizes = {"patch_size": 4, "window_size": 7} | sizes | options
    return build_model_with_cfg(
        SwinTransformer,
        name,
        pretrained,
        embed_layer=SwinConvStem,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **sizes,
    )


@register_model
def conv_stem_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-T with a convolutional stem."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create("conv_stem_swin_tiny", pretrained, sizes, kwargs)


@register_model
def conv_stem_swin_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-S with a convolutional stem."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _create("conv_stem_swin_small", pretrained, sizes, kwargs)


@register_model
def conv_stem_swin_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-B with a convolutional stem."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create("conv_stem_swin_base", pretrained, sizes, kwargs)
