"""Video Swin transformers, torchvision's own, registered with timm: ``swin3d_t``, ``_s``, ``_b``.

Liu et al., "Video Swin Transformer", CVPR 2022 (arXiv 2106.13230). timm has no models of clips;
torchvision's are the maintained ones. Class, weights and names of weights are torchvision's,
whoever makes the model: ``torchvision.models.video.swin3d_t(weights="KINETICS400_V1")`` or, by
timm's registry, ``timm.create_model("swin3d_t", pretrained=True)``; the same files are loaded, from
the same folder of ``torch.hub``. ``vitrim_video_swin_digits`` is a small one, for moving digits.

They take clips (B, 3, frames, height, width) of any size. For which a model is meant, ``frames``
and ``img_size`` say where it is made; its ``pretrained_cfg`` (``frames``, ``input_size``) tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torchvision.models import video
from torchvision.models.video.swin_transformer import SwinTransformer3d

__all__ = ["SwinTransformer3d"]

CLIP_SIZE = (32, 224, 224)
"""Frames, height and width that torchvision's weights were trained for."""
_COMMON = {"patch_size": [2, 4, 4], "window_size": [8, 7, 7], "frames": CLIP_SIZE[0]}
_ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "swin3d_t": _COMMON | {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_s": _COMMON | {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_b": _COMMON | {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "vitrim_video_swin_digits": {
        "patch_size": [2, 4, 4],
        "window_size": [4, 4, 4],
        "frames": 16,
        "embed_dim": 24,
        "depths": [2, 2, 4, 2],
        "num_heads": [2, 4, 8, 8],
        "stochastic_depth_prob": 0.0,
    },
}


def _config(image_size: tuple[int, int], num_classes: int, **more: Any) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        "input_size": (3, *image_size),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | more


def _published(weights: Any) -> dict[str, Any]:
    return _config(CLIP_SIZE[1:], len(weights.meta["categories"]), url=weights.url)


default_cfgs = generate_default_cfgs(
    {
        "swin3d_t.kinetics400_v1": _published(video.Swin3D_T_Weights.KINETICS400_V1),
        "swin3d_s.kinetics400_v1": _published(video.Swin3D_S_Weights.KINETICS400_V1),
        "swin3d_b.kinetics400_v1": _published(video.Swin3D_B_Weights.KINETICS400_V1),
        "swin3d_b.kinetics400_imagenet22k_v1": _published(
            video.Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1
        ),
        "vitrim_video_swin_digits": _config(
            (64, 64), 40, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
    }
)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> SwinTransformer3d:
    arguments = _ARGUMENTS[name] | options
    frames, img_size = arguments.pop("frames"), arguments.pop("img_size", None)
    arguments["window_size"] = list(arguments["window_size"])  # torchvision copies it by its method
    model: SwinTransformer3d = build_model_with_cfg(
        SwinTransformer3d,
        name,
        pretrained,
        kwargs_filter=("in_chans", "global_pool"),  # type: ignore[arg-type]
        **arguments,
    )
    size = model.pretrained_cfg["input_size"][1:] if img_size is None else to_2tuple(img_size)
    model.pretrained_cfg |= {"frames": frames, "input_size": (3, *size)}
    return model


def named(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name of the model that is most like one with these arguments of timm's maker,
    and those of them that the name does not say.
    """

    def unsaid(name: str) -> dict[str, Any]:
        config = default_cfgs[name].default
        said = _ARGUMENTS[name] | {
            "num_classes": config.num_classes,
            "img_size": list(config.input_size[1:]),
        }
        return {key: value for key, value in arguments.items() if said.get(key) != value}

    name = min(_ARGUMENTS, key=lambda name: len(unsaid(name)))
    return name, unsaid(name)


@register_model
def swin3d_t(pretrained: bool = False, **kwargs: Any) -> SwinTransformer3d:
    """Video Swin-T: 28 M parameters, 88 GMACs."""
    return _create("swin3d_t", pretrained, kwargs)


@register_model
def swin3d_s(pretrained: bool = False, **kwargs: Any) -> SwinTransformer3d:
    """Video Swin-S: 50 M parameters, 166 GMACs."""
    return _create("swin3d_s", pretrained, kwargs)


@register_model
def swin3d_b(pretrained: bool = False, **kwargs: Any) -> SwinTransformer3d:
    """Video Swin-B: 88 M parameters, 281 GMACs."""
    return _create("swin3d_b", pretrained, kwargs)


@register_model
def vitrim_video_swin_digits(pretrained: bool = False, **kwargs: Any) -> SwinTransformer3d:
    """A small Video Swin for clips of 16 x 64 x 64 of moving digits: 40 classes."""
    return _create("vitrim_video_swin_digits", pretrained, kwargs)
