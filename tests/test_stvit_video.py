"""STViT on Video Swin: the cost, the equations, what tokens look at, options, guards, the dial."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.conftest import clips, seeded, tiny_swin, tiny_video_swin
from tests.test_stvit_swin import attention_of
from vitrim import ConfigError, STViTVideoConfig, UnsupportedBackboneError, sparsify
from vitrim.costs.macs import counting

X = clips(2)


def sparse_video(model=None, **options):
    model = tiny_video_swin() if model is None else model
    options = {"window_tokens": 4} | options
    return sparsify(model, STViTVideoConfig(**options), generator=seeded(0)).eval()


COSTS = [("swin3d_t", 9, 8), ("swin3d_s", 9, 16), ("swin3d_b", 9, 16)]


@pytest.mark.parametrize(
    ("name", "tokens", "block"), COSTS, ids=["T -27%", "S -27%", "B (not published) -27%"]
)
def test_saves_what_was_published_of_torchvisions_own_cost(name, tokens, block):
    """At 32 frames of 224 x 224; to two points."""
    with torch.device("meta"):
        model = timm.create_model(name).requires_grad_(False)
        sparse = sparsify(model, STViTVideoConfig(window_tokens=tokens)).eval()
        saved = 1 - sparse.macs() / sparse.dense_macs()
        assert saved == pytest.approx(0.27, abs=0.02)
        if name == "swin3d_t":
            with torch.no_grad(), counting() as counter:
                sparse(torch.empty(1, 3, 32, 224, 224))
            assert sparse.macs() == counter.get_total_flops() / 2
    assert not list(sparse.method.parameters())
    assert sparse.method.stages == (block + 1,)
    assert sparse.method.counts(sparse.family, (16, 56, 56)) == (16 * 36,)


def test_fewer_tokens_cost_less():
    with torch.device("meta"):
        model = timm.create_model("swin3d_t")
        costs = [sparsify(model, STViTVideoConfig(window_tokens=n)).macs() for n in (16, 9, 4)]
    assert costs == sorted(costs, reverse=True)


def mlp(block, x):
    return x + block.mlp(block.norm2(x))


def generated(block, query, residual, memory):
    return mlp(block, residual + attention_of(block, query, memory)[0])


def frame_tokens(stage, frame):
    """The semantic tokens (4, 4, C) of one frame's map (8, 8, C), window by window."""
    windows = {}
    for i in (0, 1):
        for j in (0, 1):
            cell = frame[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            centres = cell.reshape(2, 2, 2, 2, -1).amax((1, 3)).reshape(1, 4, -1)
            top, left = (0 if n == 0 else 2 for n in (i, j))  # 6 x 6, moved into the map of 8
            wide = frame[top : top + 6, left : left + 6].reshape(1, 36, -1)
            made = generated(stage[3], centres, centres, torch.cat([centres, wide], 1))
            windows[i, j] = generated(stage[4], made, made, torch.cat([made, wide], 1))[0]
    rows = [torch.cat([windows[i, j].reshape(2, 2, -1) for j in (0, 1)], 1) for i in (0, 1)]
    return torch.cat(rows)


def among_tokens(block, x, groups):
    """A block in which tokens (T, H, W, C) see those of their group of frames, and of their window
    of 2 x 2 tokens, which stand for the places 0 and 2 of 4.
    """
    attention, out = block.attn, torch.empty_like(x)
    heads, width = attention.num_heads, x.shape[-1]
    normed = block.norm1(x)
    for frames in groups:
        for i in range(0, x.shape[1], 2):
            for j in range(0, x.shape[2], 2):
                places = [(t, r, c) for t in frames for r in (0, 1) for c in (0, 1)]
                cells = torch.stack([normed[t, i + r, j + c] for t, r, c in places])
                q, k, v = attention.qkv(cells).reshape(len(cells), 3, heads, -1).unbind(1)
                for a, (t, r, c) in enumerate(places):
                    bias = torch.stack(
                        [
                            attention.relative_position_bias_table[
                                ((t - u + 1) * 7 + 2 * (r - y) + 3) * 7 + 2 * (c - z) + 3
                            ]
                            for u, y, z in places
                        ]
                    )
                    logits = (q[a] * k).sum(-1) * (width // heads) ** -0.5 + bias
                    seen = (logits.softmax(0).unsqueeze(-1) * v).sum(0).flatten()
                    out[t, i + r, j + c] = attention.proj(seen)
    return mlp(block, x + out)


def test_it_is_its_equations():
    model = tiny_video_swin()
    sparse = sparse_video(model)
    with torch.no_grad():
        x = model.features[:4](model.patch_embed(X[:1]))  # stages 0 and 1, and the downsampling
        stage = model.features[4]
        x = stage[2](stage[1](stage[0](x)))[0]
        tokens = torch.stack([frame_tokens(stage, frame) for frame in x])
        tokens = among_tokens(stage[5], tokens, [[0], [1, 2], [3]])  # shifted by 1 of 2 frames
        tokens = model.features[5](tokens)
        tokens = among_tokens(model.features[6][0], tokens, [[0, 1], [2, 3]])
        expected = model.head(model.norm(tokens).mean((0, 1, 2)))
        torch.testing.assert_close(sparse(X[:1])[0], expected, atol=1e-5, rtol=0)


def test_a_trace_says_which_places_of_which_frame_a_token_looks_at():
    trace = sparse_video().trace(X)
    (stage,) = trace.stages
    assert trace.grid == (4, 32, 32)
    assert stage.grid == (4, 8, 8)
    assert stage.counts.tolist() == [64, 64]
    looks = stage.assignment.reshape(2, 4, 16, 4, 64)
    for frame in range(4):
        others = [other for other in range(4) if other != frame]
        assert not looks[:, frame, :, others].any()
        assert (looks[:, frame, :, frame] > 0).any(-1).all()
    shares = looks.sum((3, 4))  # the rest of it a window's tokens give to themselves
    assert ((shares > 0) & (shares < 1)).all()
    first = looks[0, 1, 0, 1].reshape(8, 8)
    assert not first[6:].any()
    assert not first[:, 6:].any()
    torch.testing.assert_close(stage.scores, stage.assignment.mean(1))


def test_with_global_centres_no_biases_are_used():
    sparse = sparse_video(global_centres=True)
    assert sparse.method.centres_SC.shape == (16, 32)
    before = sparse(X)
    with torch.no_grad():
        for stage, index in ((2, 3), (2, 4), (2, 5), (3, 0)):
            table = sparse.family.block(stage, index).attn.relative_position_bias_table
            assert not table.requires_grad
            table.normal_()
    assert torch.equal(sparse(X), before)
    kept = sparse_video()
    assert kept.family.block(2, 5).attn.relative_position_bias_table.requires_grad
    assert all(p.requires_grad for p in kept.unwrap().parameters())


def test_every_parameter_that_asks_for_a_gradient_gets_one():
    for options in ({}, {"global_centres": True, "pooling": "intra_inter", "layer_scale": 1.0}):
        sparse = sparse_video(**options).train()
        sparse(X).sum().backward()
        missing = {n for n, p in sparse.named_parameters() if p.requires_grad and p.grad is None}
        assert not missing


def test_options_of_the_residual():
    assert not torch.equal(sparse_video(residual=False)(X), sparse_video()(X))
    inside = sparse_video(global_centres=True)
    outside = sparse_video(global_centres=True, centres_in_residual=False)
    assert not torch.equal(inside(X), outside(X))


def test_hooks_of_blocks_and_attention_run_once_a_call():
    sparse, seen = sparse_video(), []
    watched = [sparse.family.block(s, i) for s, i in ((0, 0), (2, 2), (2, 3), (2, 5), (3, 0))]
    watched += [block.attn for block in watched]
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    sparse(X)
    assert sorted(map(id, seen)) == sorted(map(id, watched))


def test_drop_path_drops_a_branch_of_a_whole_clip():
    sparse = sparse_video(tiny_video_swin(stochastic_depth_prob=1.0), base_layers=0).train()
    family, states = sparse.family, []
    block = family.block(3, 0)  # its branches are always dropped
    block.register_forward_hook(lambda _m, inputs, out: states.append((inputs[0], out)))
    sparse(X)
    ((entering, leaving),) = states
    assert torch.equal(entering, leaving)


@pytest.mark.parametrize("size", [(3, 27, 33), (1, 32, 32), (11, 21, 32)])
def test_borders(size):
    """Windows that hang over, clips shorter than a window, and their costs."""
    sparse = sparse_video().requires_grad_(False)
    x = clips(2, size)
    logits = sparse(x)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1], sparse(x[:1]), atol=1e-5, rtol=0)
    with torch.no_grad(), counting() as counter:
        sparse(x[:1])
    assert sparse.macs(size) == counter.get_total_flops() / 2
    assert sparse.trace(x).stages[0].counts[0] == sparse.method.counts(
        sparse.family, sparse.family.grid(size)
    )[0]  # fmt: skip


def test_features_are_refused_with_the_reason():
    sparse = sparse_video()
    for call in (sparse.features, sparse.forward_intermediates, sparse.train_features):
        with pytest.raises(ConfigError, match="nothing is left of the patches"):
            call(X, indices=[0])
    with pytest.raises(ConfigError, match="takes clips"):
        sparse.features_only()
    with pytest.raises(ConfigError, match="call the model"):
        sparse.forward_head(sparse.forward_features(X))


def test_the_dial_is_the_number_of_tokens():
    sparse = sparse_video()
    sparse.set_budget(0.9, tolerance=0.1)
    assert sparse.config.window_tokens > 4
    with pytest.raises(ConfigError, match="stvit_video learned to make 4"):
        sparse_video(global_centres=True).set_budget(0.9)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="do not fit in the 6 blocks"):
        sparse_video(base_layers=5)
    with pytest.raises(ConfigError, match="square number"):
        sparse_video(window_tokens=8)
    with pytest.raises(ConfigError, match="4 x 4 positions"):
        sparse_video(window_tokens=25)
    with pytest.raises(UnsupportedBackboneError, match="use stvit_swin"):
        sparse_video(tiny_swin())
