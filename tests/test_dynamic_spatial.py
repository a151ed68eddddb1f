"""Dynamic spatial sparsification: choices, paths, training with two maps, costs, guards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import golden, images, seeded, tiny_convnext, tiny_swin, tiny_vit
from vitrim import (
    CheckpointError,
    ConfigError,
    DynamicSpatialConfig,
    DynamicViTConfig,
    UnsupportedBackboneError,
    load_official,
    sparsify,
)
from vitrim.convert.spatial import _CONVNEXT, _SWIN, _counted_from, _renamed
from vitrim.methods.dynamic_spatial import TwoMaps, default_stages
from vitrim.tokens.feature_map import FeatureMap, Partition
from vitrim.train.recipe import load_recipe

X = images(3)
TARGET = torch.tensor([1, 2, 3])
BACKBONES = {"swin": tiny_swin, "convnext": tiny_convnext}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def sparse_model(backbone="swin", size=None, **options):
    """A model whose two paths differ by something that one can see."""
    options = {"stages": (1, 3), "keep_ratio": 0.6, "fast_scale": 0.5} | options
    flexible = {"dynamic_img_size": True} if backbone == "swin" and size else {}
    model = BACKBONES[backbone](**flexible)
    sparse = sparsify(model, DynamicSpatialConfig(**options), generator=seeded(0)).eval()
    generator = seeded(1)
    for module in sparse.method.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3, generator=generator)
    return sparse


def test_the_authors_places():
    places = {6: (1, 2, 3), 9: (1, 2, 3), 18: (2, 4, 6), 27: (3, 6, 9)}
    assert {depth: default_stages(depth) for depth in places} == places
    assert [default_stages(depth) for depth in (1, 2, 3, 4)] == [(0,), (1,), (1, 2), (1, 2, 3)]


@each_backbone
def test_counts_follow_the_authors_arithmetic(backbone):
    """0.7 - 0.2 is less than 0.5 in floating point: 97 positions, not 98."""
    sparse = sparse_model(backbone, stages=None, keep_ratio=0.7)
    method, family = sparse.method, sparse.family
    grid = (56, 56)  # with this stem the third stage has a quarter of its side
    expected = {0.5: (98, 58, 19), 0.6: (117, 78, 39), 0.7: (137, 97, 58), 0.8: (156, 117, 78)}
    for ratio, counts in (expected | {0.9: (176, 137, 98)}).items():
        method.set_keep_ratio(ratio)
        assert method.counts(family, grid) == counts
    method.set_keep_ratio((0.001, 0.5, 1.0))
    assert method.counts(family, grid) == (1, 98, 196)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("swin_tiny_patch4_window7_224", 29.755, {0.9: 4.247, 0.7: 4.041, 0.5: 3.840}),
        ("swin_small_patch4_window7_224", 52.708, {0.9: 7.505, 0.7: 6.846, 0.5: 6.202}),
        ("swin_base_patch4_window7_224", 93.272, {0.9: 13.234, 0.7: 12.063, 0.5: 10.918}),
        ("convnext_tiny", 30.505, {0.9: 3.908, 0.8: 3.743, 0.7: 3.579, 0.5: 3.257}),
        ("convnext_small", 54.523, {0.9: 6.759, 0.8: 6.264, 0.7: 5.772, 0.5: 4.805}),
        ("convnext_base", 96.217, {0.9: 11.934, 0.8: 11.053, 0.7: 10.177, 0.5: 8.460}),
    ],
)
def test_published_costs(name, parameters, gmacs):
    with torch.device("meta"):
        sparse = sparsify(timm.create_model(name), DynamicSpatialConfig())
    assert sum(p.numel() for p in sparse.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
    for ratio, expected in gmacs.items():
        sparse.set_keep_ratio(ratio)
        assert sparse.macs() / 1e9 == pytest.approx(expected, rel=1e-3)


@each_backbone
def test_trace_shows_the_map_of_the_level(backbone):
    sparse = sparse_model(backbone)
    with torch.no_grad():  # the second wants what the first one does not
        sparse.method.predictors[1].classify[4].weight.neg_()
    trace = sparse.trace(X)
    first, second = trace.stages
    assert [stage.block for stage in trace.stages] == [3, 5]  # two blocks come before the level
    assert first.grid == second.grid == (8, 8)
    assert trace.grid == (32, 32)
    assert first.counts.tolist() == [38] * 3
    assert second.counts.tolist() == [25] * 3
    for stage, count in ((first, 38), (second, 25)):
        for scores, kept in zip(stage.scores, stage.kept, strict=True):
            assert torch.equal(scores.topk(count).indices.sort().values, kept)
    came_back = [
        bool(set(later.tolist()) - set(earlier.tolist()))
        for earlier, later in zip(first.kept, second.kept, strict=True)
    ]
    assert any(came_back)  # each choice is among all positions
    assert torch.equal(trace.logits, sparse(X))


@each_backbone
def test_only_what_is_chosen_meets_the_mlp(backbone, monkeypatch):
    sparse = sparse_model(backbone)
    rows = []
    channel = sparse.family.channel

    def counted(level, block, x):
        rows.append((level, block, x.shape[:-1]))
        return channel(level, block, x)

    monkeypatch.setattr(sparse.family, "channel", counted)
    sparse(X)
    expected = [(2, block, (3 * (38 if block < 3 else 25),)) for block in range(1, 6)]
    assert rows == expected


@each_backbone
def test_a_position_takes_one_path(backbone):
    """Inference by index sets is what a mask over both paths, computed everywhere, gives."""
    sparse = sparse_model(backbone, stages=(1,))
    family, method = sparse.family, sparse.method
    fmap = family.enter_stage(2, family.run_stage(1, family.run_stage(0, family.stem(X))))
    fmap = family.run_block(2, 0, fmap)
    keep_BN = torch.zeros(3, 64).scatter(1, sparse_positions(sparse), 1.0)
    x, keep = fmap.x_BHWC, keep_BN.view(3, 8, 8, 1)
    for block in range(1, 6):
        mixed = family.mix(2, block, x)
        slow, fast = family.channel(2, block, mixed), method.fast_paths[block - 1](mixed)
        x = (x if backbone == "convnext" else mixed) + slow * keep + fast * (1 - keep)
    logits = family.head(family.run_stage(3, FeatureMap(x)))
    torch.testing.assert_close(sparse(X), logits, atol=1e-5, rtol=1e-5)


def sparse_positions(sparse):
    return torch.stack(sparse.trace(X).stages[0].kept)


@each_backbone
def test_with_one_predictor_training_is_inference(backbone, monkeypatch):
    """The same positions chosen, the training forward gives the logits of inference."""
    sparse = sparse_model(backbone, stages=(1,))
    chosen = torch.zeros(3, 64).scatter(1, sparse_positions(sparse), 1.0)
    logits = sparse(X)
    monkeypatch.setattr("vitrim.methods.dynamic_spatial.hard_keep", lambda *_, **__: chosen)
    output = sparse.method.train_forward(sparse.family, X)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)


@each_backbone
def test_with_more_predictors_the_shadow_goes_on(backbone, monkeypatch):
    """As released: a position that changes its path goes on from the map in the shadow."""
    sparse = sparse_model(backbone, stages=(1, 2))
    kept = [torch.stack(stage.kept) for stage in sparse.trace(X).stages]
    choices = iter([torch.zeros(3, 64).scatter(1, index, 1.0) for index in kept])
    monkeypatch.setattr("vitrim.methods.dynamic_spatial.hard_keep", lambda *_, **__: next(choices))
    output = sparse.method.train_forward(sparse.family, X)
    assert (output.logits - sparse(X)).abs().max() > 1e-3


def test_two_maps_merge_by_the_mask():
    slow, fast = torch.randn(2, 3, 3, 4), torch.randn(2, 3, 3, 4)
    keep = torch.zeros(2, 3, 3, 1)
    keep[0, 1, 2] = 1
    merged = TwoMaps(slow, fast, keep).merged()
    assert torch.equal(merged[0, 1, 2], slow[0, 1, 2])
    merged[0, 1, 2] = fast[0, 1, 2]
    assert torch.equal(merged, fast)


@each_backbone
def test_a_new_model_starts_as_the_authors(backbone):
    """ConvNeXt's fast path starts at a layer scale of 1e-6, Swin's has none."""
    model = BACKBONES[backbone]()
    sparse = sparsify(model, DynamicSpatialConfig(), generator=seeded(0)).eval()
    for fast_path in sparse.method.fast_paths:
        if backbone == "convnext":
            assert torch.equal(fast_path.scale, torch.full((32,), 1e-6))
        else:
            assert fast_path.scale is None
        assert 0.01 < fast_path.linear.weight.std() < 0.03
        assert not fast_path.linear.bias.any()
    eps = {"swin": 1e-5, "convnext": 1e-6}[backbone]
    norms = [module for module in sparse.method.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {eps}


@each_backbone
def test_keeping_everything_is_dense_and_runs_no_predictor(backbone):
    model = BACKBONES[backbone]()
    sparse = sparsify(model, DynamicSpatialConfig(keep_ratio=(1.0, 1.0, 1.0))).eval()
    assert torch.equal(sparse(X), model(X))
    assert torch.equal(sparse.trace(X).logits, model(X))
    assert sparse.macs() == sparse.dense_macs()
    sparse.set_keep_ratio((1.0, 0.5, 1.0))
    assert not torch.equal(sparse(X), model(X))


@each_backbone
def test_slices_give_the_numbers_of_timm(backbone, monkeypatch):
    """Whole blocks on slices of the map, without gradients and outside of graphs alone."""
    model = BACKBONES[backbone]()
    sparse = sparsify(model, DynamicSpatialConfig(keep_ratio=(1.0, 1.0, 1.0))).eval()
    whole = []
    run_block = sparse.family.run_block
    monkeypatch.setattr(
        sparse.family, "run_block", lambda *block: whole.append(block[:2]) or run_block(*block)
    )
    monkeypatch.setattr("vitrim.tokens.feature_map.SLICE", 5000)
    with torch.no_grad():
        torch.testing.assert_close(sparse(X), model(X), atol=1e-5, rtol=0)
        assert whole == [(3, 0)]  # 3 images of 16 positions of 64 channels: one slice
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sparse(X), model(X))
    assert len(whole) == 1 + 9
    sparse(X)
    assert len(whole) == 1 + 9 + 9


@each_backbone
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_and_image_size(backbone, batch):
    sparse = sparse_model(backbone, size="any")
    together = sparse(X[:batch])
    torch.testing.assert_close(together, sparse(X)[:batch], atol=1e-5, rtol=1e-5)
    for size in ((48, 32), (40, 56)):
        x = torch.randn(batch, 3, *size, generator=seeded(5))
        trace = sparse.trace(x)
        torch.testing.assert_close(sparse(x), trace.logits)
        assert trace.macs.tolist() == [sparse.macs(size)] * batch
        grid = sparse.family.stage_grid(sparse.family.grid(size), 2)
        assert [stage.grid for stage in trace.stages] == [grid, grid]
        counts = sparse.method.counts(sparse.family, sparse.family.grid(size))
        assert [stage.counts.tolist() for stage in trace.stages] == [[c] * batch for c in counts]


@pytest.mark.parametrize("side", [29, 30, 31, 33])
def test_maps_with_odd_sides(side):
    """Swin pads an odd side before it halves it, ConvNeXt cuts it: counts follow the real map."""
    for backbone in BACKBONES:
        sparse = sparse_model(backbone, size="any")
        x = torch.randn(1, 3, side, side, generator=seeded(6))
        trace = sparse.trace(x)
        counts = sparse.method.counts(sparse.family, sparse.family.grid((side, side)))
        assert tuple(stage.counts.item() for stage in trace.stages) == counts
        assert trace.macs.item() == sparse.macs((side, side))


@each_backbone
def test_the_pyramid_has_the_method_in_it(backbone):
    sparse = sparse_model(backbone)
    dense = sparse.family.pyramid(X)[0]
    levels = sparse.features(X)
    assert [level.shape for level in levels] == [level.shape for level in dense]
    for level in (0, 1):
        assert torch.equal(levels[level], dense[level])
    for level in (2, 3):
        assert (levels[level] - dense[level]).abs().max() > 1e-3
    fmap = FeatureMap(levels[-1].permute(0, 2, 3, 1))
    assert torch.equal(sparse.family.head(fmap), sparse(X))


@each_backbone
@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_nothing_and_everything_drawn_are_finite(backbone, bias):
    sparse = sparse_model(backbone).train()
    for predictor in sparse.method.predictors:
        nn.init.constant_(predictor.classify[4].bias[:1], bias)
    teacher = sparse.method.teach(sparse.family, X)
    parts = sparse.losses(X, TARGET, teacher, seeded(0))
    parts["total"].backward()
    assert all(value.isfinite() for value in parts.values())
    assert all(p.grad.isfinite().all() for p in sparse.parameters())
    drawn = 1.0 if bias > 0 else 0.0
    expected = sum((drawn - ratio) ** 2 for ratio in (0.6, 0.6 - 0.2)) / 2
    assert parts["ratio"].item() == pytest.approx(expected, rel=1e-5)


@each_backbone
def test_losses_are_weighted_and_left_out(backbone):
    sparse = sparse_model(backbone, ratio_weight=3.0, token_weight=0.25).train()
    teacher = sparse.method.teach(family := sparse.family, X)
    assert teacher.patch_features.shape == family.patch_features(family.dense(X)).shape
    parts = sparse.losses(X, TARGET, teacher, seeded(0))
    weights = {"classification": 1.0, "ratio": 3.0, "distill": 0.5, "token": 0.25}
    total = sum(weight * parts[name] for name, weight in weights.items())
    torch.testing.assert_close(parts["total"], total)
    output = sparse.method.train_forward(family, X, seeded(0))
    error = (output.patch_features - teacher.patch_features).square().mean()
    torch.testing.assert_close(parts["token"], error)
    assert sparse.losses(X, None, None, seeded(0)).keys() == {"ratio", "total"}


@each_backbone
def test_ratio_changes_at_run_time(backbone):
    sparse = sparse_model(backbone)
    before = sparse.macs()
    sparse.set_keep_ratio(0.3)
    assert sparse.macs() < before
    assert sparse.method.counts(sparse.family, (32, 32)) == (19, 6)
    sparse.set_keep_ratio([0.2, 0.9])
    assert [stage.counts[0].item() for stage in sparse.trace(X).stages] == [12, 57]
    for wrong in (0.0, 0.2, 1.2, (0.9,), "0.5"):
        with pytest.raises(ConfigError, match="keep_ratio"):
            sparse.set_keep_ratio(wrong)
    assert sparse.config.keep_ratio == (0.2, 0.9)
    sparse.set_budget(0.9)
    assert sparse.macs() == pytest.approx(0.9 * sparse.dense_macs(), rel=0.02)
    with pytest.raises(ConfigError, match="budget"):
        sparse.set_budget(0.2)


@each_backbone
def test_macs_of_tensor_counts_are_those_of_numbers(backbone):
    sparse = sparse_model(backbone)
    counts = torch.tensor([[64.0, 38.0], [25.0, 64.0]], dtype=torch.float64, requires_grad=True)
    macs = sparse.method.macs(sparse.family, (32, 32), counts)
    for image, pair in enumerate(((64, 25), (38, 64))):
        assert macs[image].item() == sparse.method.macs(sparse.family, (32, 32), pair)
    macs.sum().backward()
    slow, fast = sparse.family.channel_macs(2, 1, 1), 32 * 32
    assert counts.grad.tolist() == [[2.0 * (slow - fast)] * 2, [3.0 * (slow - fast)] * 2]


@each_backbone
def test_another_level_can_be_made_sparse(backbone):
    sparse = sparse_model(backbone, level=3, stages=(0,))
    trace = sparse.trace(X)
    assert [stage.grid for stage in trace.stages] == [(4, 4)]
    assert trace.macs[0] == sparse.macs()
    with pytest.raises(ConfigError, match="level is 4; this backbone has levels 0 to 3"):
        sparse_model(backbone, level=4)


@each_backbone
def test_deep_copies_are_independent(backbone):
    sparse = sparse_model(backbone)
    twin = copy.deepcopy(sparse)
    nn.init.zeros_(twin.backbone.head.fc.weight)
    assert not torch.equal(sparse(X), twin(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio is 0.0; expected a number in \(0, 1\]"),
        ({"keep_ratio": (0.5, 1.5)}, "keep_ratio is 1.5"),
        ({"keep_ratio": ()}, "keep_ratio is empty"),
        ({"keep_ratio": (0.5,), "stages": (1, 2)}, "1 numbers for 2 stages"),
        ({"keep_ratio": 0.4, "stages": (1, 2, 3)}, r"give more than 0.4, or a tuple"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (3, 1)}, "increasing"),
        ({"level": -1}, "level is -1"),
        ({"temperature": 0.0}, "temperature"),
        ({"token_weight": -1.0}, "token_weight is -1.0"),
        ({"sampling": "top_k"}, "use one of 'gumbel', 'argmax'"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        DynamicSpatialConfig(**options)


def test_what_does_not_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"stage 6 is outside .* blocks are 0 to 5"):
        sparse_model(stages=(1, 6))
    with pytest.raises(ConfigError, match=r"last of 3 predictors would keep -0\.1"):
        sparse_model(stages=None, keep_ratio=0.3)
    with pytest.raises(UnsupportedBackboneError, match=r"dynamic_spatial .* use dynamicvit"):
        sparsify(tiny_vit(), DynamicSpatialConfig())
    with pytest.raises(UnsupportedBackboneError, match=r"dynamicvit .* use dynamic_spatial"):
        sparsify(tiny_swin(), DynamicViTConfig())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_a_partition_puts_every_row_back(batch, positions, data):
    count = data.draw(st.integers(1, positions))
    score_BN = torch.rand(batch, positions, generator=seeded(positions))
    partition = Partition.best(score_BN, count)
    first_BN = partition.first_BN(batch)
    assert first_BN.sum(1).tolist() == [count] * batch
    worst = score_BN.masked_fill(~first_BN, 2).amin(1)
    assert (score_BN.masked_fill(first_BN, -1).amax(1) <= worst).all()
    x_BHWC = torch.randn(batch, 1, positions, 3)
    found = partition.run(x_BHWC, lambda x: x + 1, lambda x: x * 2)
    expected = torch.where(first_BN.view(batch, 1, positions, 1), x_BHWC + 1, x_BHWC * 2)
    assert torch.equal(found, expected)


def official_weights(sparse, case):
    """The weights of ``sparse`` under the authors' names, which are those of a golden case."""
    ours = sparse.state_dict()
    first = sparse.method.stages[0]
    official = {}
    for key, _, _ in golden(case)["weights"]["state_dict"]:
        name = _renamed(key, _CONVNEXT if "convnext" in case else _SWIN)
        if "fast_paths" in name:
            name = next(iter(_counted_from(first, {name: key})))
        if name in ours:
            official[key] = ours[name]
    return official


