"""STViT: published costs, the equations, pooling, options, guards, the dial."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.conftest import images, seeded, tiny_vit
from vitrim import ConfigError, InputError, STViTConfig, calibrate, from_pretrained, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.pooling import POOLINGS
from vitrim.methods.records import DenseOutput
from vitrim.tokens.attention import cross_attention
from vitrim.tools.evaluate import evaluate

X = images(3)
TARGET = torch.tensor([1, 2, 3])


def sparse_vit(backbone=None, **options):
    options = {"semantic_tokens": (2, 3)} | options
    model = backbone if backbone is not None else tiny_vit()
    return sparsify(model, STViTConfig(**options), generator=seeded(0)).eval()


COSTS = [
    ("tiny", {}, 0.522),
    ("small", {}, 1.907),
    ("base", {}, 7.263),
    *[("tiny", {"semantic_tokens": n}, g) for n, g in ((36, 0.598), (49, 0.647), (64, 0.706))],
    *[("small", {"semantic_tokens": n}, g) for n, g in ((36, 2.196), (49, 2.386), (64, 2.608))],
    *[("base", {"semantic_tokens": n}, g) for n, g in ((36, 8.396), (49, 9.136), (64, 9.995))],
    ("tiny", {"semantic_tokens": 100}, 0.852),
    ("small", {"semantic_tokens": 100}, 3.149),
    ("base", {"semantic_tokens": 100}, 12.076),
    ("small", {"generation_layers": 3}, 1.967),
    ("small", {"generation_layers": 4}, 2.027),
    ("small", {"base_layers": 3}, 1.559),
    ("small", {"base_layers": 8}, 3.298),
]


@pytest.mark.parametrize(
    ("size", "options", "gmacs"),
    COSTS,
    ids=[f"deit-{size}-{options or 'default'}-{gmacs}G" for size, options, gmacs in COSTS],
)
def test_published_costs(size, options, gmacs):
    """By the formula, and as torch counts the forward."""
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224").requires_grad_(False)
        sparse = sparsify(model, STViTConfig(**options)).eval()
        with torch.no_grad(), counting() as counter:
            sparse(torch.empty(1, 3, 224, 224))
    assert sparse.macs() / 1e9 == pytest.approx(gmacs, abs=5.5e-4)  # three entries are rounded up
    assert sparse.macs() == counter.get_total_flops() / 2


@pytest.mark.parametrize("pooling", ["max", "avg", "intra_inter"])
@pytest.mark.parametrize("keep_prefix", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_formula_is_what_torch_counts(pooling, keep_prefix, pool, include_prefix):
    options = {"reg_tokens": 2, "global_pool": pool, "pool_include_prefix": include_prefix}
    if pool == "token" and include_prefix:
        options.pop("pool_include_prefix")
    model = tiny_vit(**options).requires_grad_(False)
    sparse = sparse_vit(model, pooling=pooling, keep_prefix=keep_prefix)
    with torch.no_grad(), counting() as counter:
        sparse(X[:1])
    assert sparse.macs() == counter.get_total_flops() / 2
    assert sparse.trace(X).macs.tolist() == [sparse.macs()] * 3


def block_between(block, query, residual, memory):
    """A timm block as cross attention, from timm's own pieces and the definition of attention."""
    attention, (batch, count, width) = block.attn, query.shape
    qkv = attention.qkv.weight.split(width), attention.qkv.bias.split(width)
    q, k, v = (
        F.linear(block.norm1(x), weight, bias)
        .reshape(batch, -1, attention.num_heads, attention.head_dim)
        .transpose(1, 2)
        for x, weight, bias in zip((query, memory, memory), *qkv, strict=True)
    )
    weights = (q @ k.mT * attention.head_dim**-0.5).softmax(-1)
    x = residual + attention.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))
    return x + block.mlp(block.norm2(x)), weights


@pytest.mark.parametrize("centres_in_residual", [True, False])
def test_the_equations(centres_in_residual):
    """S1 and S2 as the paper defines them, on a class-token model without its class token."""
    model = tiny_vit()
    sparse = sparse_vit(
        model, centres_in_residual=centres_in_residual, base_layers=0, generation_layers=3
    )
    x = model.patch_embed(X) + model.pos_embed[:, 1:]
    pooled = F.adaptive_max_pool2d(x.mT.reshape(3, 32, 4, 4), (2, 3)).flatten(2).mT
    first, _ = block_between(model.blocks[0], pooled, pooled, x)
    centres = sparse.method.centres_SC
    residual = first + centres if centres_in_residual else first
    memory = torch.cat([first, x], 1)
    second, _ = block_between(model.blocks[1], first + centres, residual, memory)
    third, weights = block_between(model.blocks[2], second, second, torch.cat([second, x], 1))
    logits = model.head(model.norm(model.blocks[3](third)).mean(1))
    torch.testing.assert_close(sparse(X), logits, atol=1e-5, rtol=0)
    stage = sparse.trace(X).stages[0]
    expected = weights.mean(1)[:, :, 6:]
    torch.testing.assert_close(stage.assignment, expected, atol=1e-6, rtol=0)


