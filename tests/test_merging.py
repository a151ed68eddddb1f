"""Merging: ToMe's formulas and ours against loops, what stays and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import images, seeded, tiny_lvvit, tiny_vit
from vitrim import ConfigError, MergingConfig, from_pretrained, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.merging import match, merge, most_sources
from vitrim.methods.records import Plan
from vitrim.tokens.plain import Tokens
from vitrim.train.recipe import load_recipe

X = images(2)


def sharp(model):
    """Attention that differs from token to token, in double precision, where nothing ties."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(6)
    return model.double()


BACKBONES = {
    "class token": tiny_vit,
    "distilled": partial(tiny_vit, "deit_tiny_distilled_patch16_224"),
    "layer scale": partial(tiny_vit, init_values=0.5),
    "query and key norms": partial(tiny_vit, qk_norm=True),
    "registers": partial(tiny_vit, reg_tokens=2),
    "average pool": partial(tiny_vit, class_token=False, global_pool="avg"),
    "average pool and prefix": partial(
        tiny_vit, reg_tokens=1, global_pool="avg", pool_include_prefix=True
    ),
    "attention pool": partial(tiny_vit, class_token=False, global_pool="map"),
}


def in_loops(model, x, going, compared, cost, weight, threshold=math.inf):
    """Logits of a model that merges, token by token.

    Args:
        model: a timm vision transformer.
        x: images.
        going: how many tokens go in each block, if so many may.
        compared: what tokens are compared by, given an image's keys (H, N, D) and features.
        cost: of going, given the cosine and the importance of a token.
        weight: of a token in a mean, given its size and its importance.
        threshold: what costs as much does not go.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    prefix, size = model.num_prefix_tokens, torch.ones(x.shape[:2], dtype=x.dtype)
    for block, most in zip(model.blocks, going, strict=True):
        attention, (num_images, num_tokens, _) = block.attn, x.shape
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        logits = attention.scale * q @ k.transpose(-2, -1) + size.log()[:, None, None]
        map_BHNN = logits.softmax(-1)
        out = (map_BHNN @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(attention.proj(out))
        rows = map_BHNN[:, :, :1] if model.has_class_token else map_BHNN
        importance = rows.mean((1, 2))
        found = []
        for image in range(num_images):
            metric = compared(k[image], x[image])
            even, odd = ([*range(start, num_tokens, 2)] for start in (0, 1))
            sources, targets = ([t for t in side if t >= prefix] for side in (even, odd))
            pairs = []
            for t in sources if targets else []:
                cosines = [torch.cosine_similarity(metric[t], metric[o], dim=0) for o in targets]
                best = max(range(len(targets)), key=cosines.__getitem__)
                pairs.append((cost(cosines[best], importance[image, t]), t, targets[best]))
            into = {t: [t] for t in range(num_tokens)}
            for _, t, o in [pair for pair in sorted(pairs) if pair[0] < threshold][:most]:
                into[o] += into.pop(t)
            stay = [t for t in even + odd if t in into] if most and pairs else list(into)
            stay = [*range(prefix), *(t for t in stay if t >= prefix)]
            means = list(x[image, :prefix])
            for t in stay[prefix:]:
                parts = [weight(size[image, o], importance[image, o]) for o in into[t]]
                shares = torch.stack(parts) / sum(parts)
                means.append((shares[:, None] * x[image, into[t]]).sum(0))
            sizes = [size[image, into[t]].sum() for t in stay]
            found.append((torch.stack(means), torch.stack(sizes)))
        x, size = (torch.stack(part) for part in zip(*found, strict=True))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.global_pool == "token":
        return model.forward_head(x)
    start = 0 if model.pool_include_prefix else prefix
    x, size = x[:, start:], size[:, start:]
    if model.attn_pool is not None:  # as if each token stood there as often as it has patches
        repeated = [a.repeat_interleave(b.long(), 0) for a, b in zip(x, size, strict=True)]
        pooled = torch.cat([model.attn_pool(tokens[None]) for tokens in repeated])
    else:
        pooled = (x * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    return model.head(model.fc_norm(pooled))


def keys_of_all_heads(keys_HND, x_NC):
    return keys_HND.transpose(0, 1).flatten(1)


def features(keys_HND, x_NC):
    return x_NC


@pytest.mark.parametrize("merged", [2, 9])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_preset_is_tome(backbone, merged):
    """Section 3 of its paper: mean keys, the most similar first, means by size, in every block but
    the last, where the class token no longer sees what becomes of the others; 9 are more than may
    go, after the first block.
    """
    model = sharp(BACKBONES[backbone]())
    expected = in_loops(
        model,
        X.double(),
        going=[merged] * 3 + [0],
        compared=lambda keys_HND, x_NC: keys_HND.mean(0),
        cost=lambda cosine, importance: -cosine,
        weight=lambda size, importance: size,
    )
    sparse = sparsify(model, MergingConfig.tome(merged)).eval()
    torch.testing.assert_close(sparse(X.double()), expected, atol=1e-6, rtol=0)
    assert (expected - model(X.double())).abs().max() > 1e-5
    one, two = (sparse(image[None].double()) for image in X)
    torch.testing.assert_close(torch.cat([one, two]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"weigh_by": "size"}, {"metric": "keys"}])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ours_is_what_it_says(backbone, changes):
    model = sharp(BACKBONES[backbone]())
    config = MergingConfig(stages=(1, 3), keep_ratio=(0.7, 0.5), importance_power=0.7, **changes)
    metric = keys_of_all_heads if config.metric == "keys" else features
    expected = in_loops(
        model,
        X.double(),
        going=[16 - 11, 0, 11 - 8, 0],
        compared=metric,
        cost=lambda cosine, importance: (1 - cosine) * importance**0.7,
        weight=lambda size, importance: size if config.weigh_by == "size" else importance,
    )
    sparse = sparsify(model, config).eval()
    torch.testing.assert_close(sparse(X.double()), expected, atol=1e-6, rtol=0)


def by_threshold(model, x, threshold, **options):
    """The logits of each image alone, in loops, where stages 1 and 3 merge by a threshold."""
    how = {
        "going": [99, 0, 99, 0],
        "compared": features,
        "cost": lambda cosine, importance: (1 - cosine) * importance**0.5,
        "weight": lambda size, importance: importance,
    }
    each = [in_loops(model, image[None], **how | options, threshold=threshold) for image in x]
    return torch.cat(each)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_threshold_merges_what_costs_less(backbone):
    """Together, packed, as one by one; images have counts of their own."""
    model, x = sharp(BACKBONES[backbone]()), images(5).double()
    sparse = sparsify(model, MergingConfig(stages=(1, 3), threshold=0.06)).eval()
    expected = by_threshold(model, x, 0.06)
    torch.testing.assert_close(sparse(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([sparse(image[None]) for image in x]), expected)
    counts = [stage.counts.tolist() for stage in sparse.trace(x).stages]
    assert len(set(counts[-1])) > 1
    assert max(counts[0]) <= 16 > min(counts[-1]) >= 4


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"metric": "keys"}, {"compared": keys_of_all_heads}),
        ({"weigh_by": "size"}, {"weight": lambda size, importance: size}),
        (
            {"importance_power": 0.0, "weigh_by": "size"},
            {"cost": lambda cosine, _: 1 - cosine, "weight": lambda size, _: size},
        ),
    ],
)
def test_a_threshold_on_other_costs(changes, options):
    model, x = sharp(tiny_vit()), images(3).double()
    threshold = 0.25 if "importance_power" in changes else 0.06
    sparse = sparsify(model, MergingConfig(stages=(1, 3), threshold=threshold, **changes)).eval()
    expected = by_threshold(model, x, threshold, **options)
    torch.testing.assert_close(sparse(x), expected, atol=1e-6, rtol=0)
    assert sparse.trace(x).stages[-1].counts.double().mean() < 16


def test_a_threshold_goes_with_the_importance_of_other_image_sizes():
    """Attention is shared among more patches, so that each gets less."""
    model, x = sharp(tiny_vit(dynamic_img_size=True)), images(3, 48).double()
    sparse = sparsify(model, MergingConfig(stages=(1, 3), threshold=0.06)).eval()
    expected = by_threshold(model, x, 0.06 * (16 / 36) ** 0.5)
    torch.testing.assert_close(sparse(x), expected, atol=1e-6, rtol=0)


def test_half_of_each_image_goes_at_most_and_one_patch_stays():
    for stages, counts in (((1, 2, 3), [8, 4, 2]), ((1, 2, 3, 4, 5), [8, 4, 2, 1, 1])):
        config = MergingConfig(stages=stages, threshold=10.0)
        trace = made(config, depth=6).trace(X)
        assert [stage.counts.tolist() for stage in trace.stages] == [[n] * 2 for n in counts]
    one = made(MergingConfig(stages=(2, 3), threshold=10.0), img_size=8)
    assert [stage.counts.tolist() for stage in one.trace(images(2, 8)).stages] == [[1, 1]] * 2


def test_dropping_leaves_the_most_important_tokens():
    model = sharp(tiny_vit())
    sparse = sparsify(model, MergingConfig(action="drop", stages=(2,), keep_ratio=0.4)).eval()
    with torch.no_grad():
        (stage,) = sparse.trace(X.double()).stages
        family = family_of(model)
        before = family.run_blocks((0,), family.stem(X.double()))
        tokens, score_BN = family.split_block(
            1,
            before,
            lambda record: record.class_attention().mean(1),
            lambda half, score: half.gather(score.topk(6).indices),
        )
        expected = family.answer(2, tokens)
        torch.testing.assert_close(sparse(X.double()), expected)
    for kept, score in zip(stage.kept, score_BN, strict=True):
        assert set(kept.tolist()) == set(score.topk(6).indices.tolist())


def test_some_stages_may_drop_and_others_merge():
    model = sharp(tiny_vit())
    logits = [
        sparsify(model, MergingConfig(stages=(1, 2, 3), action=action)).eval()(X.double())
        for action in ("merge", "drop", ("drop", "merge", "drop"), ("merge", "drop", "merge"))
    ]
    for one in range(4):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().max() > 1e-4


# Matching and merging.


@st.composite
def matchings(draw):
    num_prefix = draw(st.integers(0, 3))
    num_patches = draw(st.integers(2, 20))
    most = most_sources(num_patches, num_prefix)
    return num_patches, num_prefix, draw(st.integers(1, most)), draw(st.integers(0, 99))


@given(matchings(), st.booleans())
@settings(deadline=None)
def test_every_token_stays_or_goes_into_one_at_an_odd_place(case, weighted):
    num_patches, num_prefix, count, seed = case
    metric = torch.randn(2, num_patches, 5, generator=seeded(seed))
    weight = torch.rand(2, num_patches, generator=seeded(seed)) if weighted else None
    found = match(metric, count, num_prefix, weight)
    for kept, source, target in zip(
        found.kept_BK.tolist(), found.source_BR.tolist(), found.target_BR.tolist(), strict=True
    ):
        assert sorted(kept + source) == list(range(num_patches))
        assert all((place + num_prefix) % 2 == 0 for place in source)
        assert all((kept[place] + num_prefix) % 2 == 1 for place in target)
        assert kept == sorted(kept, key=lambda place: ((place + num_prefix) % 2, place))


@given(matchings(), st.booleans())
@settings(deadline=None)
def test_merging_keeps_sums(case, weighted):
    """Sizes add up to the patches, weighted features to what they were, whatever goes where."""
    num_patches, num_prefix, count, seed = case
    generator = seeded(seed)
    x = torch.randn(2, num_prefix + num_patches, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, num_patches, generator=generator, dtype=torch.float64) + 0.1
    size = torch.randint(1, 5, (2, num_patches), generator=generator).double()
    tokens = Tokens.of(x, num_prefix).sized(size)
    matching = match(tokens.patches, count, num_prefix)
    given_weight = weight if weighted else None
    after = merge(tokens, matching, given_weight)
    assert after.num_patches == num_patches - count
    torch.testing.assert_close(after.size_BN.sum(1), size.sum(1))
    torch.testing.assert_close(after.prefix_BPC, tokens.prefix_BPC)
    by = weight if weighted else size
    weight_BK = by.gather(1, matching.kept_BK)
    weight_BK = weight_BK.scatter_add(1, matching.target_BR, by.gather(1, matching.source_BR))

    def total(part, weights):
        return (part * weights[..., None]).sum(1)

    torch.testing.assert_close(total(after.patches, weight_BK), total(tokens.patches, by))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_what_is_alike_does_not_depend_on_length(length, kind):
    """Products of rows of a large model's length are more than 16 bits hold."""
    angle = torch.tensor([0.0, 1.0, 0.45, 1.5, 1.25, 0.9, 1.45, 0.02], dtype=torch.float64)
    metric_BNC = torch.stack([angle.cos(), angle.sin()], -1).mul(length)[None].to(kind)
    found = match(metric_BNC.repeat(1, 1, 32), 2, 0)
    assert found.source_BR.tolist() == [[0, 6]]
    assert found.kept_BK.gather(1, found.target_BR).tolist() == [[7, 3]]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_are_like_no_other(kind):
    metric_BNC = torch.eye(4, dtype=kind)[[0, 1, 2, 0, 3, 2]].mul(200)[None]
    metric_BNC[:, 1] = metric_BNC[:, 4] = 0
    found = match(metric_BNC, 2, 0)
    assert sorted(found.source_BR[0].tolist()) == [0, 2]
    into_BR = found.kept_BK.gather(1, found.target_BR)
    assert sorted(zip(found.source_BR[0].tolist(), into_BR[0].tolist(), strict=True)) == [
        (0, 3),
        (2, 5),
    ]


