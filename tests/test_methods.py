"""The contract of every method: one suite over all of them.

A new method adds its configs to ``CASES``; what is particular to it is tested in a file of its own.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import vitrim
from tests.conftest import (
    clips,
    images,
    seeded,
    tiny_convnext,
    tiny_eva,
    tiny_lvvit,
    tiny_naflex,
    tiny_pit,
    tiny_swin,
    tiny_swin_v2,
    tiny_video_swin,
    tiny_vit,
)
from vitrim import (
    ASViTConfig,
    DenseConfig,
    DynamicSpatialConfig,
    DynamicViTConfig,
    MergingConfig,
    SaiTConfig,
    SPViTConfig,
    SPViTPyramidConfig,
    STViTConfig,
    STViTRConfig,
    STViTSwinConfig,
    STViTVideoConfig,
    from_pretrained,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.methods import METHODS, method_of_config

X = images(3)
TARGET = torch.tensor([1, 2, 3])

CASES = {
    "dense": DenseConfig(),
    "dense whole": DenseConfig(exact_last_block=False),
    "merging": MergingConfig(stages=(1, 3), keep_ratio=0.6),
    "merging tome": MergingConfig.tome(2.5),
    "merging keys": MergingConfig(metric="keys", keep_ratio=0.6),
    "merging threshold": MergingConfig(stages=(1, 3), threshold=0.1),
    "merging and dropping": MergingConfig(stages=(1, 2), action=("merge", "drop")),
    "dynamicvit": DynamicViTConfig(stages=(1, 2), keep_ratio=0.6),
    "dynamicvit threshold": DynamicViTConfig(stages=(1, 2), threshold=0.5),
    "dynamicvit merging": DynamicViTConfig(stages=(1, 2), keep_ratio=0.6, merge_dropped=True),
    "dynamic_spatial": DynamicSpatialConfig(stages=(1, 3), keep_ratio=0.6),
    "dynamic_spatial per predictor": DynamicSpatialConfig(keep_ratio=(0.3, 0.7, 0.5)),
    "asvit": ASViTConfig(thresholds=0.06),
    "asvit masked": ASViTConfig(thresholds=0.06, mode="mask", head_weighting=False),
    "asvit merging": ASViTConfig(thresholds=0.06, merge_dropped=True),
    "asvit values": ASViTConfig(thresholds=0.06, value_weighting=True),
    "sait density": SaiTConfig(selector="density", where="mid"),
    "sait mass": SaiTConfig(min_kept=0, mass=0.6, prune_after=2),
    "sait threshold": SaiTConfig(selector="threshold", min_kept=2, score="cls_value_norm"),
    "stvit": STViTConfig(semantic_tokens=(2, 3)),
    "stvit learned pooling": STViTConfig(semantic_tokens=4, pooling="intra_inter", layer_scale=0.5),
    "stvit with prefix": STViTConfig(
        semantic_tokens=4, pooling="avg", global_centres=False, keep_prefix=True
    ),
    "stvit_r": STViTRConfig(window_tokens=4, layer_scale=0.5),
    "stvit_r with everything": STViTRConfig(
        window_tokens=4,
        residual=True,
        global_centres=True,
        position_convolution=True,
        layer_scale=0.5,
        pooling="intra_inter",
    ),
    "stvit_r dense": STViTRConfig(form="dense", window_tokens=4, layer_scale=0.5),
    "stvit_swin": STViTSwinConfig(window_tokens=4),
    "stvit_swin learned pooling": STViTSwinConfig(
        window_tokens=9, pooling="intra_inter", layer_scale=0.5, base_layers=1
    ),
    "stvit_swin without centres": STViTSwinConfig(
        window_tokens=4, global_centres=False, pooling="avg"
    ),
    "stvit_video": STViTVideoConfig(window_tokens=4),
    "stvit_video with everything": STViTVideoConfig(
        window_tokens=9,
        pooling="intra_inter",
        layer_scale=0.5,
        base_layers=1,
        global_centres=True,
        residual=False,
    ),
    "spvit": SPViTConfig(stages=(1, 2)),
    "spvit fixed": SPViTConfig(stages=(1, 2), keep_ratio=0.6, inference="top_k"),
    "spvit threshold": SPViTConfig(
        stages=(1, 2), inference="threshold", package_policy="accumulate", package_mode="sum"
    ),
    "spvit_pyramid": SPViTPyramidConfig(),
    "spvit_pyramid fixed": SPViTPyramidConfig(inference="top_k", keep_ratio=0.6),
    "spvit_pyramid threshold": SPViTPyramidConfig(
        stages=(1, 5), inference="threshold", package_mode="mean", share_heads=False
    ),
    "spvit_pyramid masked": SPViTPyramidConfig(execution="mask", dropped="run"),
}
"""Name: a config for a backbone of 4 blocks and 16 patches."""

KEEPS_ALL = {
    "dense": DenseConfig(),
    "dense whole": DenseConfig(exact_last_block=False),
    "merging": MergingConfig(keep_ratio=1.0),
    "merging tome": MergingConfig.tome(0),
    "merging threshold": MergingConfig(threshold=0.0),
    "dynamicvit": DynamicViTConfig(stages=(1, 2), keep_ratio=1.0),
    "dynamicvit threshold": DynamicViTConfig(stages=(1, 2), threshold=0.0),
    "dynamicvit merging": DynamicViTConfig(stages=(1, 2), threshold=0.0, merge_dropped=True),
    "dynamic_spatial": DynamicSpatialConfig(stages=(1, 3), keep_ratio=(1.0, 1.0)),
    "asvit": ASViTConfig(thresholds=1e-9),
    "asvit masked": ASViTConfig(thresholds=1e-9, mode="mask"),
    "sait density": SaiTConfig(selector="density", density=1.0),
    "sait mass": SaiTConfig(mass=1.0, where="mid"),
    "sait threshold": SaiTConfig(selector="threshold", threshold=0.0),
    "spvit fixed": SPViTConfig(stages=(1, 2), keep_ratio=1.0, inference="top_k"),
    "spvit threshold": SPViTConfig(stages=(1, 2), inference="threshold", threshold=0.0),
    "spvit_pyramid fixed": SPViTPyramidConfig(inference="top_k", keep_ratio=1.0),
    "spvit_pyramid threshold": SPViTPyramidConfig(inference="threshold", threshold=0.0),
}
"""The same for configs that keep everything, and so must equal the dense model."""

BACKBONES = {
    "class token": tiny_vit,
    "average pool": partial(tiny_vit, class_token=False, global_pool="avg"),
    "attention pool": partial(tiny_vit, class_token=False, global_pool="map"),
    "registers": partial(tiny_vit, class_token=False, reg_tokens=2, global_pool="avg"),
    "class and registers": partial(tiny_vit, reg_tokens=2),
    "scale and norm": partial(tiny_vit, init_values=0.5, qk_norm=True),
    "rotary": partial(tiny_eva, "vit_small_patch16_dinov3"),
    "rotary per block": partial(tiny_eva, "vit_small_patch16_rope_mixed_224"),
    "naflex": tiny_naflex,
    "lv-vit": tiny_lvvit,
    "pit": tiny_pit,
    "swin": tiny_swin,
    "swin v2": tiny_swin_v2,
    "convnext": tiny_convnext,
    "convolutions as mlp": partial(tiny_convnext, conv_mlp=True),
    "video swin": tiny_video_swin,
}
"""Name: makes a tiny backbone for images of 32 x 32 pixels, or 8 such frames, with 10 classes."""

FAMILIES = {name: family_of(make()).name for name, make in BACKBONES.items()}
METHOD = {name: method_of_config(config) for name, config in CASES.items()}
ALIKE = ("rotary per block", "naflex")
"""Backbones that are made of the parts of others."""
FEW = ("dynamicvit threshold", "merging keys", "stvit with prefix", "spvit", "dynamic_spatial")
"""Cases that are enough for them."""
PAIRS = [
    (case, name)
    for case in CASES
    for name in BACKBONES
    if FAMILIES[name] in METHOD[case].families and (name not in ALIKE or case in FEW)
]
"""Every case on every backbone that its method runs on."""
FIRST = [
    (case, name)
    for case, name in PAIRS
    if name == next(other for other in FAMILIES if FAMILIES[other] == FAMILIES[name])
]
"""Every case on one backbone of each family that its method runs on."""

OF_CLIPS = {name for name in BACKBONES if FAMILIES[name] == "video_swin"}
FIRST_OF_IMAGES = [(case, name) for case, name in FIRST if name not in OF_CLIPS]

each_pair = pytest.mark.parametrize(("case", "backbone"), PAIRS)
each_case = pytest.mark.parametrize(("case", "backbone"), FIRST)
each_case_of_images = pytest.mark.parametrize(("case", "backbone"), FIRST_OF_IMAGES)


def given(backbone: str, batch: int = 3, size: int = 32, seed: int = 0):
    """What a backbone takes: images of so many pixels a side, or clips of as many."""
    if backbone in OF_CLIPS:
        return clips(batch, (8, size, size), seed)
    return images(batch, size, seed)


def sparse_model(case: str, backbone: str = "class token", **kwargs):
    """The case's method on the backbone, with method parameters that decide something."""
    return sparsify(BACKBONES[backbone](**kwargs), CASES[case], generator=seeded(3)).eval()


