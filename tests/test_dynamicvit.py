"""DynamicViT's behaviour: selection, training, run-time changes, guards."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import images, seeded, tiny_vit
from vitrim import ConfigError, DynamicViTConfig, sparsify
from vitrim.layers.sampling import hard_keep, top_k
from vitrim.methods.records import DenseOutput
from vitrim.tokens.attention import masked_softmax

X = images(3)
TARGET = torch.tensor([1, 2, 3])


def sparse_vit(backbone=None, **options):
    options = {"stages": (1, 2), "keep_ratio": 0.6} | options
    if options.get("sampling") == "top_k":
        options.setdefault("score_weight", 1.0)
    model = backbone if backbone is not None else tiny_vit()
    return sparsify(model, DynamicViTConfig(**options), generator=seeded(0)).eval()


def test_counts_follow_the_authors_arithmetic():
    sparse = sparse_vit(tiny_vit(depth=12), stages=None, keep_ratio=0.7)
    method, family = sparse.method, sparse.family
    assert method.stages == (3, 6, 9)
    expected = {0.5: (98, 49, 24), 0.6: (117, 70, 42), 0.7: (137, 96, 67), 0.8: (156, 125, 100)}
    for ratio, counts in (expected | {0.9: (176, 158, 142)}).items():
        method.set_keep_ratio(ratio)
        assert method.counts(family, (14, 14)) == counts
    method.set_keep_ratio((0.5, 0.25, 0.01))
    assert method.counts(family, (4, 4)) == (8, 4, 1)  # never below one


def test_trace_speaks_of_the_original_grid():
    sparse = sparse_vit()
    trace = sparse.trace(X)
    first, second = trace.stages
    assert [stage.block for stage in trace.stages] == [1, 2]
    assert first.counts.tolist() == [9] * 3
    assert second.counts.tolist() == [5] * 3
    assert torch.equal(trace.logits, sparse(X))
    for image in range(3):
        best = first.scores[image].topk(9).indices.sort().values
        assert torch.equal(first.kept[image], best)
        alive = ~second.scores[image].isnan()
        assert torch.equal(alive.nonzero().flatten(), first.kept[image])
        best = second.scores[image].nan_to_num(-1).topk(5).indices.sort().values
        assert torch.equal(second.kept[image], best)
    assert trace.macs.shape == (3,)
    assert (trace.macs < sparse.dense_macs()).all()


def test_images_do_not_see_each_other():
    sparse = sparse_vit()
    alone = torch.cat([sparse(image[None]) for image in X])
    torch.testing.assert_close(sparse(X), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse(X.flip(0)).flip(0), sparse(X), atol=1e-5, rtol=0)


def test_evaluation_is_deterministic_and_training_follows_the_seed():
    sparse = sparse_vit()
    assert torch.equal(sparse(X), sparse(X))
    sparse.train()
    one, same, other = (
        sparse.losses(X, TARGET, generator=seeded(seed))["total"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_masked_training_agrees_with_gathering():
    """With the same tokens kept, the training forward and inference give the same logits."""
    sparse = sparse_vit(sampling="argmax", threshold=0.5)
    for image in X:
        output = sparse.method.train_forward(sparse.family, image[None])
        kept = output.decisions[-1].keep_BN[0] > 0.5
        trace = sparse.trace(image[None])
        assert torch.equal(trace.stages[-1].kept[0], kept.nonzero().flatten())
        torch.testing.assert_close(output.logits, trace.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_nothing_kept_and_everything_kept_are_finite(pool, bias):
    backbone = tiny_vit(global_pool=pool, class_token=pool == "token")
    sparse = sparse_vit(backbone, threshold=0.5).train()
    for predictor in sparse.method.predictors:
        torch.nn.init.constant_(predictor.classify[4].bias[:1], bias)
    parts = sparse.losses(X, TARGET, generator=seeded(0))
    parts["total"].backward()
    assert all(value.isfinite() for value in parts.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in sparse.parameters())
    sparse.eval()
    trace = sparse.trace(X[:1])
    assert trace.logits.isfinite().all()
    nothing = [0, 0] if pool == "token" else [1, 1]
    assert [s.counts.item() for s in trace.stages] == (nothing if bias < 0 else [16, 16])


def test_one_token_kept():
    sparse = sparse_vit(keep_ratio=0.01)
    assert [stage.counts.tolist() for stage in sparse.trace(X).stages] == [[1] * 3, [1] * 3]
    assert sparse(X).isfinite().all()


def test_threshold_mode_counts_depend_on_the_image():
    sparse = sparse_vit(threshold=0.5)
    traces = [sparse.trace(image[None]) for image in images(8, seed=4)]
    counts = {tuple(stage.counts.item() for stage in trace.stages) for trace in traces}
    assert len(counts) > 1
    for trace in traces:
        for stage in trace.stages:
            scores = stage.scores[0].nan_to_num(0)
            assert torch.equal(stage.kept[0], (scores > 0.5).nonzero().flatten())
        assert trace.macs.item() == sparse.method.macs(
            sparse.family, (4, 4), [stage.counts.item() for stage in trace.stages]
        )
    batch = sparse.trace(images(8, seed=4))
    for image, alone in enumerate(traces):
        torch.testing.assert_close(batch.logits[image], alone.logits[0], atol=1e-5, rtol=0)
        for together, single in zip(batch.stages, alone.stages, strict=True):
            assert torch.equal(together.kept[image], single.kept[0])


def test_ratio_changes_at_run_time():
    sparse = sparse_vit()
    before = sparse.macs()
    sparse.set_keep_ratio(0.3)
    assert sparse.macs() < before
    assert sparse.config.keep_ratio == 0.3
    assert [stage.counts[0].item() for stage in sparse.trace(X).stages] == [4, 1]
    sparse.set_keep_ratio((0.9, 0.5))
    assert [stage.counts[0].item() for stage in sparse.trace(X).stages] == [14, 8]
    sparse.set_keep_ratio(np.float32(0.5))
    assert sparse.config.keep_ratio == 0.5
    sparse.set_keep_ratio([0.9, 0.5])
    for wrong in (0.0, 1.2, (0.9,), (0.5, 0.9), "0.5"):
        with pytest.raises(ConfigError, match="keep_ratio"):
            sparse.set_keep_ratio(wrong)
    assert sparse.config.keep_ratio == (0.9, 0.5)


@pytest.mark.parametrize("stages", [(0,), (3,), (1, 2, 3), (0, 1, 2, 3)])
def test_any_number_of_stages(stages):
    sparse = sparse_vit(stages=stages)
    assert len(sparse.trace(X).stages) == len(stages)
    sparse.train().losses(X, TARGET)["total"].backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio is 0.0; expected a number in \(0, 1\]"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"keep_ratio": ()}, "keep_ratio is empty"),
        ({"keep_ratio": (0.5, 0.6)}, "later stage cannot keep more"),
        ({"keep_ratio": (0.5,), "stages": (1, 2)}, "1 numbers for 2 stages"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (3, 1)}, "increasing"),
        ({"stages": (1, 1)}, "increasing"),
        ({"stages": (-1,)}, "start at 0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"temperature": 0.0}, "temperature"),
        ({"ratio_weight": -1.0}, "ratio_weight is -1.0"),
        ({"version": 2}, "version is 2"),
        ({"sampling": "gumbl"}, "sampling is 'gumbl'; use one of 'gumbel'"),
        ({"sampling": "top_k"}, "set score_weight"),
        ({"keep_ratio": "0.7"}, "keep_ratio is '0.7'"),
        ({"stages": (1, 2.5)}, r"stages is \(1, 2.5\)"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        DynamicViTConfig(**options)


def test_configs_that_do_not_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"stage 4 is outside .* blocks are 0 to 3"):
        sparsify(tiny_vit(), DynamicViTConfig(stages=(1, 4)))
    with pytest.raises(ConfigError, match="keep_ratio has 2 numbers for 3 stages"):
        sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=(0.5, 0.4)))
    with pytest.raises(ConfigError, match="dict is not a method config"):
        sparsify(tiny_vit(), {"keep_ratio": 0.7})
    with pytest.raises(ConfigError, match="multiple of 4"):
        sparsify(tiny_vit(embed_dim=30, num_heads=2), DynamicViTConfig(stages=(1,)))


def test_weights_are_shared_and_unwrap_gives_them_back():
    model = tiny_vit()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sparse = sparse_vit(model)
    assert sparse.unwrap() is model
    assert sparse.backbone.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_forward_gives_logits_in_both_modes():
    sparse = sparse_vit()
    assert sparse(X).shape == (3, 10)
    assert sparse.train()(X).shape == (3, 10)
    assert sparse.train()(X).requires_grad


def test_loss_falls_on_a_toy_set():
    sparse = sparse_vit(ratio_weight=1.0).train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=2e-3)
    generator = seeded(1)
    history = []
    for _ in range(30):
        loss = sparse.losses(X, TARGET, generator=generator)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_deep_copies_are_independent():
    sparse = sparse_vit()
    twin = copy.deepcopy(sparse)
    assert twin.family.backbone is twin.backbone
    torch.nn.init.zeros_(twin.backbone.head.weight)
    assert not torch.equal(sparse(X), twin(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    sparse = sparse_vit(tiny_vit().to(dtype))
    assert sparse(X.to(dtype)).dtype == dtype
    sparse.train().losses(X.to(dtype), TARGET, generator=seeded(0))["total"].backward()


def test_compiles_without_graph_breaks():
    sparse = sparse_vit()
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), sparse(X))


def test_exports_with_a_dynamic_batch():
    sparse = sparse_vit()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(sparse, (X,), dynamic_shapes=({0: batch},))
        for count in (2, 5):
            x = images(count, seed=7)
            torch.testing.assert_close(program.module()(x), sparse(x))


def test_hard_keep_is_a_fair_draw_with_straight_through_gradients():
    log_probs = torch.tensor([0.8, 0.2]).log().expand(1, 20_000, 2).clone().requires_grad_()
    keep_BN = hard_keep(log_probs, generator=seeded(0))
    assert set(keep_BN.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert keep_BN.mean().item() == pytest.approx(0.8, abs=0.01)
    keep_BN.sum().backward()
    assert (log_probs.grad[..., 0] > 0).all()
    chosen = hard_keep(log_probs, noise=False)
    assert (chosen.detach().round() == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31), st.floats(0.1, 40))
def test_masked_softmax_properties(size, seed, scale):
    """Rows sum to one, no row is poisoned, and a mask equals leaving the key out."""
    generator = seeded(seed)
    logits = scale * torch.randn(1, 2, size, size, generator=generator)
    keep_BN = (torch.rand(1, size, generator=generator) > 0.5).float()
    weights = masked_softmax(logits, keep_BN)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, size), atol=1e-5, rtol=0)
    visible = keep_BN[0].bool() | torch.eye(size, dtype=torch.bool)
    exact = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, exact, atol=3e-6, rtol=0)


def test_a_dominant_dropped_key_does_not_poison_the_gradient():
    logits = torch.tensor([[[[0.0, 200.0, 1.0]] * 3]], requires_grad=True)
    keep_BN = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    masked_softmax(logits, keep_BN)[..., 0].sum().backward()
    assert logits.grad.isfinite().all()
    assert keep_BN.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_top_k_takes_the_best(batch, size, data):
    count = data.draw(st.integers(1, size))
    score_BN = torch.stack(
        [torch.randperm(size, generator=seeded(i)) for i in range(batch)]
    ).float()
    position = top_k(score_BN, count)
    assert position.shape == (batch, count)
    best = score_BN.sort(1, descending=True).values[:, :count]
    assert torch.equal(score_BN.gather(1, position).sort(1, descending=True).values, best)


def test_config_is_frozen():
    config = DynamicViTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep_ratio = 0.5


def teach(sparse, x):
    family, blocks = sparse.family, sparse.method.stages
    tokens, saliency = family.saliency(x, blocks)
    return DenseOutput(family.head(tokens), family.patch_features(tokens), saliency)


def test_saliency_is_the_first_order_change_of_the_log_odds():
    sparse = sparse_vit(tiny_vit().double(), score_weight=1.0)
    family, x = sparse.family, X.double()
    tokens, (first, second) = family.saliency(x, (1, 2))
    assert first.shape == second.shape == (3, 16)
    assert not tokens.x.requires_grad
    torch.testing.assert_close(tokens.x, family.dense(x).x.detach())

    def log_odds(scale_BN):
        tokens = family.run_block(0, family.stem(x))
        scale = torch.cat([scale_BN.new_ones(3, 1), scale_BN], 1)
        tokens = tokens.with_x(tokens.x * scale.unsqueeze(-1))
        for block in range(1, family.depth):
            tokens = family.run_block(block, tokens)
        probability = family.head(tokens).softmax(-1).gather(1, best)
        return (probability / (1 - probability)).log().sum()

    best = family.head(tokens).argmax(1, keepdim=True)
    slope = torch.autograd.functional.jacobian(log_odds, torch.ones(3, 16, dtype=torch.double))
    torch.testing.assert_close(first.double(), slope.abs(), rtol=1e-5, atol=1e-7)


def test_top_k_training_is_inference():
    """The kept tokens and the logits of a top-k training forward are those of inference."""
    sparse = sparse_vit(sampling="top_k")
    output = sparse.method.train_forward(sparse.family, X)
    trace = sparse.trace(X)
    torch.testing.assert_close(output.logits, trace.logits)
    for decision, stage in zip(output.decisions, trace.stages, strict=True):
        kept = [row.nonzero().flatten() for row in decision.keep_BN > 0.5]
        assert all(map(torch.equal, kept, stage.kept))


@pytest.mark.parametrize("sampling", ["gumbel", "top_k"])
def test_score_loss_teaches_the_predictors_what_matters(sampling):
    options = {"sampling": sampling, "score_weight": 1.0, "keep_ratio": (0.5, 0.25)}
    sparse = sparse_vit(**options).train()
    teacher = teach(sparse, X)
    optimizer = torch.optim.Adam(sparse.method.parameters(), lr=5e-3)
    generator, history = seeded(0), []
    for _ in range(60):
        parts = sparse.losses(X, None, teacher, generator)
        optimizer.zero_grad()
        parts["score"].backward()
        optimizer.step()
        history.append(parts["score"].item())
    assert history[-1] < 0.5 * history[0]
    trace = sparse.eval().trace(X)
    salient = teacher.saliency[0].topk(8).indices.sort(1).values
    hits = sum(
        torch.isin(a, b).sum().item() for a, b in zip(trace.stages[0].kept, salient, strict=True)
    )
    assert hits >= 22  # of 24; a random choice has 12


def test_token_loss_compares_each_kept_token_with_its_own_teacher():
    sparse = sparse_vit(sampling="top_k", keep_ratio=0.5)
    output = sparse.method.train_forward(sparse.family, X)
    features = torch.zeros(3, 16, 32)
    index = output.tokens.index_BN.unsqueeze(-1).expand_as(output.patch_features)
    features = features.scatter(1, index, output.patch_features.detach())
    teacher = DenseOutput(output.logits.detach(), features)
    teacher = dataclasses.replace(teacher, saliency=(torch.rand(3, 16), torch.rand(3, 16)))
    parts = sparse.method.losses(output, None, teacher)
    assert parts["token"].item() == 0
    assert parts["distill"].item() == pytest.approx(0, abs=1e-6)


def test_score_loss_without_a_teacher_says_so():
    sparse = sparse_vit(score_weight=1.0).train()
    with pytest.raises(ConfigError, match="needs a dense teacher's saliency"):
        sparse.losses(X, TARGET)


def test_trace_is_deterministic_in_training_mode_too():
    sparse = sparse_vit(tiny_vit(drop_path_rate=0.5)).train()
    trace = sparse.trace(X)
    assert torch.equal(trace.logits, sparse.trace(X).logits)
    assert all(module.training for module in sparse.modules())
    assert torch.equal(trace.logits, sparse.eval()(X))


def test_threshold_mode_has_no_ratio_to_set():
    with pytest.raises(ConfigError, match="threshold=None to set ratios"):
        sparse_vit(threshold=0.5).set_keep_ratio(0.7)


def test_noise_varies_what_training_chooses_and_nothing_else():
    sparse = sparse_vit(sampling="top_k", score_noise=5.0).train()
    plain = sparse_vit(sampling="top_k").train()

    def kept(model, seed):
        output = model.method.train_forward(model.family, X, seeded(seed))
        return output.decisions[0].keep_BN

    assert torch.equal(kept(sparse, 1), kept(sparse, 1))
    assert not torch.equal(kept(sparse, 1), kept(sparse, 2))
    assert torch.equal(kept(plain, 1), kept(plain, 2))
    assert kept(sparse, 1).sum(1).tolist() == kept(plain, 1).sum(1).tolist()
    assert torch.equal(sparse.eval()(X), plain.eval()(X))
    with pytest.raises(ConfigError, match="score_noise is -1"):
        DynamicViTConfig(score_noise=-1)