@pytest.mark.parametrize(
    ("num_images", "num_patches", "count"), [(2, 8, 3), (1, 8, 3), (3, 2, 1), (1, 2, 1)]
)
def test_gradients_flow_through_values_and_weights(num_images, num_patches, count):
    """They agree with finite differences; who goes where has none."""
    generator = seeded(1)
    x = torch.randn(num_images, 1 + num_patches, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(num_images, num_patches, generator=generator, dtype=torch.float64) + 0.1
    matching = match(x[:, 1:], count, 1)

    def merged(x, weight):
        once = merge(Tokens.of(x, 1).sized(weight + 1), matching, weight)
        return once.x, once.size_BN

    assert torch.autograd.gradcheck(merged, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_gradient_of_the_loss(num_images):
    """The whole method, in the direction of one weight's gradient."""
    sparse = sparsify(sharp(tiny_vit()), MergingConfig()).train()
    parameter = sparse.backbone.blocks[0].attn.qkv.weight
    x, target = X[:num_images].double(), torch.tensor([1, 2])[:num_images]
    total = sparse.losses(x, target)["total"]
    (gradient,) = torch.autograd.grad(total, parameter)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.add_(step * gradient)
            values.append(sparse.losses(x, target)["total"].item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient.square().sum().item(), rel=1e-4)


# Counts, costs, budgets.


def made(config, **kwargs):
    return sparsify(tiny_vit(**kwargs), config, generator=seeded(3)).eval()


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (MergingConfig(stages=(2, 3)), (11, 7)),
        (MergingConfig(stages=(2, 3), keep_ratio=0.1), (8, 4)),
        (MergingConfig(stages=(2, 3), keep_ratio=0.1, action="drop"), (1, 1)),
        (MergingConfig(stages=(2, 3), keep_ratio=0.1, action=("drop", "merge")), (1, 1)),
        (MergingConfig(keep_ratio=(0.9, 0.2, 0.2), stages=(1, 2, 3)), (14, 7, 4)),
        (MergingConfig.tome(2.5), (14, 11, 9)),
        (MergingConfig.tome(0), (16, 16, 16)),
        (MergingConfig.tome(100), (8, 4, 2)),
    ],
)
def test_half_of_the_tokens_go_at_most(config, counts):
    sparse = made(config)
    assert sparse.method.counts(sparse.family, (4, 4)) == counts
    assert [stage.counts.tolist() for stage in sparse.trace(X).stages] == [[n] * 2 for n in counts]