def test_prefix_tokens_travel_and_semantic_tokens_weigh_as_their_patches():
    """Duplicated keys are what the added logarithm stands for."""
    model = tiny_vit()
    sparse = sparse_vit(model, keep_prefix=True, pooling="avg", semantic_tokens=4, base_layers=1)
    x = model.blocks[0](model._pos_embed(model.patch_embed(X)))
    prefix, patches = x[:, :1], x[:, 1:]
    pooled = F.adaptive_avg_pool2d(patches.mT.reshape(3, 32, 4, 4), (2, 2)).flatten(2).mT
    query = torch.cat([prefix, pooled], 1)
    first, _ = block_between(model.blocks[1], query, query, x)
    query = torch.cat([first[:, :1], first[:, 1:] + sparse.method.centres_SC], 1)
    second, _ = block_between(model.blocks[2], query, query, torch.cat([first, patches], 1))
    copies = torch.cat([second[:, :1], second[:, 1:].repeat_interleave(4, 1)], 1)
    last, _ = block_between(model.blocks[3], second, second, copies)
    logits = model.head(model.norm(last)[:, 0])
    torch.testing.assert_close(sparse(X), logits, atol=1e-5, rtol=0)


def test_layer_scale_scales_each_branch():
    """Ones change nothing; zeros leave the pooled patches as they are."""
    plain = sparse_vit(global_centres=False)
    scaled = sparse_vit(global_centres=False, layer_scale=1.0)
    torch.testing.assert_close(scaled(X), plain(X), atol=1e-5, rtol=0)
    assert len(scaled.method.layer_scales) == 2 * 3
    for scale in scaled.method.layer_scales:
        torch.nn.init.zeros_(scale)
    model = scaled.backbone
    x = model.blocks[0](model.patch_embed(X) + model.pos_embed[:, 1:])
    pooled = F.adaptive_max_pool2d(x.mT.reshape(3, 32, 4, 4), (2, 3)).flatten(2).mT
    logits = model.head(model.norm(pooled).mean(1))
    torch.testing.assert_close(scaled(X), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("keep_prefix", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 4)])
