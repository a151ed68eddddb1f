"""Droppers that merge: what is dropped goes into the nearest kept token, however it is executed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import images, seeded, tiny_lvvit, tiny_vit
from tests.test_packing import BACKBONES, family_for, keep_of
from vitrim import (
    ASViTConfig,
    ConfigError,
    DynamicViTConfig,
    SaiTConfig,
    from_pretrained,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers import dropping
from vitrim.methods.records import Recorder
from vitrim.tokens.packed import PackedTokens, select
from vitrim.tokens.padding import select_padded
from vitrim.tokens.plain import Tokens

X = images(4)
TARGET = torch.tensor([1, 2, 3, 4])
CASES = {
    "dynamicvit": DynamicViTConfig(stages=(1, 2), keep_ratio=0.6),
    "dynamicvit threshold": DynamicViTConfig(stages=(1, 2), threshold=0.5),
    "asvit": ASViTConfig(thresholds=0.05),
    "asvit masked": ASViTConfig(thresholds=0.05, mode="mask"),
    "sait density": SaiTConfig(selector="density", density=0.4, prune_after=2),
    "sait end": SaiTConfig(selector="density", where="end", prune_after=2),
    "sait mass": SaiTConfig(min_kept=2, prune_after=2),
    "sait threshold": SaiTConfig(min_kept=2, selector="threshold", prune_after=2),
}
each_case = pytest.mark.parametrize("name", CASES)
COUNTS = ([5, 9, 1, 16], [3, 4, 1, 12], [6, 6, 6, 6])
"""Of two stages, unlike counts, and of one with equal ones."""


def sharp(model):
    """Blocks whose attention prefers some tokens to others, and matters to the result."""
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6 if "qkv" in name else 3)
    return model


def sparse_vit(config, backbone=None, merge=True):
    backbone = sharp(tiny_vit() if backbone is None else backbone)
    config = replace(config, merge_dropped=merge)
    sparse = sparsify(backbone, config, generator=seeded(3)).eval()
    with torch.no_grad():
        for parameter in sparse.method.parameters():
            parameter.mul_(16 if parameter.ndim > 1 else 1)
    return sparse


def some_tokens(num_prefix=1, num_images=4, seed=0, channels=8):
    x = torch.randn(num_images, num_prefix + 16, channels, generator=seeded(seed))
    return Tokens.of(x, num_prefix)


def by_hand(tokens: Tokens, keep_BN: torch.Tensor):
    """What one image at a time, and one token after the other, comes to, on the grid: features
    (B, N, C), sizes (B, N), where each patch went.
    """
    x, size = tokens.patches.clone(), torch.ones(keep_BN.shape)
    into = torch.arange(keep_BN.shape[1]).repeat(len(keep_BN), 1)
    for image, keep in enumerate(keep_BN):
        kept, totals = keep.nonzero().flatten(), tokens.patches[image].clone()
        for patch in (~keep).nonzero().flatten():
            into[image, patch] = -1
            if len(kept):
                cosine = F.cosine_similarity(tokens.patches[image, patch], tokens.patches[image])
                best = kept[cosine[kept].argmax()]
                totals[best] += tokens.patches[image, patch]
                size[image, best] += 1
                into[image, patch] = best
            x[image, patch], size[image, patch] = 0, 0
        x[image, kept] = totals[kept] / size[image, kept, None]
    return x, size, into


def on_grid(tokens, num_patches=16):
    """Features and sizes of the patch tokens that are there, on the grid."""
    if isinstance(tokens, PackedTokens):
        sizes, x = tokens.size_N, tokens.patches
    else:
        keep = 1 if tokens.keep_BN is None else tokens.keep_BN
        sizes, x = tokens.size_BN * keep, tokens.patches
        x = x if tokens.keep_BN is None else x * keep.unsqueeze(-1)
    if isinstance(tokens, Tokens) and tokens.keep_BN is not None:  # padding repeats places
        hidden = tokens.keep_BN < 0.5
        tokens = replace(tokens, keep_BN=None, index_BN=tokens.index_BN.where(~hidden, num_patches))
    size = tokens.on_grid(sizes, num_patches + 1, 0.0)[:, :-1]
    features = [
        tokens.on_grid(x[..., channel], num_patches + 1, 0.0)[:, :-1]
        for channel in range(x.shape[-1])
    ]
    return torch.stack(features, -1), size


def executions(tokens, keep_BN):
    """The same choice in every form."""
    yield dropping.keep_chosen(tokens, keep_BN, merge=True)
    yield dropping.hide(tokens, keep_BN.float(), merge=True)
    halves = (select_padded(tokens, keep, None) for keep in (keep_BN, ~keep_BN))
    yield dropping.absorb(*halves)
    counts = keep_BN.sum(1).tolist()
    if len(set(counts)) == 1:
        score = torch.rand(keep_BN.shape, generator=seeded(5)) + keep_BN
        yield dropping.keep_best(tokens, score, counts[0], merge=True)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(
    "counts", [*COUNTS, [0, 5, 16, 2], [0, 0, 0, 0], [16, 16, 16, 16]], ids=str
)
def test_every_execution_is_what_is_said(counts, num_prefix):
    tokens, keep = some_tokens(num_prefix), keep_of(counts)
    x, size, into = by_hand(tokens, keep)
    for merged, moves in executions(tokens, keep):
        features, sizes = on_grid(merged)
        torch.testing.assert_close(features, x, atol=1e-5, rtol=0)
        torch.testing.assert_close(sizes, size, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.prefix_BPC, tokens.prefix_BPC, atol=0, rtol=0)
        recorder = Recorder((4, 4))
        recorder.add(1, tokens, torch.zeros(4, 16), merged, moves)
        assert torch.equal(recorder.stages[0].groups, into)


def test_nothing_dropped_changes_nothing():
    tokens = some_tokens()
    for merged, _ in executions(tokens, torch.ones(4, 16, dtype=torch.bool)):
        features, size = on_grid(merged)
        assert torch.equal(features, tokens.patches)
        assert torch.equal(size, torch.ones(4, 16))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_long_rows_and_rows_of_zeros(kind):
    """Kept zeros take up what is like nothing; 16 bits hold no product of long rows."""
    x = torch.eye(3, dtype=kind)[[0, 0, 1, 2, 1, 2]].mul(1e3)[None]
    x[:, 1] = 0
    tokens = Tokens.of(x.repeat(1, 1, 32), 0)
    order_BN = torch.tensor([[1, 2, 3, 4, 5, 0]])
    _, (source_BD, into_BD) = dropping.keep_first(tokens, order_BN, 3, merge=True)
    assert source_BD.tolist() == [[4, 5, 0]]
    assert into_BD[0, :2].tolist() == [2, 3]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("counts", [COUNTS[:2], (COUNTS[2], COUNTS[1])], ids=str)
def test_two_stages_packed_masked_padded_and_alone(backbone, counts):
    """Blocks, and the head, heed the sizes alike, whatever form the tokens have."""
    family = family_for(backbone)
    sharp(family.backbone)
    first = keep_of(counts[0])
    second = first & (keep_of([16 - 16 // 3] * 4, seed=1) | ~keep_of(counts[1], seed=2))
    second |= first & ~second.any(1, keepdim=True)

    def masked(tokens, keep):
        return dropping.hide(tokens, keep.float(), merge=True)[0]

    def packed(tokens, keep):
        return dropping.keep_chosen(tokens, keep, merge=True)[0]

    def padded(tokens, keep):
        if tokens.keep_BN is None:
            tokens = tokens.with_keep(torch.ones(tokens.index_BN.shape))
        halves = (select_padded(tokens, half, None) for half in (keep, ~keep))
        return dropping.absorb(*halves)[0]

    def run(choose, x, *keeps):
        tokens = family.run_block(0, family.stem(x))
        for block, keep in zip((1, 2), keeps, strict=True):
            tokens = family.run_block(block, choose(tokens, keep))
        return family.answer(3, tokens), family.answer(3, tokens, exact=False)

    with torch.no_grad():
        exact, expected = run(packed, X, first, second)
        torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
        for choose in (masked, padded):
            for logits in run(choose, X, first, second):
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        for image in range(4):
            one = slice(image, image + 1)
            for logits in run(packed, X[one], first[one], second[one]):
                torch.testing.assert_close(logits, expected[one], atol=1e-5, rtol=0)


@given(
    counts=st.lists(st.integers(1, 16), min_size=1, max_size=6),
    ratio=st.floats(0, 1),
    num_prefix=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_patch_is_lost(counts, ratio, num_prefix, seed):
    tokens, first = some_tokens(num_prefix, len(counts), seed), keep_of(counts, seed=seed)
    second = first & (torch.rand(first.shape, generator=seeded(seed + 1)) < ratio)
    second |= first & ~second.any(1, keepdim=True)
    forms = {
        "packed": dropping.keep_chosen,
        "masked": lambda tokens, keep, merge: dropping.hide(tokens, keep.float(), merge),
    }
    found = []
    for form in forms.values():
        recorder, state = Recorder((4, 4)), tokens
        for stage, keep in enumerate((first, second)):
            before, (state, moves) = state, form(state, keep, merge=True)
            scores = torch.zeros(len(before.index_N if hasattr(before, "index_N") else counts))
            if isinstance(before, Tokens):
                scores = torch.zeros(before.index_BN.shape)
            recorder.add(stage, before, scores, state, moves)
        features, size = on_grid(state)
        torch.testing.assert_close(size.sum(1), torch.full((len(counts),), 16.0))
        groups = recorder.stages[-1].groups
        assert second.gather(1, groups).all()  # every patch is in a token that goes on
        assert torch.equal(groups[second], torch.arange(16).expand_as(second)[second])
        held = torch.zeros(len(counts), 16).scatter_add(1, groups, torch.ones(len(counts), 16))
        torch.testing.assert_close(size, held)
        mean = torch.stack([held_of(tokens, groups, place) for place in range(16)], 1)
        torch.testing.assert_close(features, mean, atol=1e-5, rtol=0)
        found.append(groups)
    assert torch.equal(*found)


def held_of(tokens, groups, place):
    """(B, C): the mean of the patches whose group is at ``place``; 0 of none."""
    inside = (groups == place).unsqueeze(-1)
    return (tokens.patches * inside).sum(1) / inside.sum(1).clamp(min=1)


@each_case
@pytest.mark.parametrize("backbone", [*BACKBONES, "lvvit"])
def test_images_do_not_see_each_other(name, backbone):
    model = tiny_lvvit() if backbone == "lvvit" else tiny_vit(**BACKBONES[backbone])
    sparse = sparse_vit(CASES[name], model)
    with torch.no_grad():
        together, alone = sparse(X), torch.cat([sparse(image[None]) for image in X])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        trace = sparse.trace(X)
    torch.testing.assert_close(trace.logits, together, atol=1e-5, rtol=0)
    assert not torch.equal(sparse_vit(CASES[name], model, merge=False)(X), together)
    for stage in trace.stages:
        for groups, kept in zip(stage.groups, stage.kept, strict=True):
            assert torch.equal(groups.unique(), kept if len(kept) else torch.tensor([-1]))
            assert torch.equal(groups[kept], kept)


def test_masked_is_adaptive():
    adaptive = sparse_vit(CASES["asvit"])
    masked = sparse_vit(replace(CASES["asvit"], mode="mask"))
    torch.testing.assert_close(masked(X), adaptive(X), atol=1e-5, rtol=0)
    for one, other in zip(masked.trace(X).stages, adaptive.trace(X).stages, strict=True):
        assert torch.equal(one.groups, other.groups)


def test_the_batch_s_mean_count():
    sparse = sparse_vit(replace(CASES["asvit"], mode="batch_mean"))
    one = sparse_vit(CASES["asvit"])
    torch.testing.assert_close(sparse(X[:1]), one(X[:1]), atol=1e-5, rtol=0)


@each_case
def test_off_by_default_and_groups_then_say_what_is_gone(name):
    assert CASES[name].merge_dropped is False
    sparse = sparse_vit(CASES[name], merge=False)
    for stage in sparse.trace(X).stages:
        for groups, kept in zip(stage.groups, stage.kept, strict=True):
            expected = torch.full((16,), -1).scatter(0, kept, kept)
            assert torch.equal(groups, expected)


@pytest.mark.parametrize("name", ["dynamicvit threshold", "asvit", "asvit masked"])
def test_images_that_keep_nothing_lose_all(name):
    high = {"threshold": 0.999} if "dynamicvit" in name else {"thresholds": 0.9}
    merged, dropped = (
        sparse_vit(replace(CASES[name], **high), merge=merge) for merge in (True, False)
    )
    with torch.no_grad():
        assert not merged.trace(X).stages[-1].counts.any()
        torch.testing.assert_close(merged(X), dropped(X), atol=1e-6, rtol=0)
        assert (merged.trace(X).stages[-1].groups == -1).all()


@each_case
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_costs_are_what_torch_counts(name, kwargs):
    sparse = sparse_vit(CASES[name], tiny_vit(**kwargs))
    for image in X:
        with torch.no_grad(), counting() as counter:
            sparse(image[None])
        macs = sparse.trace(image[None]).macs.item()
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


@each_case
def test_tables_have_a_curve_of_it(name):
    sparse = sparse_vit(CASES[name])
    steps = sparse.method.steps(sparse.family, (4, 4), [9] * len(sparse.method.stages))
    parts = {step.part for step in steps if step.part.startswith("select-")}
    assert all(part.startswith(f"select-{sparse.method.name}-merged") for part in parts)
    assert parts
    assert any(config.merge_dropped for config in type(sparse.method).kinds())


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("include", [False, True])
def test_heads_weigh_tokens_by_what_they_stand_for(pool, include):
    """A token of size 3 is three tokens."""
    family = family_of(tiny_vit(global_pool=pool, pool_include_prefix=include))
    tokens = some_tokens(1, channels=32)
    size = torch.ones(4, 16)
    size[:, 2], size[1, 5] = 3, 2
    repeats = [[2, 2], [2, 2, 5], [2, 2], [2, 2]]
    expected = []
    for image, again in enumerate(repeats):
        one = tokens.with_x(tokens.x)
        places = torch.tensor([[*range(16), *again]])
        one = Tokens(tokens.x[image : image + 1], 1, tokens.index_BN[:1]).gather(places)
        expected.append(family.head(one))
    expected = torch.cat(expected)
    sized = tokens.sized(size)
    keep = torch.ones(4, 16, dtype=torch.bool)
    for form in (sized, sized.with_keep(keep.float()), select_padded(sized, keep, None)):
        torch.testing.assert_close(family.head(form), expected, atol=1e-5, rtol=0)
    keep[0, 7] = False
    packed, masked = select(sized, keep), sized.with_keep(keep.float())
    assert isinstance(packed, PackedTokens)
    torch.testing.assert_close(family.head(packed), family.head(masked), atol=1e-5, rtol=0)
    torch.testing.assert_close(family.head(packed)[1:], expected[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        family.pool(sized),
        family.backbone.head_drop(
            family.backbone.fc_norm(family._weighted_pool(family.backbone.norm(sized.x), sized))
        ),
        atol=0,
        rtol=0,
    )


def test_an_lvvit_s_maximum_is_of_the_tokens_as_they_are():
    family = family_of(tiny_lvvit())
    tokens = some_tokens(1, channels=32)
    sized = tokens.sized(torch.full((4, 16), 3.0))
    assert torch.equal(family.head(sized), family.head(tokens))


TRAINED = {
    "dynamicvit gumbel": (DynamicViTConfig(stages=(1, 2), keep_ratio=0.6), "predictors"),
    "dynamicvit top_k": (
        DynamicViTConfig(stages=(1, 2), keep_ratio=0.6, sampling="top_k", score_weight=1.0),
        "predictors",
    ),
    "asvit": (CASES["asvit"], "thresholds"),
    "asvit fixed": (replace(CASES["asvit"], learn_thresholds=False), None),
    "sait": (SaiTConfig(schedule="sparse"), None),
    "sait mass": (SaiTConfig(schedule="sparse", train_selector="mass", min_kept=2), None),
}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    """Everything learns, finite; the forward is what merging makes it."""
    config, learned = TRAINED[name]
    grads = {}
    for merge in (True, False):
        sparse = sparse_vit(config, merge=merge).train()
        teacher = sparse.method.teach(family_of(sharp(tiny_vit())), X)
        output = sparse.method.train_forward(sparse.family, X, seeded(1))
        sparse.method.losses(output, TARGET, teacher)["total"].backward()
        grads[merge] = {
            key: parameter.grad
            for key, parameter in sparse.named_parameters()
            if parameter.requires_grad
        }
        for key, grad in grads[merge].items():
            assert grad is not None, key
            assert grad.isfinite().all(), key
        if learned:
            assert any(grad.any() for key, grad in grads[merge].items() if learned in key)
    key = "backbone.blocks.3.attn.qkv.weight"
    assert not torch.equal(grads[True][key], grads[False][key])


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_gradients_through_masks_without_a_class_token(pool):
    sparse = sparse_vit(CASES["asvit"], tiny_vit(class_token=False, global_pool=pool)).train()
    sparse.losses(X, TARGET)["total"].backward()
    for key, parameter in sparse.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_training_by_masks_is_what_inference_does():
    """The same choices: the logits of training are those of inference."""
    config = DynamicViTConfig(stages=(1, 2), threshold=0.5, sampling="argmax")
    for sparse in (sparse_vit(config), sparse_vit(CASES["asvit"])):
        with torch.no_grad():
            trained = sparse.method.train_forward(sparse.family, X).logits
            torch.testing.assert_close(trained, sparse(X), atol=1e-4, rtol=0)


def test_the_straight_through_gradient_is_of_going_into_the_nearest():
    """Of a kept token too: what it would do to the others if it went, not to itself."""
    x = torch.randn(1, 3, 4, generator=seeded(0), dtype=torch.float64)
    tokens, keep = Tokens.of(x, 0), torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    merged, _ = dropping.hide(tokens, keep, merge=True)
    weights = torch.randn(3, 4, generator=seeded(1), dtype=torch.float64)
    (merged.patches[0] * weights).sum().backward()
    alike = F.normalize(x[0], dim=1) @ F.normalize(x[0], dim=1).T
    nearest = alike.fill_diagonal_(-2).argmax(1)
    expected = [-(weights[nearest[i]] * (x[0, i] - x[0, nearest[i]])).sum() for i in range(3)]
    torch.testing.assert_close(keep.grad[0], torch.stack(expected))


def test_what_was_merged_cannot_return():
    with pytest.raises(ConfigError, match="monotone=True"):
        ASViTConfig(merge_dropped=True, monotone=False)


@each_case
def test_checkpoints_keep_the_field(name, tmp_path):
    sparse = sparse_vit(CASES[name])
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert loaded.config.merge_dropped
    assert torch.equal(loaded(X), sparse(X))


@pytest.mark.parametrize("name", ["dynamicvit", "dynamicvit threshold", "asvit", "sait density"])
def test_autocast(name):
    sparse = sparse_vit(CASES[name])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(X).isfinite().all()
    assert sparse.bfloat16()(X.bfloat16()).isfinite().all()


def test_no_images():
    for config in CASES.values():
        sparse = sparse_vit(config)
        assert sparse(X[:0]).shape == (0, 10)
        assert sparse.trace(X[:0]).stages[0].groups.shape == (0, 16)