def is_fixed(case: str, backbone: str) -> bool:
    return sparse_model(case, backbone).macs() is not None


def test_every_method_is_under_contract():
    assert {type(config) for config in CASES.values()} == {
        method.config_class for method in METHODS.values()
    }


@each_pair
def test_logits_are_finite_deterministic_and_of_their_shape(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    for batch in (1, 3):
        logits = sparse(x[:batch])
        assert logits.shape == (batch, 10)
        assert logits.isfinite().all()
        assert torch.equal(logits, sparse(x[:batch]))
        trace = sparse.trace(x[:batch])
        torch.testing.assert_close(trace.logits, logits, atol=1e-6, rtol=0)
        assert trace.macs.shape == (batch,)
        assert all(stage.counts.shape == (batch,) for stage in trace.stages)


@each_pair
def test_images_do_not_see_each_other(case, backbone):
    sparse, x = sparse_model(case, backbone), given(backbone, 6, seed=8)
    together = sparse(x)
    alone = torch.cat([sparse(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(sparse(x.flip(0)).flip(0), together, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("case", "backbone"), [pair for pair in PAIRS if pair[0] in KEEPS_ALL])
def test_keeping_everything_is_the_dense_model(case, backbone):
    x = given(backbone)
    model = BACKBONES[backbone]()
    dense = model(x)
    sparse = sparsify(model, KEEPS_ALL[case], generator=seeded(3)).eval()
    torch.testing.assert_close(sparse(x), dense, atol=1e-5, rtol=0)
    assert sparse.unwrap() is model
    assert torch.equal(model(x), dense)


@each_pair
def test_macs_are_what_torch_counts(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone).requires_grad_(False)  # hooks trip over leaves
    for image in x:
        with torch.no_grad(), counting() as counter:
            sparse(image[None])
        counted = counter.get_total_flops() / 2
        assert sparse.trace(image[None]).macs.item() == pytest.approx(counted, rel=1e-3)
    if sparse.macs() is not None:
        assert sparse.macs() == sparse.trace(x).macs[0].item()


@each_case
def test_saved_and_loaded_it_is_the_same(case, backbone, tmp_path):
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    sparse.save_pretrained(tmp_path / "checkpoint")
    loaded = from_pretrained(tmp_path / "checkpoint").eval()
    assert loaded.config == sparse.config
    assert torch.equal(loaded(x), sparse(x))


@each_pair
def test_gradients_reach_what_the_method_learns(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone).train()
    teacher = sparse.method.teach(family_of(BACKBONES[backbone]()), x)
    parts = sparse.losses(x, TARGET, teacher, seeded(0))
    parts["total"].backward()
    assert all(value.isfinite() for value in parts.values())
    for name, parameter in sparse.method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@each_case
def test_the_loss_falls(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone).train()
    teacher = sparse.method.teach(family_of(BACKBONES[backbone]()), x)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-3)
    totals = []
    for _ in range(12):
        total = sparse.losses(x, TARGET, teacher, seeded(0))["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert min(totals[-3:]) < totals[0]


@each_case
def test_training_follows_its_generator(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone).train()
    teacher = sparse.method.teach(family_of(BACKBONES[backbone]()), x)
    one, same = (sparse.losses(x, TARGET, teacher, seeded(1))["total"] for _ in range(2))
    assert torch.equal(one, same)


@each_case
def test_other_image_sizes(case, backbone):
    flexible = {"convnext": {}, "naflex": {}, "video_swin": {}, "pit": {"img_size": 48}}
    # timm's PiT takes one size
    options = flexible.get(FAMILIES[backbone], {"dynamic_img_size": True})
    sparse = sparse_model(case, backbone, **options)
    logits = sparse(given(backbone, 2, 48))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@each_case
def test_half_precision(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).isfinite().all()
    assert sparse.to(torch.bfloat16)(x.bfloat16()).isfinite().all()


@each_case
def test_dial_moves_the_cost(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    try:
        dial = sparse.method.dial()
    except vitrim.ConfigError as error:
        assert sparse.method.name in str(error)  # noqa: PT017 - a method without a dial says so
        return
    costs, kept = [], []
    for value in (dial.cheapest, dial.value, dial.dearest):
        sparse.method.turn(value)
        assert sparse.method.dial().value == pytest.approx(value)
        trace = sparse.trace(x)
        costs.append(trace.macs.mean().item())
        kept.append([stage.counts.double().mean().item() for stage in trace.stages])
    for counts in zip(*kept, strict=True):
        assert list(counts) == sorted(counts)
    assert costs[0] <= costs[1]  # at its dearest a method may do without its selectors
    assert costs[0] < costs[-1]


@pytest.mark.parametrize(
    ("case", "backbone"), [pair for pair in FIRST if pair[1] != "rotary" or pair[0] in FEW]
)
def test_compiles(case, backbone):
    """With fixed counts the whole forward is one graph."""
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=is_fixed(case, backbone))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sparse(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("case", "backbone"), [pair for pair in FIRST if is_fixed(*pair)])
def test_exports(case, backbone):
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    program = torch.export.export(sparse, (x,))
    torch.testing.assert_close(program.module()(x), sparse(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("case", "backbone"), [pair for pair in FIRST if "masked" in pair[0]])
def test_what_is_masked_is_exported_with_the_same_numbers(case, backbone):
    """Dropped tokens, too, see what they see in torch: where they run on, it matters."""
    x = given(backbone)
    sparse = sparse_model(case, backbone)
    program = torch.export.export(sparse, (x,))
    torch.testing.assert_close(program.module()(x), sparse(x), atol=2e-5, rtol=0)
