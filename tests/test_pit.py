"""The PiT family: run piece by piece with nothing dropped, timm's PiT; and its costs."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock

from tests.conftest import images, tiny_pit
from vitrim import InputError, UnsupportedBackboneError
from vitrim.costs.macs import counting
from vitrim.families import PiT, family_of

VARIANTS = {
    "pit": {},
    "distilled": {"name": "pit_s_distilled_224"},
    "no overlap": {"patch_size": 4, "stride": 4},
    "two stages": {"base_dims": (16, 8), "depth": (1, 2), "heads": (1, 4)},
    "drop path": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1},
    "no classifier": {"num_classes": 0},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def macs_counted(model, x):
    model.requires_grad_(False)  # the counter's hooks trip over leaves
    with torch.no_grad(), counting() as counter:
        model(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("size", [32, 48, (40, 24)])
@pytest.mark.parametrize("batch", [1, 2, 3])
@each_variant
def test_nothing_dropped_is_timm(variant, batch, size):
    model = tiny_pit(**(VARIANTS[variant] | {"img_size": size}))
    family = family_of(model)
    assert isinstance(family, PiT)
    x = torch.randn(batch, 3, *family.image_size, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


@pytest.mark.parametrize("name", ["pit_ti_224", "pit_xs_224", "pit_s_224", "pit_b_224"])
def test_whole_timm_models(name):
    """Each published size, with its own widths, heads, depths and patches, on a small image."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10).eval()
    family, x = family_of(model), images(2, size=64)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))
    assert family.dense_macs(family.grid()) == macs_counted(model, x[:1])


@each_variant
def test_features_are_timms_pyramid(variant):
    model = tiny_pit(**VARIANTS[variant])
    x = images(2)
    with torch.no_grad():
        levels = family_of(model).pyramid(x)[0]
        expected = model.forward_intermediates(x, intermediates_only=True)
    for level, map_BCHW in zip(levels, expected, strict=True):
        assert torch.equal(level, map_BCHW)
    timms = tiny_pit(features_only=True)
    if not VARIANTS[variant]:
        with torch.no_grad():
            hooked = timms(x)
        assert [level.shape for level in levels] == [level.shape for level in hooked]


@each_variant
def test_macs_are_what_torch_counts(variant):
    model = tiny_pit(**VARIANTS[variant])
    family = family_of(model)
    assert family.dense_macs(family.grid()) == macs_counted(model, images(1))


@pytest.mark.parametrize(
    ("size", "gmacs", "mega_parameters"),
    [("ti", 0.699, 4.85), ("xs", 1.395, 10.62), ("s", 2.871, 23.46), ("b", 12.402, 73.76)],
)
def test_published_costs(size, gmacs, mega_parameters):
    """GMACs as measured on the SPViT authors' dense PiT; parameters as timm lists them."""
    with torch.device("meta"):
        model = timm.create_model(f"pit_{size}_224")
    family = family_of(model)
    assert family.dense_macs(family.grid()) / 1e9 == pytest.approx(gmacs, abs=5.1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(mega_parameters, abs=0.006)


def test_its_shape():
    family = family_of(tiny_pit("pit_s_distilled_224"))
    assert family.depths == (2, 3, 2)
    assert family.num_prefix == 2
    assert [family.stage_dim(stage) for stage in range(3)] == [16, 32, 64]
    assert family.grid() == family.grid((35, 33)) == (7, 7)
    assert [family.stage_grid((7, 7), stage) for stage in range(3)] == [(7, 7), (4, 4), (2, 2)]


def test_a_few_pixels_more_make_the_same_grid():
    """Timm takes any image that its convolution cuts into as many patches."""
    model, x = tiny_pit(), images(2, size=35)
    family = family_of(model)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 36, 32), (2, 3, 224, 224)])
def test_wrong_image_shapes(shape):
    with pytest.raises(InputError, match="images"):
        family_of(tiny_pit()).stem(torch.randn(shape))


def test_what_cannot_be_run_is_refused_by_name():
    model = tiny_pit("pit_s_distilled_224")
    model.set_distilled_training(True)
    with pytest.raises(UnsupportedBackboneError, match="distilled_training=True"):
        family_of(model)
    with pytest.raises(UnsupportedBackboneError, match="global_pool=''"):
        family_of(tiny_pit(num_classes=0, global_pool=""))
    model = tiny_pit()
    model.transformers[1].blocks[0] = ResPostBlock(32, 2)
    with pytest.raises(
        UnsupportedBackboneError, match=r"block type ResPostBlock \(served: Block\)"
    ):
        family_of(model)
