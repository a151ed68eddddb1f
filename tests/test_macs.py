"""MACs: the formula against torch's counter, and the published costs and parameter counts."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from tests.test_families import VARIANTS, backbone, variant_images
from vitrim import DynamicViTConfig, sparsify
from vitrim.costs.macs import counting


def counted(model, x):
    model = copy.deepcopy(model).requires_grad_(False)  # the counter's hooks trip over leaf inputs
    with torch.no_grad(), counting() as counter:
        model(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("keep_ratio", [1.0, 0.7, 0.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula_is_what_torch_counts(variant, keep_ratio):
    model = backbone(variant)
    sparse = sparsify(model, DynamicViTConfig(keep_ratio=keep_ratio, stages=(1, 3)))
    x = variant_images(model, 1)
    assert sparse.macs() == pytest.approx(counted(sparse, x), rel=1e-3)
    assert sparse.dense_macs() == pytest.approx(counted(model, x), rel=1e-3)
    assert sparse.trace(x).macs.tolist() == [sparse.macs()]


# DynamicViT, table of measured costs: model, ratio, GMACs, parameters in millions.
PUBLISHED = [
    ("deit_small_patch16_224", {}, None, 4.599, 22.051),
    ("deit_small_patch16_224", {}, 0.9, 4.041, 22.774),
    ("deit_small_patch16_224", {}, 0.8, 3.463, 22.774),
    ("deit_small_patch16_224", {}, 0.7, 2.981, 22.774),
    ("deit_small_patch16_224", {}, 0.6, 2.565, 22.774),
    ("deit_small_patch16_224", {}, 0.5, 2.229, 22.774),
    ("deit_tiny_patch16_224", {}, None, 1.254, 5.717),
    ("deit_tiny_patch16_224", {}, 0.9, 1.092, 5.900),
    ("deit_tiny_patch16_224", {}, 0.8, 0.932, 5.900),
    ("deit_tiny_patch16_224", {}, 0.7, 0.801, 5.900),
    ("deit_tiny_patch16_224", {}, 0.5, 0.602, 5.900),
    ("deit_base_patch16_224", {}, None, 17.564, 86.568),
    ("deit_base_patch16_224", {}, 0.9, 15.512, 89.453),
    ("deit_base_patch16_224", {}, 0.8, 13.323, 89.453),
    ("deit_base_patch16_224", {}, 0.7, 11.476, 89.453),
    ("deit_base_patch16_224", {}, 0.5, 8.561, 89.453),
    ("deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4}, None, 2.136, 9.982),
    ("deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4}, 0.7, 1.375, 10.305),
    ("deit_small_patch16_224", {"img_size": 384}, None, 15.490, None),
    ("deit_small_patch16_224", {"img_size": 384}, 0.7, 9.652, None),
    ("deit_small_patch16_224", {"img_size": 384}, 0.5, 7.187, None),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "keep_ratio", "gmacs", "mega_parameters"),
    PUBLISHED,
    ids=[f"{name}-{kwargs}-r{ratio}-{gmacs}G" for name, kwargs, ratio, gmacs, _ in PUBLISHED],
)
def test_published_costs(name, kwargs, keep_ratio, gmacs, mega_parameters):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
        config = DynamicViTConfig(keep_ratio=keep_ratio or 0.7, exact_last_block=False)
        sparse = sparsify(model, config)
    counted_model = model if keep_ratio is None else sparse
    macs = sparse.dense_macs() if keep_ratio is None else sparse.macs()
    assert macs / 1e9 == pytest.approx(gmacs, abs=5.1e-4)
    if mega_parameters is not None:
        parameters = sum(p.numel() for p in counted_model.parameters())
        assert parameters / 1e6 == pytest.approx(mega_parameters, abs=5.1e-4)


def test_macs_grow_with_every_count_and_carry_gradients():
    sparse = sparsify(backbone("vit"), DynamicViTConfig(stages=(1, 2), threshold=0.5))
    counts = torch.tensor([9.0, 5.0], requires_grad=True)
    sparse.method.macs(sparse.family, (4, 4), list(counts)).backward()
    assert (counts.grad > 0).all()
    assert sparse.macs() is None
