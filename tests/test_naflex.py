"""Contract of the family ``naflex``: on images of one size, timm's own numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.conftest import images, tiny_naflex
from vitrim import DynamicViTConfig, InputError, sparsify
from vitrim.families import family_of
from vitrim.tokens.packed import select

VARIANTS = {
    "average": {},
    "factorised": {"name": "naflexvit_base_patch16_parfac_gap", "block_fn": None},
    "attention-pool": {"name": "naflexvit_base_patch16_map"},
    "siglip": {"name": "naflexvit_base_patch16_siglip"},
    "radio": {"name": "naflexvit_base_patch16_radio_v3"},
    "rotary": {"rope_type": "axial", "class_token": True, "global_pool": "token"},
    "rotary-per-block": {"rope_type": "mixed", "reg_tokens": 2},
    "gated": {"attn_gated": True},
    "convolution": {"embed_proj_type": "conv"},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def backbone(variant: str):
    return tiny_naflex(**VARIANTS[variant])


@each_variant
def test_nothing_dropped_is_timm(variant):
    model = backbone(variant)
    family = family_of(model)
    with torch.no_grad():
        for x in (images(2), images(2, size=48)):
            assert torch.equal(family.head(family.dense(x)), model(x))


@each_variant
def test_mask_is_packed(variant):
    family, x = family_of(backbone(variant)), images(3)
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[2] &= torch.arange(16) < 9
    with torch.no_grad():
        tokens = family.run_block(0, family.stem(x))
        rest = range(1, family.depth)
        masked = family.head(family.run_blocks(rest, tokens.with_keep(keep.float())))
        packed = family.head(family.run_blocks(rest, select(tokens, keep)))
    assert (masked - packed).abs().max() <= 1e-5 * max(1, masked.abs().max())


def test_wrong_image_shapes():
    sparse = sparsify(backbone("average"), DynamicViTConfig())
    for shape in ((1, 3, 33, 32), (1, 1, 32, 32), (2, 16, 192)):
        with pytest.raises(InputError, match="images"):
            sparse(torch.randn(shape))