def test_an_odd_number_of_patches_and_one():
    for size, counts in ((8, (1, 1)), (24, (6, 4))):
        sparse = made(MergingConfig(stages=(2, 3)), img_size=size)
        grid = sparse.family.grid()
        assert sparse.method.counts(sparse.family, grid) == counts
        assert sparse(images(2, size)).isfinite().all()


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 12])
def test_default_stages(depth):
    sparse = made(MergingConfig(), depth=depth)
    expected = {2: (1,), 3: (1, 2), 4: (1, 2, 3), 6: (2, 3, 4), 12: (4, 5, 6, 7, 8, 9)}
    assert sparse.method.stages == expected[depth]
    assert sparse(X).isfinite().all()


COSTS = [
    MergingConfig(stages=(1, 3)),
    MergingConfig(stages=(1, 3), exact_last_block=False),
    MergingConfig(metric="mean_keys", importance_power=0, weigh_by="size"),
    MergingConfig(metric="keys", stages=(2,)),
    MergingConfig(stages=(1, 2, 3), action=("drop", "merge", "drop")),
    MergingConfig.tome(2.5),
    MergingConfig(keep_ratio=1.0),
]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("config", COSTS)
def test_macs_are_what_torch_counts(config, backbone):
    sparse = sparsify(BACKBONES[backbone](), config).eval().requires_grad_(False)
    with counting() as counter, torch.no_grad():
        sparse(X[:1])
    assert sparse.macs() == counter.get_total_flops() / 2


