"""LV-ViT: a vision transformer whose patch tokens are labelled too; timm has none.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS
2021 (arXiv 2104.10858). Built of timm's own parts: its ``VisionTransformer`` and ``Block``, with a
stem of four convolutions, residual branches divided by a constant, and a second classifier that
labels every patch token. The names of the weights are the authors', so that their files load as
they are (``vitrim.convert.load_dense``).

Registered with timm: ``timm.create_model("lvvit_s")`` and ``"lvvit_m"``. No weights come with them:
timm's ``pretrained=True`` has nowhere to get any.

The models answer with the class token's logits plus half of the largest logit that any patch token
gives the class, in training mode too. Training by token labels is :meth:`losses`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrim.layers import losses
from vitrim.tokens.plain import Grid

AUX_WEIGHT = 0.5
"""Share of the patch tokens' logits in the answer, and of their loss in training (authors')."""

Box = tuple[int, int, int, int]
"""Top, bottom, left and right of a rectangle on the patch grid; the ends are not in it."""


class ConvStem(PatchEmbed):
    """Patch embedding ``4_2`` of the authors: halve the image, look around twice, cut patches."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        width: int = 64,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs, **made)
        if patch_size % 2 or self.dynamic_img_pad:
            raise ValueError("LV-ViT's stem takes an even patch_size, and no dynamic_img_pad")
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False, **made)
        self.bn1 = nn.BatchNorm2d(width, **made)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False, **made)
        self.bn2 = nn.BatchNorm2d(width, **made)
        self.conv3 = nn.Conv2d(width, width, 3, 1, 1, bias=False, **made)
        self.bn3 = nn.BatchNorm2d(width, **made)
        half = patch_size // 2
        self.proj = nn.Conv2d(width, embed_dim, half, half, **made)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image size; the patches stay as they are."""
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"LV-ViT's stem cuts patches of {self.patch_size[0]} pixels for good")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C); (B, rows, columns, C) where the size of the images may change."""
        for norm, conv in (self.bn1, self.conv1), (self.bn2, self.conv2), (self.bn3, self.conv3):
            x = norm(conv(x)).relu()
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)


class ResidualDivisor(nn.Module):
    """Divides a residual branch by a constant: the authors' ``skip_lam``."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        return str(self.divisor)


class LVVisionTransformer(VisionTransformer):
    """timm's vision transformer as LV-ViT changes it.

    Args:
        skip_lam: what both residual branches of each block are divided by.
        stem_width: channels of the stem's convolutions.
        mix_token: whether :meth:`losses` mixes the tokens of two images in training mode.
        kwargs: of timm's ``VisionTransformer``, such as ``img_size``, ``num_classes``,
            ``drop_path_rate`` or ``dynamic_img_size``.
    """

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        skip_lam: float = 2.0,
        stem_width: int = 64,
        mix_token: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=nn.LayerNorm,  # its eps, 1e-5, is the authors'
            embed_layer=partial(ConvStem, width=stem_width),
            **kwargs,
        )
        if self.global_pool != "token":
            raise ValueError(f"global_pool is {self.global_pool!r}; LV-ViT reads its class token")
        for block in self.blocks:
            block.ls1, block.ls2 = ResidualDivisor(skip_lam), ResidualDivisor(skip_lam)
        self.mix_token = mix_token
        self.aux_head = self._new_aux_head()

    def _new_aux_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.norm.weight
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers, of the class token and of the patch tokens."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_aux_head().train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of class and patch tokens together, from the final norm's output."""
        logits: Tensor = super().forward_head(x, pre_logits)
        if pre_logits or self.num_classes == 0:
            return logits
        return logits + AUX_WEIGHT * self.token_logits(x).amax(1)

    def class_logits(self, x: Tensor) -> Tensor:
        """(B, classes): what the class token alone says, from the final norm's output."""
        logits: Tensor = super().forward_head(x)
        return logits

    def token_logits(self, x: Tensor) -> Tensor:
        """(B, N, classes): what each patch token says, from the final norm's output."""
        logits: Tensor = self.aux_head(x[:, self.num_prefix_tokens :])
        return logits

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        token_target: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The loss terms of token labelling by name, and their weighted sum, ``"total"``.

        With ``mix_token``, in training mode, a random box of each image's tokens is taken from
        another image of the batch (the authors' MixToken): the class token learns both labels by
        their shares of the area, each patch token that of the image it came from.

        Args:
            images: (B, channels, H, W).
            target: class numbers (B,) or soft targets (B, classes).
            token_target: (B, N) or (B, N, classes) likewise, of each patch; None gives every patch
                the label of its image.
            generator: source of the box; None uses torch's global one.
        """
        rows, columns = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        box = (0, 0, 0, 0)
        if self.mix_token and self.training:
            box = random_box((rows, columns), generator)
        x = self.patch_embed(images)
        x = exchange(x.view(len(x), rows, columns, -1), box).view(x.shape)
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        for block in self.blocks:
            saves = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
        x = self.norm(x)
        class_logits, token_logits = self.class_logits(x), self.token_logits(x)
        token_logits = exchange(token_logits.view(len(x), rows, columns, -1), box).flatten(0, 2)
        if token_target is None:
            token_target = target.repeat_interleave(rows * columns, 0)
        else:
            token_target = token_target.flatten(0, 1)
        mixed = (box[1] - box[0]) * (box[3] - box[2]) / (rows * columns)
        own = losses.classification_loss(class_logits, target)
        other = losses.classification_loss(class_logits, target.flip(0))
        classification = (1 - mixed) * own + mixed * other
        token = losses.classification_loss(token_logits, token_target)
        total = classification + AUX_WEIGHT * token
        return {"classification": classification, "token": token, "total": total}


def random_box(grid: Grid, generator: torch.Generator | None = None) -> Box:
    """A box of random place and size, as the authors draw it: its area is uniform, then clipped."""
    device = None if generator is None else generator.device
    area, *centre = torch.rand(3, generator=generator, device=device).tolist()
    ends: list[int] = []
    for side, place in zip(grid, centre, strict=True):
        half, middle = int(side * math.sqrt(area)) // 2, int(side * place)
        ends += [max(middle - half, 0), min(middle + half, side)]
    return ends[0], ends[1], ends[2], ends[3]


def exchange(x_BHWC: Tensor, box: Box) -> Tensor:
    """The maps of a batch with ``box`` from the image as far from the batch's end as each is from
    its start; done twice, it changes nothing.
    """
    top, bottom, left, right = box
    if top == bottom or left == right:
        return x_BHWC
    mixed = x_BHWC.clone()
    mixed[:, top:bottom, left:right] = x_BHWC.flip(0)[:, top:bottom, left:right]
    return mixed


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.conv1",
    "classifier": ("head", "aux_head"),
}
default_cfgs = generate_default_cfgs({"lvvit_s": dict(_CFG), "lvvit_m": dict(_CFG)})


def _create(name: str, pretrained: bool, **kwargs: Any) -> LVVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    model: LVVisionTransformer = build_model_with_cfg(
        LVVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVVisionTransformer:
    """LV-ViT-S: 26 M parameters, 6.6 GMACs."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6}
    return _create("lvvit_s", pretrained, **sizes | kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVVisionTransformer:
    """LV-ViT-M: 56 M parameters, 12.7 GMACs."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8}
    return _create("lvvit_m", pretrained, **sizes | kwargs)
