"""Contract of the family ``swin_v2``: run piece by piece with nothing left out, it is timm's."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import images, tiny_swin_v2
from vitrim import ConfigError, DynamicSpatialConfig, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of

CR = "swinv2_cr_tiny_224"
VARIANTS = {
    "plain": {},
    "larger windows at fewer places": {"window_size": 8},
    "windows from other ones": {"pretrained_window_sizes": (4, 4, 2, 2)},
    "flexible": {"dynamic_img_size": True},
    "cr": {"name": CR, "init_values": 0.5},
    "cr, a norm behind each stage": {"name": CR, "extra_norm_stage": True},
    "cr, a norm behind some blocks": {"name": CR, "extra_norm_period": 2},
    "cr, flexible": {"name": CR, "dynamic_img_size": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_its_pieces_are_timm(variant):
    model = tiny_swin_v2(**VARIANTS[variant])
    family, x = family_of(model), images(2)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))
        fmap = family.stem(x)
        for stage, depth in enumerate(family.depths):
            fmap = family.enter_stage(stage, fmap)
            for index in range(depth):
                mixed = family.mix(stage, index, fmap.x_BHWC)
                after = mixed + family.channel(stage, index, mixed)
                fmap = fmap.with_x(family.finish(stage, index, after))
        torch.testing.assert_close(family.head(fmap), model(x), atol=1e-5, rtol=1e-5)
        if "flexible" in variant:
            x = images(2, size=44)
            assert torch.equal(family.head(family.dense(x)), model(x))


@pytest.mark.parametrize("variant", ["plain", "cr"])
def test_dense_macs_are_what_torch_counts(variant):
    model = tiny_swin_v2(**VARIANTS[variant]).requires_grad_(False)
    with counting() as counter:
        model(images(1))
    assert family_of(model).dense_macs((32, 32)) == counter.get_total_flops() // 2


def test_padded_images_are_refused():
    sparse = sparsify(tiny_swin_v2(), DynamicSpatialConfig(stages=(1, 3)))
    with pytest.raises(ConfigError, match="swin_v2 does not serve sizes"):
        sparse.features_only()(images(2), [(32, 32), (20, 32)])