@pytest.mark.parametrize("config", [MergingConfig(), MergingConfig.tome(3)])
def test_budgets_are_met_without_images(config):
    sparse = made(config, img_size=96, depth=12)
    for budget in (0.8, 0.65, 0.5):
        sparse.set_budget(budget)
        assert sparse.macs() / sparse.dense_macs() == pytest.approx(budget, rel=0.02)
    name = "keep_ratio" if config.merged_per_block is None else "merged_per_block"
    assert sparse.method.dial().name == name
    assert getattr(sparse.config, name) != getattr(config, name)


def test_the_cheapest_that_a_number_per_block_gives():
    sparse = made(MergingConfig.tome(2))
    cheapest = sparse.method.dial().cheapest
    merged = [made(MergingConfig.tome(number)).macs() for number in (cheapest, 1000)]
    assert merged[0] == merged[1] < made(MergingConfig.tome(cheapest - 1)).macs()
    sparse.set_budget(merged[0] / sparse.dense_macs())
    assert sparse.macs() == merged[0]


def test_a_threshold_follows_the_schedule_in_training():
    plan = Plan(stages=(1, 3), counts=(12, 7), patches=16)
    config = MergingConfig(threshold=0.1)
    followed, remark = made(config).method.follow(config, plan)
    assert "every image decides" in remark
    sparse = made(followed)
    assert sparse.method.target_counts(sparse.family, (4, 4)) == (12, 7)
    assert sparse.macs() is None
    fixed = made(replace(followed, threshold=None)).train()
    assert torch.equal(sparse.train()(X), fixed(X))


