"""STViT on Swin: published costs, the equations, borders, options, guards, the dial."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.conftest import images, norm_operations, seeded, tiny_swin, tiny_vit
from vitrim import (
    ConfigError,
    STViTConfig,
    STViTSwinConfig,
    UnsupportedBackboneError,
    calibrate,
    from_pretrained,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.families import family_of

TARGET = torch.tensor([1, 2, 3])


def sparse_swin(model=None, **options):
    model = tiny_swin() if model is None else model
    options = {"window_tokens": 4} | options
    return sparsify(model, STViTSwinConfig(**options), generator=seeded(0)).eval()


COSTS = [
    ("tiny", 9, 3.138),
    ("small", 9, 5.947),
    ("base", 9, 10.477),
    ("tiny", 16, 4.509 * (1 - 0.245)),
    ("small", 16, 8.769 * (1 - 0.262)),
    ("base", 16, 15.468 * (1 - 0.263)),
    ("tiny", 4, None),
]


@pytest.mark.parametrize(
    ("size", "tokens", "gmacs"), COSTS, ids=[f"swin-{s}-{n}tokens-{g}G" for s, n, g in COSTS]
)
def test_published_costs(size, tokens, gmacs):
    """Published costs count five operations for each value that a norm reads."""
    with torch.device("meta"):
        model = timm.create_model(f"swin_{size}_patch4_window7_224").requires_grad_(False)
        sparse = sparsify(model, STViTSwinConfig(window_tokens=tokens)).eval()
        norms = norm_operations(sparse)
        with torch.no_grad(), counting() as counter:
            sparse(torch.empty(1, 3, 224, 224))
    assert sparse.macs() == counter.get_total_flops() / 2
    if gmacs is not None:
        assert (sparse.macs() + sum(norms)) / 1e9 == pytest.approx(gmacs, rel=7e-4)


def test_the_published_layout():
    with torch.device("meta"):
        for size, stage in (("tiny", 2 + 2 + 3 + 2), ("small", 2 + 2 + 10 + 2)):
            model = timm.create_model(f"swin_{size}_patch4_window7_224")
            sparse = sparsify(model, STViTSwinConfig())
            assert sparse.method.stages == (stage,)
            assert sparse.method.counts(sparse.family, (56, 56)) == (36,)


def attention_of(block, query, memory):
    """A block's attention from ``query`` (B, Q, C) to ``memory`` (B, K, C), by the definition."""
    attention, (batch, count, width) = block.attn, query.shape
    qkv = attention.qkv.weight.split(width), attention.qkv.bias.split(width)
    q, k, v = (
        F.linear(block.norm1(x), weight, bias)
        .reshape(batch, -1, attention.num_heads, width // attention.num_heads)
        .transpose(1, 2)
        for x, weight, bias in zip((query, memory, memory), *qkv, strict=True)
    )
    weights = (q @ k.mT * (width // attention.num_heads) ** -0.5).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(batch, count, width)), weights


def block_between(block, query, residual, memory):
    x = residual + attention_of(block, query, memory)[0]
    return x + block.mlp(block.norm2(x))


def near(index, count, window, reach, length):
    """Rows of the larger window about a window: centred, moved into the padded map, cut off."""
    start = index * window - (reach - window) // 2
    start = max(0, min(start, count * window - reach))
    return range(start, min(start + reach, length))


def reference(model, sparse, x, side, reach):
    """The method by loops over windows that are cut off at the border."""
    window = 4
    x = model.layers[1](model.layers[0](model.patch_embed(x)))
    stage = model.layers[2]
    x = stage.blocks[2](stage.blocks[1](stage.blocks[0](stage.downsample(x))))
    _, height, width, _ = x.shape
    across = [math.ceil(height / window), math.ceil(width / window)]
    centres = sparse.method.centres_SC.view(side * across[0], side * across[1], -1)
    rows = []
    for i in range(across[0]):
        row = []
        for j in range(across[1]):
            bins = [
                [(n * window + b * window // side, n * window + math.ceil((b + 1) * window / side))
                 for b in range(side)]
                for n in (i, j)
            ]  # fmt: skip
            visible = [
                [lo < side_ for lo, _ in part]
                for part, side_ in zip(bins, (height, width), strict=True)
            ]
            cells, added = [], []
            for r, (top, bottom) in enumerate(bins[0]):
                for c, (left, right) in enumerate(bins[1]):
                    if visible[0][r] and visible[1][c]:
                        cells.append(x[:, top:bottom, left:right].amax((1, 2)))
                        added.append(centres[i * side + r, j * side + c])
            pooled = torch.stack(cells, 1)
            ys = list(near(i, across[0], window, min(reach, across[0] * window), height))
            xs = list(near(j, across[1], window, min(reach, across[1] * window), width))
            seen = x[:, ys][:, :, xs].flatten(1, 2)
            first = block_between(stage.blocks[3], pooled, pooled, torch.cat([pooled, seen], 1))
            query = first + torch.stack(added)
            second = block_between(stage.blocks[4], query, query, torch.cat([first, seen], 1))
            row.append(second.unflatten(1, (sum(visible[0]), sum(visible[1]))))
        rows.append(torch.cat(row, 2))
    semantic = torch.cat(rows, 1)
    shape = semantic.shape
    tokens = semantic.flatten(1, 2)
    tokens = block_between(stage.blocks[5], tokens, tokens, tokens)
    semantic = model.layers[3].downsample(tokens.view(shape))
    tokens = semantic.flatten(1, 2)
    tokens = block_between(model.layers[3].blocks[0], tokens, tokens, tokens)
    return model.head.fc(model.norm(tokens).mean(1))


@pytest.mark.parametrize("size", [(32, 32), (27, 27), (36, 44), (20, 13)])
@pytest.mark.parametrize(("tokens", "reach"), [(4, None), (9, None), (16, 5), (1, 40)])
def test_the_equations(size, tokens, reach):
    """Maps that windows fit, and maps that they hang over, by one row or by three."""
    model = tiny_swin(img_size=size, always_partition=True)
    sparse = sparse_swin(model, window_tokens=tokens, key_window=reach)
    torch.nn.init.normal_(sparse.method.centres_SC, generator=seeded(1))
    x = torch.randn(2, 3, *size, generator=seeded(2))
    with torch.no_grad():
        expected = reference(model, sparse, x, math.isqrt(tokens), reach or 6)
        torch.testing.assert_close(sparse(x), expected, atol=2e-5, rtol=0)
        with counting() as counter:
            sparse.requires_grad_(False)(x[:1])
    assert sparse.macs() == counter.get_total_flops() / 2
    assert sparse.trace(x).macs.tolist() == [sparse.macs()] * 2


def test_centres_in_the_residual_or_not():
    with_centres, without = (sparse_swin(centres_in_residual=flag) for flag in (True, False))
    x = images(2)
    for sparse in (with_centres, without):
        torch.nn.init.zeros_(sparse.method.centres_SC)
    assert torch.equal(with_centres(x), without(x))
    torch.testing.assert_close(with_centres(x), sparse_swin(global_centres=False)(x))
    for sparse in (with_centres, without):
        torch.nn.init.normal_(sparse.method.centres_SC, generator=seeded(1))
    assert not torch.allclose(with_centres(x), without(x))


def test_layer_scale_scales_each_branch():
    x = images(2)
    plain = sparse_swin(global_centres=False)
    scaled = sparse_swin(global_centres=False, layer_scale=1.0)
    assert len(scaled.method.layer_scales) == 4  # two generation layers, one block, the last stage
    torch.testing.assert_close(scaled(x), plain(x), atol=1e-6, rtol=0)
    for scales in scaled.method.layer_scales.values():
        torch.nn.init.zeros_(scales)
    model = scaled.backbone
    with torch.no_grad():
        fmap = model.layers[2].blocks[:3](
            model.layers[2].downsample(model.layers[1](model.layers[0](model.patch_embed(x))))
        )
        pooled = F.adaptive_max_pool2d(fmap.permute(0, 3, 1, 2), (4, 4)).permute(0, 2, 3, 1)
        expected = model.head(model.norm(model.layers[3].downsample(pooled)))
        torch.testing.assert_close(scaled(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["max", "avg", "intra_inter"])
def test_other_image_sizes(pooling):
    sparse = sparse_swin(tiny_swin(dynamic_img_size=True), pooling=pooling)
    for size in ((32, 32), (45, 20), (64, 64), (9, 9)):
        x = torch.randn(2, 3, *size, generator=seeded(0))
        trace = sparse.trace(x)
        assert trace.logits.isfinite().all()
        assert trace.macs[0] == sparse.macs(size)


def test_trace_says_who_looks_at_what():
    sparse = sparse_swin(tiny_swin(img_size=27, always_partition=True))
    x = torch.randn(2, 3, 27, 27, generator=seeded(0))
    trace = sparse.trace(x)
    (stage,) = trace.stages
    assert (stage.block, stage.grid) == (7, (7, 7))
    assert stage.counts.tolist() == [16, 16]
    assert stage.assignment.shape == (2, 16, 49)
    assert (stage.assignment.sum(-1) < 1).all()  # the rest is for the semantic tokens themselves
    # The last semantic token stands for the lower right window; it looks at the 6 x 6 about it.
    looks = stage.assignment[0, -1].view(7, 7) > 0
    assert torch.equal(
        looks, torch.ones(7, 7).bool() & (torch.arange(7) >= 2) & (torch.arange(7)[:, None] >= 2)
    )
    assert [len(kept) for kept in stage.kept] == [0, 0]


@pytest.mark.parametrize("options", [{}, {"pooling": "intra_inter"}, {"layer_scale": 0.1}])
def test_everything_learned_gets_a_gradient(options):
    sparse = sparse_swin(**options).train()
    sparse.losses(images(3), TARGET)["total"].backward()
    for name, parameter in sparse.method.named_parameters():
        assert parameter.grad is not None, name
        # A softmax does not feel what is added to all its logits.
        assert parameter.grad.abs().sum() > 0 or name == "pooling.weigh.bias", name
    unused = {name for name, p in sparse.backbone.named_parameters() if p.grad is None}
    expected = {f"layers.2.blocks.{i}" for i in (3, 4, 5)} | {"layers.3.blocks.0"}
    assert unused == {f"{block}.attn.relative_position_bias_table" for block in expected}


def test_losses_are_weighted():
    options = {"classification_weight": 2.0, "distill_weight": 3.0, "feature_weight": 5.0}
    sparse, x = sparse_swin(**options).train(), images(3)
    teacher = sparse.method.teach(family_of(tiny_swin()), x)
    parts = sparse.losses(x, TARGET, teacher)
    total = 2 * parts["classification"] + 3 * parts["distill"] + 5 * parts["feature"]
    torch.testing.assert_close(parts["total"], total)
    assert set(sparse.losses(x, TARGET)) == {"classification", "total"}


def test_dial_changes_the_number_of_semantic_tokens(tmp_path):
    sparse = sparse_swin(global_centres=False, pooling="avg")
    dial = sparse.method.dial()
    assert (dial.name, dial.value, dial.cheapest, dial.dearest) == ("window_tokens", 4, 1, 16)
    sparse.method.turn(8.1)
    assert sparse.config.window_tokens == 9
    x = images(1)
    assert sparse.trace(x).stages[0].counts.tolist() == [36]
    calibrate(sparse, None, sparse.macs() / sparse.dense_macs())
    assert sparse.config.window_tokens == 9
    sparse.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x), sparse(x))
    with pytest.raises(ConfigError, match="window_tokens is nan"):
        sparse.method.turn(float("nan"))


@pytest.mark.parametrize("options", [{}, {"global_centres": False, "pooling": "intra_inter"}])
def test_what_was_learned_for_one_number_has_no_dial(options):
    sparse = sparse_swin(**options)
    with pytest.raises(ConfigError, match="learned to make 4 semantic tokens per window"):
        sparse.method.dial()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 8}, "window_tokens is 8; expected a square number"),
        ({"window_tokens": 25}, "window_tokens is 25; the windows of this backbone have 4 x 4"),
        ({"base_layers": 5}, "5 base layers and 2 generation layers do not fit in the 6 blocks"),
        ({"base_layers": -1}, "base_layers is -1"),
        ({"key_window": 0}, "key_window is 0"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sparse_swin(**options)


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedBackboneError, match="use stvit"):
        sparsify(tiny_vit(), STViTSwinConfig())
    with pytest.raises(UnsupportedBackboneError, match="stvit_swin"):
        sparsify(tiny_swin(), STViTConfig())
    with pytest.raises(ConfigError, match="the backbone has 2 stages"):
        sparse_swin(tiny_swin(depths=(2, 2), num_heads=(1, 2)))
