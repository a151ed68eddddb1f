"""Contract of the family ``eva``: run piece by piece with nothing dropped, it is timm's."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.conftest import images, seeded, tiny_eva
from vitrim import DynamicViTConfig, UnsupportedBackboneError, sparsify
from vitrim.families import family_of
from vitrim.layers.merging import match, merge
from vitrim.tokens.packed import PackedTokens, select

VARIANTS = {
    "eva02": {},
    "eva": {"name": "eva_giant_patch14_224"},
    "eva02-clip": {"name": "eva02_base_patch16_clip_224"},
    "sub-norms": {"name": "eva02_base_patch14_224"},
    "post-norm": {"name": "eva02_enormous_patch14_clip_224"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "dinov3-qkv-bias": {"name": "vit_tiny_patch16_dinov3_qkvb"},
    "dinov3-swiglu": {"name": "vit_small_plus_patch16_dinov3"},
    "lingbot": {"name": "vit_small_patch16_lingbot"},
    "rope-per-block": {"name": "vit_small_patch16_rope_mixed_224"},
    "rope-per-block-and-position": {"name": "vit_small_patch16_rope_mixed_ape_224"},
    "rope-shared": {"name": "vit_small_patch16_rope_224"},
    "rope-registers": {"name": "vit_betwixt_patch16_rope_reg4_gap_256"},
    "pe-attention-pool": {"name": "vit_pe_core_base_patch16_224"},
    "pe-attention-pool-no-class": {"name": "vit_pe_core_gigantic_patch14_448"},
    "pe-no-class": {"name": "vit_pe_lang_gigantic_patch14_448"},
    "pe-spatial": {"name": "vit_pe_spatial_base_patch16_512"},
    "sapiens2": {"name": "vit_base_patch16_sapiens2", "num_kv_heads": (2, 1, 1, 2)},
    "mrope": {
        "name": "vit_small_patch16_rope_224",
        "rope_type": "mrope",
        "rope_mrope_section": (2, 3, 3),
        "rope_grid_indexing": "ij",
    },
    "attention-rope": {"name": "vit_small_patch16_rope_224", "attn_type": "rope"},
    "qk-norm": {"name": "vit_small_patch16_rope_224", "qk_norm": True},
    "unfused": {"qkv_fused": False},
    "drop-path": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "dynamic-image-size": {"dynamic_img_size": True},
    "dynamic-per-block": {"name": "vit_small_patch16_rope_mixed_224", "dynamic_img_size": True},
    "layer-scale": {"init_values": 0.5},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def backbone(variant: str):
    return tiny_eva(**VARIANTS[variant])


@each_variant
def test_nothing_dropped_is_timm(variant):
    model = backbone(variant)
    family = family_of(model)
    with torch.no_grad():
        for batch in (1, 3):
            x = images(batch, seed=batch)
            assert torch.equal(family.head(family.dense(x)), model(x))


@each_variant
def test_full_mask_is_dense(variant):
    model = backbone(variant)
    family, x = family_of(model), images(3)
    with torch.no_grad():
        tokens = family.stem(x)
        tokens = tokens.with_keep(torch.ones(3, tokens.num_patches))
        masked = family.head(family.run_blocks(range(family.depth), tokens))
    torch.testing.assert_close(masked, model(x), atol=2e-5, rtol=1e-5)


@each_variant
def test_mask_is_gather_is_packed(variant):
    """Each image keeps other places, and the last fewer: what is kept is turned as it was."""
    family, x = family_of(backbone(variant)), images(3)
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[2] &= torch.arange(16) < 9
    with torch.no_grad():
        tokens = family.run_block(0, family.stem(x))
        rest = range(1, family.depth)
        masked = family.head(family.run_blocks(rest, tokens.with_keep(keep.float())))
        packed = select(tokens, keep)
        assert isinstance(packed, PackedTokens)
        packed = family.head(family.run_blocks(rest, packed))
        alone = []
        for image in range(3):
            tokens = family.run_block(0, family.stem(x[image : image + 1]))
            gathered = tokens.gather(keep[image].nonzero().T.flip(1))
            alone.append(family.head(family.run_blocks(rest, gathered)))
    scale = masked.abs().max()
    assert (masked - torch.cat(alone)).abs().max() <= 1e-5 * scale
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5 * scale


@each_variant
def test_order_does_not_matter_and_places_do(variant):
    """A permutation carries its places along: the same logits; tokens at each other's places do
    not give them, where places are told by rotation at all.
    """
    family, x = family_of(backbone(variant)), images(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4)).expand(2, -1)
    with torch.no_grad():
        tokens = family.stem(x)
        logits = family.head(family.run_blocks(range(family.depth), tokens))
        moved = tokens.gather(order)
        same = family.head(family.run_blocks(range(family.depth), moved))
        torch.testing.assert_close(same, logits, atol=2e-5, rtol=1e-4)
        if family.turns:
            misplaced = tokens.with_x(moved.x)
            other = family.head(family.run_blocks(range(family.depth), misplaced))
            assert (other - logits).abs().max() > 1e-3 * logits.abs().max()


def test_merged_tokens_keep_the_place_of_where_they_went():
    family, x = family_of(backbone("rope-shared")), images(2)
    with torch.no_grad():
        tokens = family.stem(x)
        matching = match(tokens.patches, 3, tokens.num_prefix)
        merged = merge(tokens, matching)
        table = family.rotary().table_HNA[0]
        assert torch.equal(merged.angles[:, 0, 1:], table[merged.index_BN])
        assert torch.equal(merged.angles[:, 0, 0], table[-1].expand(2, -1))  # the class token's


def test_angles_are_looked_up_and_made_once(monkeypatch):
    """Also where training draws the coordinates anew: all blocks are turned by the same."""
    model = tiny_eva("vit_small_patch16_dinov3", rope_jitter_coords=2.0, head_init_scale=1.0)
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.6))
    made, embed = [], model.rope.get_embed

    def counted(*arguments):
        made.append(embed(*arguments))
        return made[-1]

    monkeypatch.setattr(model.rope, "get_embed", counted)
    sparse.eval()(images(2))
    sparse.train()
    sparse.losses(images(2), torch.tensor([1, 2]))["total"].backward()
    assert len(made) == 2
    assert not torch.equal(made[0], made[1])


def test_gradients_reach_every_parameter():
    model = tiny_eva("vit_small_patch16_rope_mixed_224")
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.6)).train()
    sparse.losses(images(3), torch.tensor([1, 2, 3]))["total"].backward()
    assert [name for name, p in sparse.named_parameters() if p.grad is None] == []
    assert model.rope.freqs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
    ],
)
def test_parts_that_cannot_be_run_are_refused_by_name(options, named):
    with pytest.raises(UnsupportedBackboneError, match=named):
        sparsify(tiny_eva(**options), DynamicViTConfig())


def test_exact_last_block():
    """Turned keys are made, and the class token's row is the whole block's."""
    model = tiny_eva("vit_small_patch16_rope_mixed_224")
    exact = sparsify(model, DynamicViTConfig(stages=(1, 2), threshold=0.5), generator=seeded(3))
    config = DynamicViTConfig(stages=(1, 2), threshold=0.5, exact_last_block=False)
    whole = sparsify(model, config, generator=seeded(3))
    assert exact.family.whole_last_block is None
    with torch.no_grad():
        torch.testing.assert_close(exact.eval()(images(4)), whole.eval()(images(4)))