def test_a_schedule_is_followed():
    plan = Plan(stages=(1, 3), counts=(12, 7), patches=16)
    for config in (MergingConfig(), MergingConfig.tome(3)):
        followed, remark = sparsify(tiny_vit(), config).method.follow(config, plan)
        assert remark is None
        assert made(followed).method.counts(family_of(tiny_vit()), (4, 4)) == (12, 7)


# Images, training, files.


def test_other_image_sizes_have_counts_of_their_own():
    sparse = made(MergingConfig(stages=(1, 3), keep_ratio=0.6), dynamic_img_size=True)
    for size, counts in ((32, [9, 5]), (48, [21, 12]), (64, [38, 23])):
        trace = sparse.trace(images(2, size))
        assert [int(stage.counts[0]) for stage in trace.stages] == counts


def test_lvvit_merges_too():
    model = tiny_lvvit()
    sparse = sparsify(model, MergingConfig(stages=(1, 2))).eval()
    together = sparse(X)
    torch.testing.assert_close(torch.cat([sparse(x[None]) for x in X]), together)
    assert sparse.macs() < sparse.dense_macs()
    dense = sparsify(model, MergingConfig(keep_ratio=1.0)).eval()
    torch.testing.assert_close(dense(X), model(X), atol=1e-5, rtol=0)


def test_training_draws_a_ratio_for_each_batch():
    sparse = made(MergingConfig(train_keep_ratio=(0.5, 0.95)), img_size=64).train()
    x = images(2, 64)

    def logits(seed):
        return sparse.method.train_forward(sparse.family, x, seeded(seed)).logits

    assert torch.equal(logits(1), logits(1))
    drawn = [logits(seed) for seed in range(4)]
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 1
    assert sparse.config.keep_ratio == 0.7
    torch.testing.assert_close(sparse.eval()(x), made(sparse.config, img_size=64)(x))


