"""Packed execution: per-image counts, exact and without padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import images, jitter, seeded, tiny_vit
from vitrim.families import family_of
from vitrim.tokens.bucketing import COSTS, Costs, divide
from vitrim.tokens.packed import Layout, PackedTokens, select
from vitrim.tokens.plain import Tokens

BACKBONES = {
    "class token": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"reg_tokens": 3},
    "average pool": {"class_token": False, "global_pool": "avg"},
    "class token, average pool": {"global_pool": "avg"},
    "prefix in average": {"reg_tokens": 2, "global_pool": "avg", "pool_include_prefix": True},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "norms of queries and keys": {"qk_norm": True},
    "norm of the context": {"scale_attn_norm": True, "init_values": 0.5},
}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
COUNTS = (3, 16, 1, 7, 3, 9)

PADS_ALL = Costs(call=1e6, pair=1.0, ragged=1e9, tail=0.0, row=0.0, back=0.0)
PADS_NONE = Costs(call=1.0, pair=1.0, ragged=0.0, tail=0.0, row=1e9, back=0.0)


def family_for(backbone: str):
    return family_of(tiny_vit(**BACKBONES[backbone]))


def keep_of(counts, num_patches: int = 16, seed: int = 0) -> torch.Tensor:
    """(B, num_patches) bool: random patches, this many of each image."""
    rank = torch.rand(len(counts), num_patches, generator=seeded(seed)).argsort(1).argsort(1)
    return rank < torch.tensor(counts).unsqueeze(1)


def alone(tokens: Tokens, image: int, keep_BN: torch.Tensor) -> Tokens:
    """One image with its kept patches, gathered."""
    single = Tokens(tokens.x[image : image + 1], tokens.num_prefix, tokens.index_BN[:1])
    return single.gather(keep_BN[image].nonzero().T)


def packed_tokens(counts=COUNTS, num_prefix: int = 1, channels: int = 8, seed: int = 0):
    x = torch.randn(len(counts), num_prefix + 16, channels, generator=seeded(seed))
    tokens, keep = Tokens.of(x, num_prefix), keep_of(counts, seed=seed)
    return tokens, keep, select(tokens, keep)


@each_backbone
@pytest.mark.parametrize("costs", [PADS_ALL, PADS_NONE])
def test_packed_is_masked_is_gathered(backbone, costs, monkeypatch):
    monkeypatch.setitem(COSTS, torch.float32, costs)
    family, x = family_for(backbone), images(len(COUNTS))
    keep = keep_of(COUNTS)
    with torch.no_grad():
        tokens = family.run_blocks([0], family.stem(x))
        packed = select(tokens, keep)
        assert isinstance(packed, PackedTokens)
        masked = tokens.with_keep(keep.float())
        single = [alone(tokens, image, keep) for image in range(len(COUNTS))]
        for block in (1, 2, 3):
            packed, masked = family.run_block(block, packed), family.run_block(block, masked)
            single = [family.run_block(block, one) for one in single]
        logits = family.head(packed)
        torch.testing.assert_close(logits, family.head(masked), atol=1e-5, rtol=0)
        gathered = torch.cat([family.head(one) for one in single])
        torch.testing.assert_close(logits, gathered, atol=1e-5, rtol=0)


def test_the_cost_model_is_heeded(monkeypatch):
    layout = packed_tokens()[2].layout
    for costs, padded, count in ((PADS_ALL, True, 1), (PADS_NONE, False, 5)):
        monkeypatch.setitem(COSTS, torch.float32, costs)
        layout = Layout(layout.counts, layout.num_prefix, layout.device)
        buckets = layout.buckets(torch.float32, 2)
        assert len(buckets) == count
        assert [bucket.rows is not None for bucket in buckets] == [padded] * count
        assert layout.buckets(torch.float32, 2) is buckets


@each_backbone
def test_nothing_kept_by_some_images(backbone):
    """Even images without a single row, where there are no prefix tokens."""
    family, counts = family_for(backbone), (0, 5, 0, 16, 1)
    keep = keep_of(counts)
    tokens = family.stem(images(5))
    packed = select(tokens, keep)
    assert packed.counts_B.tolist() == list(counts)
    logits = family.head(family.run_block(0, packed))
    for image, count in enumerate(counts):
        if count or not family.pools_patches:
            expected = family.head(family.run_block(0, alone(tokens, image, keep)))
            torch.testing.assert_close(logits[image], expected[0], atol=1e-5, rtol=0)


def test_gated_attention():
    model = tiny_vit()
    for block in model.blocks:
        block.attn.gate = torch.nn.Linear(32, 32)
    family, keep = family_of(jitter(model)), keep_of(COUNTS)
    tokens = family.stem(images(len(COUNTS)))
    packed = family.run_block(0, select(tokens, keep)).prefix_BPC
    for image in range(len(COUNTS)):
        expected = family.run_block(0, alone(tokens, image, keep)).prefix_BPC
        torch.testing.assert_close(packed[image], expected[0], atol=1e-5, rtol=0)


@given(
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=9),
    num_prefix=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_and_moves_nothing(counts, num_prefix, seed):
    tokens, keep, packed = packed_tokens(counts, num_prefix, 4, seed)
    assert packed.counts_B.tolist() == counts
    torch.testing.assert_close(packed.prefix_BPC, tokens.prefix_BPC, atol=0, rtol=0)
    for image, places in enumerate(packed.places()):
        assert torch.equal(places, keep[image].nonzero().flatten())
    if len(set(counts)) == 1:
        assert isinstance(packed, Tokens)
        assert torch.equal(packed.x, tokens.gather(packed.index_BN).x)
        return
    assert packed.x.shape == (sum(counts) + len(counts) * num_prefix, 4)
    dense = tokens.patches
    for channel in range(4):
        grid = packed.on_grid(packed.patches[:, channel], 16, -7.0)
        assert torch.equal(grid, dense[..., channel].where(keep, -7.0))
    total = packed.sum_per_image(packed.patches)
    torch.testing.assert_close(total, (dense * keep.unsqueeze(-1)).sum(1))
    spread = packed.spread(torch.arange(len(counts)))
    assert torch.equal(packed.on_grid(spread, 16, -1) >= 0, keep)
    assert torch.equal(
        packed.sum_per_image(spread), torch.tensor(counts) * torch.arange(len(counts))
    )
    padded = packed.padded()
    assert torch.equal(padded.keep_BN.sum(1).long(), packed.counts_B)
    assert torch.equal(padded.prefix_BPC, tokens.prefix_BPC)
    for image, is_token in enumerate(padded.keep_BN > 0.5):
        places = padded.index_BN[image, is_token]
        assert torch.equal(padded.patches[image, is_token], dense[image, places])
        assert torch.equal(places.sort().values, packed.places()[image])


@given(
    first=st.lists(st.integers(0, 16), min_size=2, max_size=7),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_selecting_twice_is_selecting_once(first, ratio, seed):
    tokens, keep, packed = packed_tokens(first, 2, 4, seed)
    fewer = torch.rand(keep.shape, generator=seeded(seed + 1)) < ratio
    twice, once = select(packed, fewer), select(tokens, keep & fewer)
    assert type(twice) is type(once)
    assert torch.equal(twice.x, once.x)
    assert all(torch.equal(a, b) for a, b in zip(twice.places(), once.places(), strict=True))


def test_packages_become_prefix_tokens():
    tokens, keep, packed = packed_tokens()
    packages = torch.randn(len(COUNTS), 2, 8, generator=seeded(1))
    for before in (tokens, packed):
        after = select(before, keep, packages_BPC=packages)
        assert after.num_prefix == 3
        assert torch.equal(after.prefix_BPC[:, :1], tokens.prefix_BPC)
        assert torch.equal(after.prefix_BPC[:, 1:], packages)
        torch.testing.assert_close(
            after.on_grid(after.patches[:, 0], 16, 0.0),
            tokens.patches[..., 0] * keep,
            atol=0,
            rtol=0,
        )
    even = select(tokens, keep_of((4,) * 6), packages_BPC=packages)
    assert isinstance(even, Tokens)
    assert torch.equal(even.prefix_BPC[:, 1:], packages)


def test_dropped_by_a_mask_stays_dropped():
    tokens, keep, packed = packed_tokens()
    masked = tokens.with_keep(keep.float())
    assert torch.equal(select(masked, torch.ones_like(keep)).x, packed.x)


def test_other_prefix_tokens():
    _, _, packed = packed_tokens(num_prefix=2)
    prefix = torch.randn(len(COUNTS), 2, 8, generator=seeded(1))
    changed = packed.with_prefix(prefix)
    assert torch.equal(changed.prefix_BPC, prefix)
    assert torch.equal(changed.patches, packed.patches)


@each_backbone
def test_order_of_images_does_not_matter(backbone):
    family, x, keep = family_for(backbone), images(len(COUNTS)), keep_of(COUNTS)
    logits = {}
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3]):
        packed = select(family.stem(x[order]), keep[order])
        for block in range(family.depth):
            packed = family.run_block(block, packed)
        logits[tuple(order)] = family.head(packed)[torch.tensor(order).argsort()]
    torch.testing.assert_close(*logits.values(), atol=1e-6, rtol=0)


def test_a_broken_image_breaks_no_other(monkeypatch):
    """Not a number in one image: its neighbours in a padded bucket do not notice."""
    monkeypatch.setitem(COSTS, torch.float32, PADS_ALL)
    family, x, keep = family_for("class token"), images(len(COUNTS)), keep_of(COUNTS)
    good = [0, 1, 3, 4, 5]
    expected = family.head(family.run_block(0, select(family.stem(x), keep)))
    x[2] = torch.nan
    logits = family.head(family.run_block(0, select(family.stem(x), keep)))
    assert logits[2].isnan().all()
    torch.testing.assert_close(logits[good], expected[good], atol=0, rtol=0)


SCORES = {
    "class": lambda record: record.patch_attention().mean(1),
    "received": lambda record: record.received_attention().amax(1),
    "values": lambda record: record.v_BHND[:, :, record.num_prefix :].norm(dim=-1).mean(1),
    "context": lambda record: record.context_BHQD[:, :, record.num_prefix :].norm(dim=-1).amax(1),
}


@pytest.mark.parametrize("score", SCORES)
@each_backbone
def test_scores_are_those_of_single_images(score, backbone):
    family, keep = family_for(backbone), keep_of(COUNTS)
    tokens = family.stem(images(len(COUNTS)))
    half, found = family.attention_half(1, select(tokens, keep), SCORES[score])
    found = half.on_grid(found, 16, 0.0)
    for image in range(len(COUNTS)):
        one, expected = family.attention_half(1, alone(tokens, image, keep), SCORES[score])
        expected = one.on_grid(expected, 16, 0.0)
        torch.testing.assert_close(found[image], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("costs", [PADS_ALL, PADS_NONE])
def test_gradients_are_those_of_single_images(costs, monkeypatch):
    monkeypatch.setitem(COSTS, torch.float32, costs)
    family, x, keep = family_for("class token"), images(len(COUNTS)), keep_of(COUNTS)
    parameters = [p for p in family.backbone.parameters() if p.requires_grad]

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), parameters)

    packed = select(family.stem(x), keep)
    for block in range(family.depth):
        packed, _ = family.attention_half(block, packed, SCORES["class"])
        packed = family.mlp_half(block, packed)
    singles = []
    for image in range(len(COUNTS)):
        one = alone(family.stem(x), image, keep)
        for block in range(family.depth):
            one = family.run_block(block, one)
        singles.append(family.head(one))
    together, apart = gradients(family.head(packed)), gradients(torch.cat(singles))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("backbone", ["class token", "norms of queries and keys"])
@pytest.mark.parametrize("costs", [PADS_ALL, PADS_NONE])
def test_bfloat16(autocast, backbone, costs, monkeypatch):
    monkeypatch.setitem(COSTS, torch.bfloat16, costs)
    family, x, keep = family_for(backbone), images(len(COUNTS)), keep_of(COUNTS)
    exact = select(family.stem(x), keep)
    exact, expected_score = family.attention_half(0, exact, SCORES["class"])
    expected = family.head(family.mlp_half(0, exact))
    if not autocast:
        family.backbone.bfloat16()
        x = x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed, score = family.attention_half(0, select(family.stem(x), keep), SCORES["class"])
        logits = family.head(family.mlp_half(0, packed))
    torch.testing.assert_close(score.float(), expected_score, atol=0.02, rtol=0.05)
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    costs=st.builds(
        Costs,
        st.floats(1, 1e4),
        st.floats(0.01, 2),
        *[st.floats(0, 5)] * 4,
    ),
    threads=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_no_other_division_is_cheaper(lengths, costs, threads):
    lengths = sorted(lengths)

    def cost(start, stop, padded):
        shape = (stop - start, lengths[stop - 1], 3, threads)
        equal = lengths[start] == lengths[stop - 1]
        return costs.of_padded(*shape, equal=equal) if padded else costs.of_view(*shape)

    def is_allowed(start, stop):
        part = lengths[start:stop]
        cuts_run = any(
            0 < cut < len(lengths) and lengths[cut - 1] == lengths[cut] for cut in (start, stop)
        )
        return not cuts_run and part[-1] - part[0] <= 32

    found = divide(lengths, costs, 3, threads)
    assert [start for start, _, _ in found] == [0, *[stop for _, stop, _ in found[:-1]]]
    assert found[-1][1] == len(lengths)
    for start, stop, padded in found:
        assert padded or len(set(lengths[start:stop])) == 1
    cheapest = float("inf")
    for size in range(len(lengths)):
        for inner in itertools.combinations(range(1, len(lengths)), size):
            cuts = [0, *inner, len(lengths)]
            pieces = list(itertools.pairwise(cuts))
            if all(is_allowed(*piece) for piece in pieces):
                options = [
                    min(
                        cost(*piece, padded)
                        for padded in (True, False)
                        if padded or len(set(lengths[slice(*piece)])) == 1
                    )
                    for piece in pieces
                ]
                cheapest = min(cheapest, sum(options))
    assert sum(cost(*bucket) for bucket in found) == pytest.approx(cheapest)


@pytest.mark.parametrize("rows", [1, 7, 40, 10_000])
def test_slices_of_rows_change_nothing(rows, monkeypatch):
    monkeypatch.setattr("vitrim.tokens.slices.SLICE", rows)
    family, keep = family_for("class token"), keep_of(COUNTS)
    packed = select(family.stem(images(len(COUNTS))), keep)
    sizes, mlp = [], family.backbone.blocks[0].mlp

    class Counted(torch.nn.Module):  # a hook would have all rows at once
        def forward(self, x):
            sizes.append(len(x))
            return mlp(x)

    family.backbone.blocks[0].mlp = Counted()
    found = family.mlp_half(0, packed).x
    family.backbone.blocks[0].mlp = mlp
    assert sum(sizes) == 45
    assert max(sizes) <= rows
    block = family.backbone.blocks[0]
    expected = packed.x + block.mlp(block.norm2(packed.x))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_dropout_of_attention_is_applied_in_training():
    model = tiny_vit(attn_drop_rate=0.5).train()
    family = family_of(model)
    packed = select(family.stem(images(len(COUNTS))), keep_of(COUNTS))
    torch.manual_seed(0)
    one, other = family.run_block(0, packed).x, family.run_block(0, packed).x
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(family.run_block(0, packed).x, family.run_block(0, packed).x)


def test_nothing_at_all_is_kept():
    family = family_for("average pool")
    keep = keep_of((0, 0))
    nothing = select(family.stem(images(2)), keep)
    assert isinstance(nothing, Tokens)
    assert nothing.x.shape == (2, 0, 32)


def test_wildly_different_counts():
    family = family_of(tiny_vit(img_size=112))
    counts = (196, 1, 0, 150, 2, 196, 3)
    keep = keep_of(counts, 196)
    tokens = family.stem(images(7, 112))
    packed = family.run_block(0, select(tokens, keep))
    assert len(packed.layout.buckets(torch.float32, 2)) < 6
    for image in range(7):
        expected = family.run_block(0, alone(tokens, image, keep)).prefix_BPC
        torch.testing.assert_close(packed.prefix_BPC[image], expected[0], atol=1e-5, rtol=0)