@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_of_other_sizes_are_read(backbone):
    """Architectures without a name of their own: the sizes come from the shapes."""
    if backbone == "swin":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=8,
            depths=(2, 2, 6, 2),
            num_heads=(1, 1, 2, 2),
            num_classes=5,
        )
    else:
        model = timm.create_model(
            "convnext_tiny", dims=(8, 16, 32, 64), depths=(3, 3, 9, 3), num_classes=5
        )
    model = model.eval()
    sparse = sparsify(model, DynamicSpatialConfig()).eval()
    case = (
        "dynamicvit_"
        + {"swin": "swin-t_r0.7_eval_b1", "convnext": "convnext-t_r0.7_eval"}[backbone]
    )
    weights = official_weights(sparse, case)
    assert len(weights) == len(sparse.state_dict())
    if backbone == "swin":
        weights["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    loaded = load_official({"model": weights}, "dynamicvit")
    x = images(2, size=64)
    assert torch.equal(loaded(x), sparse(x))

    with pytest.raises(CheckpointError, match=r"pass stages=\(1, ...\) with 3 blocks"):
        load_official(weights, "dynamicvit", stages=(2, 3, 4))
    predictors = [key for key in weights if "score_predictor" in key]
    without = {key: value for key, value in weights.items() if key not in predictors}
    with pytest.raises(CheckpointError, match="no score_predictor"):
        load_official(without, "dynamicvit")
    with pytest.raises(CheckpointError, match=r"unexpected backbone\.stranger"):
        load_official(weights | {"stranger": torch.zeros(1)}, "dynamicvit")


def test_config_round_trip():
    config = DynamicSpatialConfig(stages=[1, 2], keep_ratio=[0.5, 1])
    assert config.stages == (1, 2)
    assert config.keep_ratio == (0.5, 1.0)
    assert replace(config, keep_ratio=0.7).ratios(3) == (0.7, 0.49999999999999994, 0.7 - 0.4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("size", "drop_path"), [("t", 0.2), ("s", 0.2), ("b", 0.5)])
def test_the_released_recipe(backbone, size, drop_path):
    recipe = load_recipe(f"dynamic_spatial-{backbone}-{size}")
    assert recipe.method.build() == DynamicSpatialConfig()
    assert recipe.model.kwargs == {"drop_path_rate": drop_path}
    assert timm.is_model(recipe.model.name)
    optim, run = recipe.optim, recipe.run
    assert (optim.lr, optim.lr_batch, optim.backbone_lr_scale) == (4e-3, None, 0.2)
    assert (optim.freeze_backbone_epochs, optim.warmup_epochs, optim.min_lr) == (5, 20, 1e-6)
    assert (run.epochs, run.precision, optim.ema_decay) == (120, "fp32", 0.9999)
    assert recipe.data.batch_size * optim.accumulate * 8 == 4096


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_short_recipes_fit_together(backbone):
    dense, sparse = (
        load_recipe(name) for name in (f"digits-{backbone}", f"digits-dynamic_spatial-{backbone}")
    )
    assert (dense.model.name, dense.model.kwargs) == (sparse.model.name, sparse.model.kwargs)
    model = timm.create_model(sparse.model.name, **sparse.model.kwargs)
    made = sparsify(model, sparse.method.build())
    assert made.family.image_size == (64, 64)
    expected = {"swin": (44, 31, 19), "convnext": (11, 7, 4)}[backbone]
    assert made.method.counts(made.family, made.family.grid()) == expected