def test_what_is_drawn_is_between_the_two():
    config = MergingConfig(train_keep_ratio=(0.8, 0.8), keep_ratio=0.6)
    drawn = made(config).train()
    fixed = made(replace(config, train_keep_ratio=None, keep_ratio=0.8)).train()
    logits = [
        each.method.train_forward(each.family, X, seeded(0)).logits for each in (drawn, fixed)
    ]
    assert torch.equal(*logits)


def test_sizes_past_256_are_counted_in_16_bits():
    """One patch more is lost where sizes are 16-bit numbers."""
    ones = torch.ones(1, 3, 4, dtype=torch.bfloat16)
    tokens = Tokens.of(ones, 0)
    tokens = tokens.sized(torch.tensor([[1.0, 256.0, 1.0]]))
    matching = match(tokens.patches, 2, 0)
    assert merge(tokens, matching).size_BN.tolist() == [[258.0]]
    assert merge(Tokens.of(ones, 0), matching).size_BN.dtype == torch.float32


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_features_do_not_tell_sizes_to_heads_that_pool(pool):
    sparse = made(MergingConfig(), class_token=False, global_pool=pool)
    with pytest.raises(ConfigError, match="call the model"):
        sparse.forward_features(X)


@pytest.mark.parametrize(
    "config",
    [COSTS[4], COSTS[5], MergingConfig(train_keep_ratio=(0.5, 1)), MergingConfig(threshold=0.1)],
)
def test_saved_and_loaded(config, tmp_path):
    sparse = made(config)
    sparse.save_pretrained(tmp_path / "checkpoint")
    loaded = from_pretrained(tmp_path / "checkpoint").eval()
    assert loaded.config == config
    assert torch.equal(loaded(X), sparse(X))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_low_precision(backbone):
    sparse = sparsify(BACKBONES[backbone](), MergingConfig()).eval()
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", kind):
            assert sparse(X).isfinite().all()
    assert sparse.to(torch.bfloat16)(X.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0"),
        ({"keep_ratio": (0.5, 0.8), "stages": (1, 2)}, "cannot keep more"),
        ({"stages": (0, 2)}, "stage 0 has no block before it"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (1, 2), "keep_ratio": (0.5,)}, "1 numbers for 2 stages"),
        ({"stages": (1, 2), "action": ("merge",)}, "1 entries for 2 stages"),
        ({"action": "fuse"}, "action"),
        ({"metric": "values"}, "metric"),
        ({"weigh_by": "norm"}, "weigh_by"),
        ({"importance_power": -1}, "importance_power is -1"),
        ({"importance_power": math.nan}, "importance_power is nan"),
        ({"merged_per_block": -2}, "merged_per_block is -2"),
        ({"merged_per_block": math.inf}, "merged_per_block is inf"),
        ({"merged_per_block": 3, "stages": (1,)}, "leave out stages"),
        ({"merged_per_block": 3, "keep_ratio": 0.5}, "leave out keep_ratio"),
        ({"train_keep_ratio": (0.9, 0.5)}, "the smaller and the larger"),
        ({"train_keep_ratio": (0.0, 0.5)}, "the smaller and the larger"),
        ({"distill_weight": -1}, "distill_weight"),
        ({"threshold": -0.1}, "threshold is -0.1; expected a cost of 0 or more"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"threshold": 0.1, "action": "drop"}, "leave out merged_per_block and stages that drop"),
        ({"threshold": 0.1, "stages": (1, 2), "action": ("drop", "merge")}, "stages that drop"),
        ({"threshold": 0.1, "merged_per_block": 2}, "threshold says what merges"),
        (
            {"action": "prune"},
            "'prune'; expected one of: 'merge', 'drop', a list of 'merge', 'drop'",
        ),
        ({"merged_per_block": "3"}, "'3'; expected one of: a finite number, None"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        MergingConfig(**changes)


def test_what_the_backbone_cannot_serve_is_refused():
    with pytest.raises(ConfigError, match="outside the backbone"):
        made(MergingConfig(stages=(4,)))
    with pytest.raises(ConfigError, match="merging needs two"):
        made(MergingConfig(), depth=1)
    with pytest.raises(ConfigError, match="2 numbers for 6 stages"):
        made(MergingConfig(keep_ratio=(0.8, 0.6)), depth=12)
    with pytest.raises(ConfigError, match="merged_per_block says how many"):
        made(MergingConfig.tome(2)).set_keep_ratio(0.5)
    with pytest.raises(ConfigError, match="sparse with threshold=None"):
        made(MergingConfig(threshold=0.1)).set_keep_ratio(0.5)
    with pytest.raises(ConfigError, match="calibrate"):
        made(MergingConfig(threshold=0.1)).set_budget(0.7)
    with pytest.raises(ConfigError, match="give either"):
        made(MergingConfig()).losses(X, None)


def test_the_recipes():
    adapt = load_recipe("merging-adapt")
    assert adapt.method.build() == MergingConfig(train_keep_ratio=(0.7, 0.9))
    assert (adapt.optim.lr, adapt.data.batch_size, adapt.augment.scale) == (2e-5, 25, (0.5, 1.0))
    assert not adapt.data.labels
    for size, name in {"t": "tiny", "s": "small", "b": "base"}.items():
        recipe = load_recipe(f"merging-deit-{size}")
        assert recipe.model.name == f"deit_{name}_patch16_224.fb_in1k"
        assert recipe.model.teacher
        assert recipe.run.epochs == 30
        config = recipe.method.build()
        assert isinstance(config, MergingConfig)
        assert min(config.classification_weight, config.distill_weight) > 0


# The source map, and the map that it gives back.


def test_groups_say_which_patch_is_in_which_token():
    """Features that are their own patch's number show where each patch went."""
    sparse = made(MergingConfig(stages=(1, 2, 3), keep_ratio=(0.75, 0.5, 0.4)))
    trace = sparse.trace(X)
    for before, stage in zip([None, *trace.stages], trace.stages, strict=False):
        for image in range(2):
            group, kept = stage.groups[image], stage.kept[image].tolist()
            assert sorted(set(group.tolist())) == kept
            assert group[kept].tolist() == kept
            if before is not None:  # who was together stays so
                merged = before.groups[image]
                assert torch.equal(group, group[merged])


def test_groups_are_those_that_the_sizes_count():
    model = sharp(tiny_vit())
    sparse = sparsify(model, MergingConfig(stages=(1, 3), keep_ratio=(0.7, 0.5))).eval()
    family, method = sparse.family, sparse.method
    stem = family.stem(X.double())
    tokens, _ = method._merged(family, stem, method.counts(family, family.grid()))
    groups = sparse.trace(X.double()).stages[-1].groups
    for image in range(2):
        found = dict(
            zip(tokens.index_BN[image].tolist(), tokens.size_BN[image].tolist(), strict=True)
        )
        counted = groups[image].bincount(minlength=16)
        assert found == {place: float(counted[place]) for place in found}


def test_groups_are_those_of_packed_sizes():
    model, x = sharp(tiny_vit()), images(5).double()
    sparse = sparsify(model, MergingConfig(stages=(1, 3), threshold=0.06)).eval()
    tokens, _ = sparse.method._merged(sparse.family, sparse.family.stem(x), None)
    groups = sparse.trace(x).stages[-1].groups
    for image in range(5):
        here = tokens.layout.image_N == image
        found = dict(zip(tokens.index_N[here].tolist(), tokens.size_N[here].tolist(), strict=True))
        counted = groups[image].bincount(minlength=16)
        assert found == {place: float(counted[place]) for place in found}
        assert sum(found.values()) == 16


def test_features_give_the_map_back():
    model = sharp(tiny_vit())
    family = family_of(model)
    whole = sparsify(model, MergingConfig(keep_ratio=1.0)).eval()
    (level,) = whole.features(X.double())
    expected = family.dense(X.double()).patches.transpose(1, 2).reshape(2, 32, 4, 4)
    torch.testing.assert_close(level, expected)
    sparse = sparsify(model, MergingConfig(stages=(1, 3), keep_ratio=(0.7, 0.5))).eval()
    (level,) = sparse.features(X.double())
    assert level.shape == (2, 32, 4, 4)
    groups = sparse.trace(X.double()).stages[-1].groups
    for image in range(2):
        places = level[image].flatten(1).T
        torch.testing.assert_close(places, places[groups[image]])
        assert len(places.unique(dim=0)) == 8
    level.square().mean().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
