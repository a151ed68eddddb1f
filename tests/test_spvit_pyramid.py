"""SPViT on pyramids: what is dropped waits and returns, exactly as if it had only been hidden."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests.conftest import images, seeded, tiny_convnext, tiny_pit, tiny_swin, tiny_vit
from vitrim import ConfigError, SPViTConfig, SPViTPyramidConfig, UnsupportedBackboneError, sparsify
from vitrim.families import family_of
from vitrim.methods.spvit_pyramid import default_stages

X = images(3, seed=5)
BACKBONES = {
    "pit": tiny_pit,
    "pit distilled": lambda **options: tiny_pit("pit_s_distilled_224", **options),
    "swin": lambda **options: tiny_swin(depths=(1, 2, 4, 2), **options),
    "swin, maps that fit no window": lambda **options: tiny_swin(
        depths=(1, 2, 3, 2), img_size=(30, 34), **options
    ),
    "swin without bias": lambda **options: tiny_swin(
        depths=(1, 2, 2, 2), qkv_bias=False, dynamic_img_size=True, **options
    ),
}
each_backbone = pytest.mark.parametrize("name", BACKBONES)


def sparse_pyramid(name="pit", **options):
    """Selectors whose opinions differ between positions and images."""
    sparse = sparsify(BACKBONES[name](), SPViTPyramidConfig(**options), generator=seeded(1))
    with torch.no_grad():
        for module in sparse.method.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(15)
    return sparse.eval()


def x_for(sparse, batch=3):
    return torch.randn(batch, 3, *sparse.family.image_size, generator=seeded(5))


@pytest.mark.parametrize(
    "options",
    [
        {"inference": "top_k", "keep_ratio": 0.6},
        {"inference": "top_k", "keep_ratio": (0.9, 0.5, 0.01)},
        {"inference": "threshold", "threshold": 0.5, "package_mode": "sum"},
        {"package_mode": "mean", "share_heads": False},
    ],
)
@each_backbone
def test_mask_is_gather(name, options):
    """Computing only what is kept is the same function as hiding what is dropped."""
    gathered = sparse_pyramid(name, **options)
    masked = sparse_pyramid(name, execution="mask", **options)
    x = x_for(gathered)
    one, other = gathered.trace(x), masked.trace(x)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
    for stage, same in zip(one.stages, other.stages, strict=True):
        assert torch.equal(stage.counts, same.counts)
        assert stage.grid == same.grid
        assert all(torch.equal(a, b) for a, b in zip(stage.kept, same.kept, strict=True))
    assert one.macs.max() < other.macs.min()
    with torch.no_grad():
        assert (one.logits - gathered.backbone(x)).abs().max() > 1e-3  # it does drop something


@each_backbone
def test_training_is_inference_but_for_its_noise(name):
    sparse = sparse_pyramid(name, sampling="argmax")
    x = x_for(sparse)
    with torch.no_grad():
        output = sparse.method.train_forward(sparse.family, x)
    torch.testing.assert_close(output.logits, sparse(x), atol=2e-5, rtol=1e-4)
    counts = [stage.counts.tolist() for stage in sparse.trace(x).stages]
    assert [keep.sum(1).tolist() for keep in output.keeps] == counts


@pytest.mark.parametrize("margin", [-60.0, 60.0])
@each_backbone
def test_nothing_and_everything_kept(name, margin):
    sparse = sparse_pyramid(name)
    with torch.no_grad():
        for selector in sparse.method.selectors:
            for head in selector.classify:
                head[-1].weight.zero_()
                head[-1].bias.copy_(torch.tensor([margin, -margin]))
    x = x_for(sparse)
    trace = sparse.trace(x)
    assert trace.logits.isfinite().all()
    places = [margin > 0 and stage.scores.shape[1] for stage in trace.stages]
    assert [stage.counts.tolist() for stage in trace.stages] == [[n] * 3 for n in places]
    if margin > 0 and "swin" in name:  # nobody sees a package of nothing
        with torch.no_grad():
            torch.testing.assert_close(trace.logits, sparse.backbone(x), atol=1e-5, rtol=1e-5)


@each_backbone
def test_dropped_positions_stand_still(name):
    """With everything dropped, a stage is what its blocks before the selector made of it."""
    sparse = sparse_pyramid(name)
    family, method = sparse.family, sparse.method
    with torch.no_grad():
        for selector in method.selectors:
            for head in selector.classify:
                head[-1].weight.zero_()
                head[-1].bias.copy_(torch.tensor([-60.0, 60.0]))
        state = family.stem(x_for(sparse))
        stage, (_, place) = next(iter(method._places.items()))
        for earlier in range(stage):
            state = family.run_stage(earlier, state)
        state = family.enter_stage(stage, state)
        for index in range(place):
            state = family.run_block(stage, index, state)
        maps, enter = [], type(family).enter_stage

        def entered(self, number, state):
            if number == stage + 1:
                maps.append(state)
            return enter(self, number, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(family), "enter_stage", entered)
            sparse(x_for(sparse))
    found, expected = maps[0], state
    if "pit" in name:
        assert found.num_prefix == family.num_prefix + 1  # the package
        assert torch.equal(found.patches, expected.patches)
    else:
        assert torch.equal(found.x_BHWC, expected.x_BHWC)


@each_backbone
def test_gradients_reach_decisions_and_backbone(name):
    sparse = sparse_pyramid(name, token_weight=0.0, ratio_weight=0.0, distill_weight=0.0).train()
    x = x_for(sparse)
    sparse.losses(x, torch.tensor([1, 2, 3]), None, seeded(0))["total"].backward()
    assert all(p.grad.isfinite().all() for p in sparse.parameters() if p.grad is not None)
    for selector in sparse.method.selectors:
        assert selector.classify[0][-1].weight.grad.abs().sum() > 0
    assert [n for n, p in sparse.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("pit_ti_224", (1, 5, 10)),
        ("pit_s_224", (1, 5, 10)),
        ("pit_b_224", (1, 6, 11)),
        ("swin_tiny_patch4_window7_224", (2, 4, 10)),
        ("swin_small_patch4_window7_224", (2, 4, 22)),
    ],
)
def test_default_stages(model, stages):
    with torch.device("meta"):
        assert default_stages(family_of(timm.create_model(model))) == stages


@pytest.mark.parametrize(
    ("model", "keep_ratio", "gmacs"),
    [
        ("pit_s_224", 1.0, 2.871),
        ("pit_s_224", (0.617, 0.369, 0.137), 1.957),
        ("swin_tiny_patch4_window7_224", 0.7, 2.775),
    ],
)
def test_costs(model, keep_ratio, gmacs):
    """Dense as published; the others are what our design costs, so that a change is noticed."""
    with torch.device("meta"):
        config = SPViTPyramidConfig(inference="top_k", keep_ratio=keep_ratio)
        sparse = sparsify(timm.create_model(model), config)
    assert sparse.macs() / 1e9 == pytest.approx(gmacs, abs=5.1e-4)


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match='dropped="run" computes dropped positions'):
        SPViTPyramidConfig(dropped="run")
    with pytest.raises(ConfigError, match=r"two of them lie in stage 1 .*blocks 2 to 4"):
        sparsify(tiny_pit(), SPViTPyramidConfig(stages=(2, 4)))
    with pytest.raises(ConfigError, match="stage 7 is outside"):
        sparsify(tiny_pit(), SPViTPyramidConfig(stages=(7,)))
    with pytest.raises(ConfigError, match='inference="top_k" to set ratios'):
        sparse_pyramid().set_keep_ratio(0.5)
    with pytest.raises(ConfigError, match='execution="gather" to change its cost'):
        sparse_pyramid(execution="mask").method.dial()


@pytest.mark.parametrize("make", [tiny_pit, tiny_swin])
def test_the_plain_form_names_this_one(make):
    with pytest.raises(UnsupportedBackboneError, match="spvit_pyramid"):
        sparsify(make(), SPViTConfig())


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext])
def test_backbones_that_it_does_not_run_on(make):
    with pytest.raises(UnsupportedBackboneError, match=r"use spvit|use dynamic_spatial"):
        sparsify(make(), SPViTPyramidConfig())
