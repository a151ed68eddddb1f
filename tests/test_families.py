"""Contract of families: run piece by piece with nothing dropped, a backbone is timm's."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import SwiGLU

from tests.conftest import images, jitter, tiny_vit
from vitrim import DynamicViTConfig, InputError, UnsupportedBackboneError, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.tokens.plain import Tokens

VARIANTS = {
    "vit": {},
    "deit": {"name": "deit_tiny_patch16_224"},
    "deit-distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "deit3-layerscale": {"name": "deit3_small_patch16_224"},
    "no-qkv-bias": {"qkv_bias": False},
    "qk-norm": {"qk_norm": True},
    "scaled-norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "swiglu": {"mlp_layer": SwiGLU},
    "average-pool": {"global_pool": "avg", "class_token": False},
    "class-token-average": {"global_pool": "avg"},
    "registers-class": {"reg_tokens": 4},
    "registers-average": {"reg_tokens": 4, "global_pool": "avg", "class_token": False},
    "prefix-in-average": {"reg_tokens": 2, "global_pool": "avg", "pool_include_prefix": True},
    "clip-pre-norm": {"pre_norm": True},
    "dinov2": {"name": "vit_small_patch14_dinov2", "img_size": 28, "patch_size": 7},
    "dinov2-registers": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28, "patch_size": 7},
    "siglip": {"name": "vit_base_patch16_siglip_224"},
    "drop-path": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "dynamic-image-size": {"dynamic_img_size": True},
    "no-position": {"pos_embed": "none"},
    "geglu": {"mlp_layer": timm.models.vitamin.GeGluMlp},
    "norms-behind": {"block_fn": timm.models.vision_transformer.ResPostBlock},
}


def backbone(variant: str, **changes):
    options = VARIANTS[variant] | changes
    return tiny_vit(options.pop("name", "vit_tiny_patch16_224"), **options)


def variant_images(model, batch: int):
    return images(batch, size=model.patch_embed.img_size[0], seed=batch)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_dropped_is_timm(variant, batch):
    model = backbone(variant)
    family = family_of(model)
    x = variant_images(model, batch)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_image_size_is_timm(variant):
    size = 35 if "patch_size" in VARIANTS[variant] else 48
    model = backbone(variant, img_size=size)
    sparse = sparsify(model, DynamicViTConfig(keep_ratio=0.6))
    x = variant_images(model, 2)
    assert x.shape[-1] == size
    with torch.no_grad():
        assert torch.equal(sparse.family.head(sparse.family.dense(x)), model(x))
    assert sparse.trace(x).macs.tolist() == [sparse.macs()] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_keep_everything_is_dense(variant):
    """To the last digit, but for the exact last block, which adds in another order."""
    model = backbone(variant)
    x = variant_images(model, 2)
    whole = sparsify(model, DynamicViTConfig(keep_ratio=1.0, exact_last_block=False))
    exact = sparsify(model, DynamicViTConfig(keep_ratio=1.0))
    with torch.no_grad():
        assert torch.equal(whole(x), model(x))
        torch.testing.assert_close(exact(x), model(x), atol=1e-5, rtol=1e-5)
        # Recording scores every stage, and still drops nothing.
        assert torch.equal(whole.trace(x).logits, model(x))
        torch.testing.assert_close(exact.trace(x).logits, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_mask_is_dense(variant):
    """Masked attention and masked pooling with a mask of ones change nothing beyond rounding."""
    model = backbone(variant)
    family = family_of(model)
    x = variant_images(model, 3)
    with torch.no_grad():
        tokens = family.stem(x)
        tokens = tokens.with_keep(torch.ones(3, tokens.num_patches))
        for block in range(family.depth):
            tokens = family.run_block(block, tokens)
        torch.testing.assert_close(family.head(tokens), model(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mask_is_gather(variant):
    """Hiding tokens and removing them are the same decision: equal to 1e-5."""
    model = backbone(variant)
    family = family_of(model)
    x = variant_images(model, 3)
    position = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    with torch.no_grad():
        tokens = family.run_block(0, family.stem(x))
        keep = torch.zeros(3, 16).scatter(1, position, 1.0)
        masked, gathered = tokens.with_keep(keep), tokens.gather(position)
        for block in range(1, family.depth):
            masked, gathered = family.run_block(block, masked), family.run_block(block, gathered)
        difference = family.head(masked) - family.head(gathered)
    assert difference.abs().max() <= 1e-5 * max(1, family.head(gathered).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    model = backbone(variant)
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.6)).train()
    torch.manual_seed(0)
    loss = sparse.losses(variant_images(model, 3), torch.tensor([1, 2, 3]))["total"]
    loss.backward()
    without = [name for name, p in sparse.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in sparse.parameters())
    assert all(p.grad.abs().sum() > 0 for p in sparse.method.parameters())


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "deit_tiny_patch16_224"])
def test_whole_timm_models(name):
    torch.manual_seed(0)
    model = jitter(timm.create_model(name)).eval()
    family = family_of(model)
    x = images(1, size=family.image_size[0])
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


def test_other_image_sizes():
    model = tiny_vit(img_size=48)
    with torch.no_grad():
        family = family_of(model)
        x = torch.randn(2, 3, 48, 48)
        assert torch.equal(family.head(family.dense(x)), model(x))
        dynamic = tiny_vit(dynamic_img_size=True)
        sparse = sparsify(dynamic, DynamicViTConfig(keep_ratio=1.0, exact_last_block=False))
        for size in ((32, 32), (48, 32), (24, 56)):
            x = torch.randn(2, 3, *size)
            assert torch.equal(sparse(x), dynamic(x))
            trace = sparse.trace(x)
            assert trace.grid == (size[0] // 8, size[1] // 8)
            assert trace.macs[0] == sparse.macs(size)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_vit()
    sparse = sparsify(model, DynamicViTConfig(stages=(1,), sampling="argmax")).train()
    x, target = images(2), torch.tensor([0, 1])
    plain = sparse.losses(x, target)["total"]
    plain.backward()
    gradient = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    again = sparse.losses(x, target)["total"]
    again.backward()
    assert torch.equal(plain, again)
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, gradient)


@pytest.mark.parametrize(
    "name",
    [
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "vit_relpos_small_patch16_224",
        "xcit_nano_12_p8_224",
        "resnet18",
    ],
)
def test_unknown_backbones_are_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedBackboneError, match=type(model).__name__) as error:
        sparsify(model, DynamicViTConfig())
    assert "vit: timm VisionTransformer" in str(error.value)
    if name != "resnet18":  # what is of this kind is told why, and what to use
        assert type(model).__module__ in str(error.value)
        assert "; use " in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "side by side"),
        ({"block_fn": timm.models.vision_transformer.ParallelThingsBlock}, "side by side"),
        ({"attn_layer": "diff"}, "DiffAttention: it subtracts two attention maps"),
    ],
)
def test_parts_that_cannot_be_run_are_refused_by_name(options, named):
    with pytest.raises(UnsupportedBackboneError, match=named):
        sparsify(tiny_vit(**options), DynamicViTConfig())


def test_a_subclass_with_its_own_forward_is_refused():
    class Changed(timm.models.VisionTransformer):
        pass

    with pytest.raises(UnsupportedBackboneError, match="Changed"):
        family_of(Changed(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 40, 32), (2, 3, 224, 224)])
def test_wrong_image_shapes(shape):
    sparse = sparsify(tiny_vit(), DynamicViTConfig())
    with pytest.raises(InputError, match=r"images"):
        sparse(torch.randn(shape))


def test_dynamic_sizes_must_fit_the_patches():
    sparse = sparsify(tiny_vit(dynamic_img_size=True), DynamicViTConfig())
    with pytest.raises(InputError, match="multiples of the patch size 8 x 8"):
        sparse(torch.randn(1, 3, 33, 32))


def test_gather_keeps_prefix_and_places():
    x = torch.arange(2 * 6 * 1.0).reshape(2, 6, 1)
    tokens = Tokens.of(x, num_prefix=2)
    once = tokens.gather(torch.tensor([[3, 1, 0], [2, 3, 1]]))
    assert once.x[..., 0].tolist() == [[0, 1, 5, 3, 2], [6, 7, 10, 11, 9]]
    twice = once.gather(torch.tensor([[1], [0]]))
    assert twice.index_BN.tolist() == [[1], [2]]
    assert twice.x[..., 0].tolist() == [[0, 1, 3], [6, 7, 10]]


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_r_s16_p8_224", "vit_small_resnet26d_224", "vit_base_mci_224", "vitamin_small_224"],
)
def test_hybrids(name):
    """A convolutional network cuts the image into patches; its MACs are counted, once."""
    torch.manual_seed(0)
    model = jitter(timm.create_model(name, img_size=64, depth=3, num_classes=10)).eval()
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.6)).eval()
    sparse.requires_grad_(False)  # hooks trip over leaves
    family, x = sparse.family, images(1, size=64)
    assert torch.equal(family.head(family.dense(x)), model(x))
    with counting() as counter:
        sparse(x)
    assert sparse.trace(x).macs.item() == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
