"""Family ``swin``: run piece by piece, a backbone is timm's; its MACs are what torch counts."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn

from tests.conftest import images, jitter, tiny_swin
from vitrim import DynamicViTConfig, InputError, UnsupportedBackboneError, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.tokens.feature_map import FeatureMap

VARIANTS = {
    "plain": {},
    "odd-maps": {"img_size": 27},
    "oblong": {"img_size": (20, 34)},
    "window-larger-than-map": {"window_size": 9},
    "window-per-stage": {"window_size": (4, 3, 5, 2)},
    "always-partition": {"always_partition": True},
    "head-dim": {"head_dim": 6},
    "no-qkv-bias": {"qkv_bias": False},
    "max-pool": {"global_pool": "max"},
    "three-stages": {"depths": (2, 2, 3), "num_heads": (1, 2, 2)},
    "drop-path": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "conv-stem": {"name": "conv_stem_swin_tiny", "patch_size": 4, "img_size": 64},
    "conv-stem-padded": {"name": "conv_stem_swin_tiny", "patch_size": 4, "img_size": (61, 43)},
    "flexible": {"dynamic_img_size": True},
    "not-strict": {"strict_img_size": False},
}


def variant_images(model, batch: int):
    height, width = model.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def by_halves(family, x):
    """The dense model from the primitives that methods use."""
    fmap = family.stem(x)
    for stage, depth in enumerate(family.depths):
        fmap = family.enter_stage(stage, fmap)
        assert fmap.grid == family.stage_grid(family.grid(x.shape[2:]), stage)
        assert fmap.x_BHWC.shape[-1] == family.stage_dim(stage)
        for index in range(depth):
            mixed = family.mix(stage, index, fmap.x_BHWC)
            rows = family.channel(stage, index, mixed.flatten(0, 2)).view_as(mixed)
            fmap = FeatureMap(mixed + family.drop_path(stage, index)(rows))
    return family.head(fmap)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_piece_by_piece_it_is_timm(variant, batch):
    model = tiny_swin(**VARIANTS[variant])
    family = family_of(model)
    x = variant_images(model, batch)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))
        torch.testing.assert_close(by_halves(family, x), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (27, 27), (20, 45), (9, 11)])
def test_flexible_models_take_other_image_sizes(size):
    model = tiny_swin(dynamic_img_size=True)
    family = family_of(model)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))
        torch.testing.assert_close(by_halves(family, x), model(x), atol=1e-5, rtol=0)
    assert macs_by_torch(model, size) == family.dense_macs(family.grid(size))


@pytest.mark.parametrize("size", [24, 21])
def test_padding_before_the_shift_is_the_original_swin(size):
    """The same as timm's order where windows fit; else a whole padded map is shifted and cut."""
    model = tiny_swin(img_size=size, always_partition=True, depths=(1, 2, 2, 1))
    family, x = family_of(model), torch.randn(2, 3, size, size)
    with torch.no_grad():
        fmap = family.run_stage(0, family.stem(x))
        found, timm_order = (family.run_stage(1, fmap, flag).x_BHWC for flag in (True, False))
        assert torch.equal(found, timm_order) == (size == 24)
        fmap = family.run_block(1, 0, family.enter_stage(1, fmap))
        block, rows = family.block(1, 1), fmap.x_BHWC.shape[1]
        shifted = torch.zeros(2, 12, 12, 16)
        shifted[:, :rows, :rows] = block.norm1(fmap.x_BHWC)
        windows = shifted.roll((-2, -2), (1, 2)).unfold(1, 4, 4).unfold(2, 4, 4)
        windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 16, 16)
        out = block.attn(windows, block.attn_mask).view(2, 3, 3, 4, 4, 16)
        out = out.transpose(2, 3).reshape(2, 12, 12, 16).roll((2, 2), (1, 2))
        out = fmap.x_BHWC + out[:, :rows, :rows]
        expected = out + block.mlp(block.norm2(out))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_is_timm(mode):
    """Drop path and gradient checkpointing draw and cost what timm's do."""
    model = tiny_swin(drop_path_rate=0.5).train()
    model.set_grad_checkpointing(mode)
    family, x = family_of(model), images(3)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    found = family.head(family.dense(x))
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", ["plain", "odd-maps", "flexible"])
def test_features_are_timm_s_pyramid(variant):
    model = tiny_swin(**VARIANTS[variant])
    x = variant_images(model, 2)
    pyramid = tiny_swin(**VARIANTS[variant], features_only=True)
    with torch.no_grad():
        found = family_of(model).pyramid(x)[0]
        expected = pyramid(x)
    assert [tuple(level.shape[:2]) for level in found] == [(2, c) for c in (8, 16, 32, 64)]
    for level, nhwc in zip(found, expected, strict=True):
        assert torch.equal(level, nhwc.permute(0, 3, 1, 2))


