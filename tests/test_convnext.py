"""Family ``convnext``: run piece by piece with nothing on the fast path, a backbone is timm's."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.conftest import images, tiny_convnext
from vitrim import (
    DynamicSpatialConfig,
    InputError,
    UnsupportedBackboneError,
    from_pretrained,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.families import ConvNeXt, family_of

VARIANTS = {
    "convnext": {},
    "small-depths": {"name": "convnext_small"},
    "patch-4": {"patch_size": 4},
    "patch-2": {"patch_size": 2},
    "output-stride-16": {"patch_size": 4, "output_stride": 16},
    "output-stride-8": {"patch_size": 4, "output_stride": 8},
    "no-layer-scale": {"ls_init_value": None},
    "no-bias": {"conv_bias": False},
    "kernel-sizes": {"kernel_sizes": (3, 5, 7, 9)},
    "rms-norm": {"norm_layer": "rmsnorm"},
    "gelu-tanh": {"act_layer": "gelu_tanh"},
    "norm-first": {"head_norm_first": True},
    "norm-first-two-pools": {"head_norm_first": True, "global_pool": "catavgmax"},
    "hidden-head": {"head_hidden_size": 24},
    "max-pool": {"global_pool": "max"},
    "no-classes": {"num_classes": 0},
    "drop-path": {"drop_path_rate": 0.3, "drop_rate": 0.1},
    "convolutions-as-mlp": {"conv_mlp": True},
    "convolutions-as-mlp-rms": {"name": "convnext_atto_rms"},
    "overlapping-stem": {"stem_type": "overlap", "conv_mlp": True},
    "overlapping-stem-tiered": {"stem_type": "overlap_tiered"},
    "overlapping-stem-activated": {"name": "convnext_zepto_rms_ols"},
}
SIZES = [(32, 32), (64, 32), (37, 51)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_run_piece_by_piece_it_is_timm(variant):
    model = tiny_convnext(**VARIANTS[variant])
    family = family_of(model)
    assert isinstance(family, ConvNeXt)
    for batch, (height, width) in enumerate(SIZES, start=1):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            fmap = family.dense(x)
            assert torch.equal(family.head(fmap), model(x))
            levels = model.forward_intermediates(x, intermediates_only=True)
            found = family.pyramid(x)[0]
        assert all(torch.equal(a, b) for a, b in zip(found, levels, strict=True))
        grid = family.grid((height, width))
        for stage, level in enumerate(levels):
            assert family.stage_grid(grid, stage) == tuple(level.shape[2:])
            assert family.stage_dim(stage) == level.shape[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_its_two_halves(variant):
    model = tiny_convnext(**VARIANTS[variant])
    family = family_of(model)
    with torch.no_grad():
        fmap = family.stem(images(2))
        for stage, depth in enumerate(family.depths):
            fmap = family.enter_stage(stage, fmap)
            for index in range(depth):
                x = fmap.x_BHWC
                fmap = family.run_block(stage, index, fmap)
                rows = family.channel(stage, index, family.mix(stage, index, x).flatten(0, 2))
                halves = x + family.drop_path(stage, index)(rows.view_as(x))
                torch.testing.assert_close(halves, fmap.x_BHWC, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_what_torch_counts(variant):
    model = tiny_convnext(**VARIANTS[variant]).requires_grad_(False)
    family = family_of(model)
    for size in SIZES:
        with torch.no_grad(), counting() as counter:
            model(torch.randn(1, 3, *size))
        macs = counter.get_total_flops() / 2
        # The first of two convolutions rounds odd sides up, and a grid does not tell them.
        odd = "overlapping" in variant and any(side % 4 for side in size)
        assert family.dense_macs(family.grid(size)) == pytest.approx(macs, rel=0.02 if odd else 0)


def test_features_are_those_of_timm():
    model = tiny_convnext()
    extractor = tiny_convnext(features_only=True)
    extractor.load_state_dict(
        {
            key.replace("stages.", "stages_").replace("stem.", "stem_"): value
            for key, value in model.state_dict().items()
            if not key.startswith("head.")
        }
    )
    with torch.no_grad():
        for found, expected in zip(
            family_of(model).pyramid(images(2))[0], extractor(images(2)), strict=True
        ):
            assert torch.equal(found, expected)


def test_normed_features_pool_to_the_head():
    """With a linear head and no pooled norm, the mean of the normed positions is what it reads."""
    model = tiny_convnext(head_norm_first=True)
    family, x = family_of(model), images(2)
    with torch.no_grad():
        features = family.patch_features(family.dense(x))
        assert features.shape == (2, 16, 64)
        torch.testing.assert_close(model.head.fc(features.mean(1)), model(x), atol=1e-5, rtol=0)
        pooled_first = tiny_convnext()
        fmap = family_of(pooled_first).dense(x)
        normed = pooled_first.head.norm(fmap.x_BHWC.permute(0, 3, 1, 2)).flatten(2).mT
        assert torch.equal(family_of(pooled_first).patch_features(fmap), normed)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("convnext_tiny", 28.589, 4.456),
        ("convnext_small", 50.224, 8.684),
        ("convnext_base", 88.591, 15.355),
    ],
)
def test_published_models(name, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    family = family_of(model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert family.dense_macs(family.grid()) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_convnext().train()
    family = family_of(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        family.head(family.dense(images(2))).square().sum().backward()
        gradients.append(model.stem[0].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"global_pool": ""}, "global_pool=''"),
        ({"use_grn": True}, "response norm divides by a norm over all positions"),
    ],
)
def test_parts_that_cannot_be_run_are_refused_by_name(options, named):
    with pytest.raises(UnsupportedBackboneError, match=named):
        family_of(tiny_convnext(**options))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 7, 32)])
def test_wrong_image_shapes(shape):
    with pytest.raises(InputError, match="images"):
        family_of(tiny_convnext()).stem(torch.randn(shape))


def test_a_checkpoint_keeps_the_image_size(tmp_path):
    """ConvNeXt takes any size, so no argument tells for which images a model is meant."""
    sparse = sparsify(tiny_convnext(), DynamicSpatialConfig(stages=(1,)))
    assert sparse.family.image_size == (32, 32)
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.family.image_size == (32, 32)
    assert loaded.macs() == sparse.macs()