def test_one_token_and_as_many_as_patches(pool, keep_prefix, shape):
    model = tiny_vit(global_pool=pool, class_token=pool == "token", reg_tokens=1)
    sparse = sparse_vit(model, semantic_tokens=shape, keep_prefix=keep_prefix).train()
    parts = sparse.losses(X, TARGET)
    parts["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sparse.parameters())
    trace = sparse.trace(X)
    assert trace.logits.isfinite().all()
    assert trace.stages[0].counts.tolist() == [shape[0] * shape[1]] * 3


def test_distilled_models_answer_by_the_mean_of_their_heads():
    model = tiny_vit("deit_tiny_distilled_patch16_224")
    sparse = sparse_vit(model)
    features = sparse.method.train_forward(sparse.family, X).features_BC
    expected = (model.head(features) + model.head_dist(features)) / 2
    torch.testing.assert_close(sparse(X), expected, atol=1e-6, rtol=0)


def test_training_computes_what_inference_does():
    sparse = sparse_vit()
    inferred = sparse(X)
    torch.testing.assert_close(sparse.train()(X), inferred, atol=1e-6, rtol=0)


def test_trace_says_who_looks_at_what():
    sparse = sparse_vit()
    trace = sparse.trace(X)
    (stage,) = trace.stages
    assert stage.block == 3
    assert stage.assignment.shape == (3, 6, 16)
    assert (stage.assignment >= 0).all()
    assert (stage.assignment.sum(-1) < 1).all()  # the rest is for the semantic tokens themselves
    assert stage.counts.tolist() == [6] * 3
    assert [len(kept) for kept in stage.kept] == [0] * 3
    torch.testing.assert_close(stage.scores, stage.assignment.mean(1))
    assert torch.equal(trace.logits, sparse(X))


def test_evaluation_counts_semantic_tokens():
    found = evaluate(sparse_vit(), [(X, TARGET)])
    assert [(stage.block, stage.kept.mean) for stage in found.stages] == [(3, 6.0)]
    assert found.macs.std == 0


def test_pooling_regions_overlap_where_they_do_not_divide():
    rows = torch.arange(14.0).view(1, 1, 14, 1).expand(1, 1, 14, 14)
    pooled = POOLINGS["max"](1)(rows, (4, 4)).view(4, 4)
    assert pooled[:, 0].tolist() == [3, 6, 10, 13]
    pooled = POOLINGS["avg"](1)(rows, (4, 4)).view(4, 4)
    assert pooled[:, 0].tolist() == [1.5, 4.5, 8.5, 11.5]


def test_learned_pooling_starts_from_weights_and_places():
    """Without weights it is the region's mean and half of its middle; an offset moves the place."""
    pooling = POOLINGS["intra_inter"](8)
    pooling.reset_parameters(seeded(0))
    grid = torch.randn(2, 8, 14, 6, generator=seeded(1))
    for layer in (pooling.weigh, pooling.offset):
        torch.nn.init.zeros_(layer.weight)
    mean = F.adaptive_avg_pool2d(grid, (4, 2)).flatten(2).mT
    found = pooling(grid, (4, 2))
    # Regions of rows 0-3, 3-6, 7-10, 10-13 and columns 0-2, 3-5: middles between two rows.
    middle = torch.stack(
        [(grid[:, :, r, c] + grid[:, :, r + 1, c]) / 2 for r in (1, 4, 8, 11) for c in (1, 4)], 1
    )
    torch.testing.assert_close(found, mean + middle / 2, atol=1e-5, rtol=0)
    # The whole region's width to the right: from column 1 to column 4, from 4 to the border.
    pooling.offset.bias.data = torch.tensor([20.0, 0.0])
    moved = torch.stack(
        [(grid[:, :, r, c] + grid[:, :, r + 1, c]) / 2 for r in (1, 4, 8, 11) for c in (4, 5)], 1
    )
    torch.testing.assert_close(pooling(grid, (4, 2)), mean + moved / 2, atol=1e-5, rtol=0)
    # One token with all the weight.
    torch.nn.init.ones_(pooling.weigh.weight)
    weights = pooling.weigh.weight
    pooling.norm.weight.data *= 1e3
    pooling.norm.bias.data = torch.linspace(0, 1, 8)
    assert weights.shape == (1, 8)
    intra = pooling(grid, (4, 2)) - moved / 2
    region = grid[:, :, :4, :3].flatten(2).mT
    distance = (region - intra[:, :1]).abs().amax(-1).amin(1)
    assert (distance < 1e-4).all()


@pytest.mark.parametrize("options", [{}, {"pooling": "intra_inter"}, {"layer_scale": 0.1}])
def test_everything_learned_gets_a_gradient(options):
    sparse = sparse_vit(**options).train()
    sparse.losses(X, TARGET)["total"].backward()
    for name, parameter in sparse.method.named_parameters():
        assert parameter.grad is not None, name
        # A softmax does not feel what is added to all its logits.
        assert parameter.grad.abs().sum() > 0 or name == "pooling.weigh.bias", name


def test_losses_are_weighted():
    options = {"classification_weight": 2.0, "distill_weight": 3.0, "feature_weight": 5.0}
    sparse = sparse_vit(**options).train()
    teacher = sparse.method.teach(family_of(tiny_vit()), X)
    parts = sparse.losses(X, TARGET, teacher)
    total = 2 * parts["classification"] + 3 * parts["distill"] + 5 * parts["feature"]
    torch.testing.assert_close(parts["total"], total)
    assert set(sparse.losses(X, TARGET)) == {"classification", "total"}
    assert set(sparse.losses(X, None, teacher)) == {"distill", "feature", "total"}
    assert set(sparse_vit().losses(X, None, teacher)) == {"distill", "total"}


def test_feature_loss_needs_what_the_teacher_reads():
    sparse = sparse_vit(feature_weight=1.0)
    teacher = DenseOutput(torch.zeros(3, 10), torch.zeros(3, 16, 32))
    with pytest.raises(ConfigError, match="what the teacher's classifier reads"):
        sparse.losses(X, None, teacher)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("keep_prefix", [False, True])
def test_features_are_what_the_classifier_reads(pool, keep_prefix):
    model = tiny_vit(global_pool=pool, class_token=pool == "token", reg_tokens=1)
    sparse = sparse_vit(model, keep_prefix=keep_prefix)
    output = sparse.method.train_forward(sparse.family, X)
    torch.testing.assert_close(model.head(output.features_BC), sparse(X), atol=1e-5, rtol=0)
    teacher = sparse.method.teach(sparse.family, X)
    torch.testing.assert_close(model.head(teacher.pooled_features), model(X), atol=1e-5, rtol=0)


def test_unwrap_gives_the_class_token_model_back():
    model = tiny_vit()
    dense = model(X)
    sparse = sparse_vit(model)
    sparse(X)
    assert sparse.unwrap() is model
    assert torch.equal(model(X), dense)
    assert not any(key.startswith("backbone") for key in sparse.method.state_dict())


def test_dial_changes_the_number_of_semantic_tokens(tmp_path):
    sparse = sparse_vit(
        tiny_vit(img_size=112), global_centres=False, pooling="avg", semantic_tokens=16
    )
    dial = sparse.method.dial()
    assert (dial.name, dial.value, dial.cheapest, dial.dearest) == ("semantic_tokens", 16, 4, 196)
    sparse.method.turn(48.7)
    assert sparse.config.shape == (7, 7)
    sparse.method.turn(72)
    assert sorted(sparse.config.shape) == [8, 9]
    assert sparse.trace(images(1, size=112)).stages[0].counts.tolist() == [72]
    cost = sparse.dense_macs()
    found = calibrate(sparse, None, 0.7)
    assert sparse.macs() / cost == pytest.approx(0.7, rel=0.01)
    assert sparse.method.dial().value == found.value
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert loaded.config == sparse.config
    x = images(1, size=112)
    assert torch.equal(loaded(x), sparse(x))


def test_turning_to_the_same_number_keeps_the_shape():
    sparse = sparse_vit(global_centres=False, semantic_tokens=(1, 4))
    sparse.method.turn(4.2)
    assert sparse.config.shape == (1, 4)
    with pytest.raises(ConfigError, match="semantic_tokens is nan"):
        sparse.method.turn(float("nan"))


@pytest.mark.parametrize("options", [{}, {"global_centres": False, "pooling": "intra_inter"}])
def test_what_was_learned_for_one_number_has_no_dial(options):
    sparse = sparse_vit(**options)
    with pytest.raises(ConfigError, match="learned to make 2 x 3 semantic tokens"):
        sparse.method.dial()
    with pytest.raises(ConfigError, match="global_centres=False"):
        sparse.method.turn(9)
    assert sparse.config.shape == (2, 3)
    with pytest.raises(ConfigError, match="learned to make 2 x 3"):
        sparse.set_keep_ratio(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic_tokens": 15}, "semantic_tokens is 15, which is no square"),
        ({"semantic_tokens": 0}, "semantic_tokens is 0"),
        ({"semantic_tokens": -4}, "semantic_tokens is -4"),
        ({"semantic_tokens": (4,)}, r"semantic_tokens is \(4,\); expected rows and columns"),
        ({"semantic_tokens": (4, 0)}, "semantic_tokens"),
        ({"semantic_tokens": (4, 4, 4)}, "semantic_tokens"),
        ({"generation_layers": 1}, "generation_layers is 1; expected 2, 3 or 4"),
        ({"generation_layers": 5}, "generation_layers is 5"),
        ({"base_layers": -1}, "base_layers is -1"),
        ({"pooling": "mean"}, "pooling is 'mean'; use one of 'max'"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        STViTConfig(**options)


def test_configs_that_do_not_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"5 x 4 semantic tokens .* grid is only 4 x 4"):
        sparse_vit(semantic_tokens=(5, 4))
    with pytest.raises(ConfigError, match="3 base layers and 2 generation layers do not fit"):
        sparse_vit(base_layers=3)
    sparse = sparse_vit(tiny_vit(dynamic_img_size=True), semantic_tokens=(4, 4))
    with pytest.raises(ConfigError, match="grid is only 3 x 3"):
        sparse(images(1, size=24))
    assert sparse(images(1, size=40)).shape == (1, 10)
    with pytest.raises(InputError):
        sparse(images(1, size=33))


def test_attention_record_heeds_what_was_added_to_the_logits():
    attention = tiny_vit().blocks[0].attn
    query, memory = (
        torch.randn(2, 3, 32, generator=seeded(0)),
        torch.randn(2, 5, 32, generator=seeded(1)),
    )
    bias = torch.tensor([0.0, 3.0, -3.0, 1.0, 0.0])
    _, record = cross_attention(attention, query, memory, bias)
    torch.testing.assert_close(record.weights() @ record.v_BHND, record.context_BHQD)