def test_what_the_classifier_reads():
    model, x = tiny_swin(), images(2)
    family = family_of(model)
    with torch.no_grad():
        fmap = family.dense(x)
        assert torch.equal(model.head.fc(family.pool(fmap)), model(x))
        assert family.patch_features(fmap).shape == (2, 16, 64)


def macs_by_torch(model, size):
    with torch.no_grad(), counting() as counter:
        model.requires_grad_(False)(torch.empty(1, 3, *size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_what_torch_counts(variant):
    model = tiny_swin(**VARIANTS[variant])
    family = family_of(model)
    assert macs_by_torch(model, family.image_size) == family.dense_macs(family.grid())


@pytest.mark.parametrize("variant", ["plain", "odd-maps"])
def test_macs_of_the_pieces(variant):
    model = tiny_swin(**VARIANTS[variant]).requires_grad_(False)
    family = family_of(model)
    grid = family.grid()
    for stage, depth in enumerate(family.depths):
        rows, columns = family.stage_grid(grid, stage)
        x = torch.randn(1, rows, columns, family.stage_dim(stage))
        positions = x.view(-1, x.shape[-1])[:5]
        for index in range(depth):
            with counting() as counter:
                family.mix(stage, index, x)
            assert counter.get_total_flops() / 2 == family.mix_macs(stage, index, grid)
            with counting() as counter:
                family.channel(stage, index, positions)
            counted = counter.get_total_flops() / 2
            assert counted == family.channel_macs(stage, index, len(positions))
            many = family.channel_macs(stage, index, torch.tensor([5.0, 6.0]))
            assert many.tolist() == [counted, counted * 6 / 5]
            whole = family.channel_macs(stage, index, math.prod((rows, columns)))
            block = family.block_macs(stage, index, grid)
            assert block == family.mix_macs(stage, index, grid) + whole


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [("tiny", 28.288, 4.491), ("small", 49.606, 8.745), ("base", 87.768, 15.438)],
)
def test_published_models(name, millions, gmacs):
    with torch.device("meta"):
        model = timm.create_model(f"swin_{name}_patch4_window7_224")
    family = family_of(model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert family.dense_macs(family.grid()) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_a_whole_timm_model():
    torch.manual_seed(0)
    model = jitter(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)).eval()
    family, x = family_of(model), images(1, size=224)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


class Changed(SwinTransformer):
    pass


class OtherBlock(SwinTransformerBlock):
    pass


def with_other(model, path, part):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Changed(img_size=32, patch_size=4, embed_dim=8), "Changed"),
        (
            lambda: with_other(tiny_swin(), "layers.2.blocks.1", OtherBlock(32, (8, 8))),
            r"block type OtherBlock \(served: SwinTransformerBlock\)",
        ),
        (
            lambda: with_other(tiny_swin(), "layers.1.downsample", nn.Identity()),
            r"downsampling type Identity \(served: PatchMerging\)",
        ),
        (
            lambda: with_other(tiny_swin(), "layers.0.blocks.0.mlp", nn.Identity()),
            r"MLP type Identity \(served: Mlp\)",
        ),
        (
            lambda: with_other(tiny_swin(), "layers.0.blocks.0.attn", nn.Identity()),
            r"attention type Identity \(served: WindowAttention\)",
        ),
        (
            lambda: with_other(tiny_swin(), "patch_embed", nn.Identity()),
            r"patch embedding Identity",
        ),
        (lambda: with_other(tiny_swin(), "head", nn.Identity()), r"head Identity"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(make, named):
    with torch.device("meta"):
        model = make()
    with pytest.raises(UnsupportedBackboneError, match=named):
        family_of(model)


def test_methods_for_plain_transformers_refuse_it():
    with pytest.raises(UnsupportedBackboneError, match="does not run on the family 'swin'"):
        sparsify(tiny_swin(), DynamicViTConfig())


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 40, 32), (2, 3, 224, 224)])
def test_wrong_image_shapes(shape):
    with pytest.raises(InputError, match="images"):
        family_of(tiny_swin()).stem(torch.randn(shape))


def test_flexible_sizes_must_fit_the_patches():
    family = family_of(tiny_swin(dynamic_img_size=True, patch_size=2))
    with pytest.raises(InputError, match="multiples of the patch size 2 x 2"):
        family.stem(torch.randn(1, 3, 33, 32))
