"""AS-ViT's behaviour: score, thresholds, the three modes, budget, dial, guards."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.conftest import images, seeded, tiny_vit
from tests.training import curve, quiet, tiny_recipe, write_images
from vitrim import (
    ASViTConfig,
    CheckpointError,
    ConfigError,
    from_pretrained,
    load_official,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.token_scores import token_score
from vitrim.methods.asvit import straight_through
from vitrim.tokens.attention import masked_softmax
from vitrim.tokens.projections import project
from vitrim.train.engine import train
from vitrim.train.optim import parameter_groups
from vitrim.train.recipe import OptimRecipe, load_recipe

X = images(6)
TARGET = torch.arange(6)
HEADS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "average pool": {"class_token": False, "global_pool": "avg"},
    "attention pool": {"class_token": False, "global_pool": "map"},
}
each_head = pytest.mark.parametrize("head", HEADS)


def sharp_vit(head="class token", **kwargs):
    """A small backbone whose attention differs between tokens."""
    model = tiny_vit(**HEADS[head] | kwargs)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(6)
    return model


def sparse_vit(head="class token", backbone=None, **options):
    options = {"thresholds": 0.055} | options
    model = sharp_vit(head) if backbone is None else backbone
    return sparsify(model, ASViTConfig(**options), generator=seeded(0)).eval()


def in_mode(sparse, mode):
    other = copy.deepcopy(sparse)
    other.method.config = dataclasses.replace(sparse.config, mode=mode)
    return other


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_weighting", [True, False])
@pytest.mark.parametrize("head_weighting", [True, False])
@each_head
def test_score_from_fused_attention_is_that_of_the_full_map(
    head, head_weighting, value_weighting, masked
):
    model = sharp_vit(head)
    family, block = family_of(model), model.blocks[1]
    tokens = family.run_block(0, family.stem(X))
    visible = torch.ones(6, 16 + family.num_prefix)
    if masked:
        keep_BN = (torch.rand(6, 16, generator=seeded(1)) > 0.4).float()
        tokens = tokens.with_keep(keep_BN)
        visible = tokens.keep_all
    q, k, v = (x.transpose(1, 2) for x in project(block.attn, block.norm1(tokens.x)))
    map_BHNN = masked_softmax(q @ k.transpose(-2, -1) * block.attn.scale, visible)
    context = map_BHNN @ v
    rows = map_BHNN[:, :, :1]
    if not family.has_class:  # what tokens receive on average from those that are there
        rows = (map_BHNN * visible[:, None, :, None]).sum(2, keepdim=True)
        rows = rows / visible.sum(1).view(6, 1, 1, 1)
    patch = family.num_prefix
    importance = context[:, :, patch:].square().sum(-1).sqrt()
    share = importance / importance.sum(1, keepdim=True)
    if not head_weighting:
        share = torch.full_like(share, 1 / 2)
    paid = rows[:, :, 0, patch:]
    if value_weighting:
        norms, there = v[:, :, patch:].square().sum(-1).sqrt(), visible[:, None, patch:]
        mean = (norms * there).sum((1, 2)) / (2 * there.sum((1, 2)))
        paid = paid * norms / mean.view(6, 1, 1)
    expected = (share * paid).sum(1)

    def score(record):
        return token_score(record, head_weighting, value_weighting)

    _, found = family.attention_half(1, tokens, score)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("depth", "stages"),
    [(2, (1,)), (3, (1, 2)), (12, (4, 7, 10)), (16, (5, 9, 13)), (20, (6, 11, 16))],
)
def test_stages_and_thresholds_by_default(depth, stages):
    method = sparse_vit(backbone=tiny_vit(depth=depth), thresholds=None).method
    assert method.stages == stages
    start = [0.001 * 196 / 16] * len(stages)
    assert [threshold.item() for threshold in method.thresholds] == pytest.approx(start)


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_the_published_recipe(size):
    recipe = load_recipe(f"asvit-deit-{size}")
    config, optim, augment = recipe.method.build(), recipe.optim, recipe.augment
    assert (config.stages, config.thresholds) == ((4, 7, 10), (0.001, 0.002, 0.003))
    assert (config.budget, config.counting, config.temperature) == (0.65, "authors", 1e-4)
    weights = (config.classification_weight, config.budget_weight, config.distill_weight)
    assert weights == (1.0, 2.0, 0.5)
    assert (optim.lr, optim.lr_batch, optim.backbone_lr_scale) == (2e-5, 512, 1.0)
    assert (optim.min_lr, optim.warmup_epochs, optim.weight_decay) == (2e-6, 0, 1e-6)
    assert (optim.clip_grad, optim.train_embeddings, recipe.run.epochs) == (None, True, 30)
    assert (augment.mixup, augment.cutmix, augment.label_smoothing) == (0.8, 1.0, 0.1)
    assert (augment.random_erase, augment.rand_augment) == (0.25, "rand-m9-mstd0.5-inc1")


def test_adapting_leaves_the_thresholds_alone(tmp_path):
    folder = write_images(tmp_path / "data", per_class=4)
    sparse = sparse_vit(backbone=sharp_vit(num_classes=2))
    sparse.save_pretrained(tmp_path / "calibrated")
    changes = {"model.checkpoint": tmp_path / "calibrated", "data.train": folder}
    changes |= {"data.batch_size": 4, "run.epochs": 1, "run.tensorboard": "false"}
    changes |= {"run.precision": "fp32"}
    recipe = load_recipe("asvit-adapt", [f"{key}={value}" for key, value in changes.items()])
    train(recipe, tmp_path / "run", on_progress=quiet)
    steps = [line for line in curve(tmp_path / "run") if "total" in line]
    assert steps[0]["distill"] == pytest.approx(steps[0]["total"])
    assert "budget" not in steps[0]
    adapted = from_pretrained(tmp_path / "run" / "checkpoint")
    assert [t.item() for t in adapted.method.thresholds] == pytest.approx([0.055, 0.055])
    before, after = sparse.backbone.blocks[3], adapted.backbone.blocks[3]
    assert not torch.equal(before.mlp.fc1.weight, after.mlp.fc1.weight)


def test_adapting_runs_as_inference_does():
    sparse = sparse_vit(learn_thresholds=False).train()
    torch.testing.assert_close(sparse(X), sparse.eval()(X))
    assert not sparse.method.thresholds.requires_grad
    with pytest.raises(ConfigError, match="learns from labels or a teacher"):
        sparse.losses(X)


def test_thresholds_are_a_vector_without_weight_decay():
    sparse = sparse_vit()
    state = {key: value for key, value in sparse.state_dict().items() if key.startswith("method.")}
    assert {key: value.shape for key, value in state.items()} == {"method.thresholds": (2,)}
    for group in parameter_groups(sparse, OptimRecipe(weight_decay=0.1)):
        if group["role"] == "method":
            assert group["weight_decay"] == 0
            assert len(group["params"]) == 1


@each_head
def test_the_modes_agree(head):
    """Packed, masked, and each image by itself: the same tokens, the same logits."""
    sparse = sparse_vit(head, thresholds=(0.05, 0.08))
    trace, masked = sparse.trace(X), in_mode(sparse, "mask").trace(X)
    first, second = (stage.counts for stage in trace.stages)
    assert len(set(first.tolist())) > 1
    assert (second < first).any()
    torch.testing.assert_close(trace.logits, masked.logits, atol=1e-5, rtol=0)
    for stage, other in zip(trace.stages, masked.stages, strict=True):
        assert stage.counts.tolist() == other.counts.tolist()
        assert all(map(torch.equal, stage.kept, other.kept))
        torch.testing.assert_close(stage.scores, other.scores, equal_nan=True, atol=1e-5, rtol=0)
    mean, score_limit = in_mode(sparse, "batch_mean"), {2: 0.05, 3: 0.08}
    for row, image in enumerate(X):
        alone = sparse.trace(image[None])
        torch.testing.assert_close(alone.logits[0], trace.logits[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(mean(image[None])[0], trace.logits[row], atol=1e-5, rtol=0)
        for stage, other in zip(trace.stages, alone.stages, strict=True):
            assert torch.equal(stage.kept[row], other.kept[0])
            score = stage.scores[row].nan_to_num(0)
            assert torch.equal(stage.kept[row], (score > score_limit[stage.block]).nonzero()[:, 0])


def test_batch_mean_gives_every_image_the_mean_count():
    sparse = sparse_vit()
    one_by_one, trace = sparse.trace(X), in_mode(sparse, "batch_mean").trace(X)
    mean = int(one_by_one.stages[0].counts.sum()) // 6
    assert trace.stages[0].counts.tolist() == [mean] * 6
    for kept, score in zip(trace.stages[0].kept, trace.stages[0].scores, strict=True):
        assert torch.equal(kept, score.topk(mean).indices.sort().values)
    assert len(set(trace.stages[1].counts.tolist())) == 1


@each_head
@pytest.mark.parametrize("mode", ["adaptive", "mask"])
def test_training_agrees_with_inference(head, mode):
    sparse = sparse_vit(head, mode=mode)
    output, trace = sparse.method.train_forward(sparse.family, X), sparse.trace(X)
    torch.testing.assert_close(output.logits, trace.logits, atol=1e-5, rtol=0)
    for keep_BN, stage in zip(output.keeps, trace.stages, strict=True):
        assert all(map(torch.equal, [row.nonzero().flatten() for row in keep_BN > 0.5], stage.kept))
    macs_B, dense = output.macs_B, output.dense_macs
    expected = in_mode(sparse, "adaptive").trace(X).macs
    torch.testing.assert_close(macs_B.double(), expected, rtol=1e-6, atol=0)
    assert dense == sparse.dense_macs()


@each_head
@pytest.mark.parametrize("mode", ["adaptive", "batch_mean", "mask"])
def test_macs_are_what_torch_counts(head, mode):
    sparse = sparse_vit(head, mode=mode).requires_grad_(False)
    for image in X[:3]:
        with torch.no_grad(), counting() as counter:
            sparse(image[None])
        macs = sparse.trace(image[None]).macs.item()
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    assert sparse.macs() is None


def one_best(sparse):
    """Thresholds between the best and the second score of the first image, at every stage."""
    for stage in range(len(sparse.method.stages)):
        with torch.no_grad():
            sparse.method.thresholds[stage].fill_(1e-6)
            best, second = sparse.trace(X[:1]).stages[stage].scores.nan_to_num(-1)[0].topk(2).values
            if second < 0:  # the one that is left stays
                second = best * 0.5
            sparse.method.thresholds[stage].fill_((best + second) / 2)
    return sparse


@each_head
@pytest.mark.parametrize("mode", ["adaptive", "batch_mean", "mask"])
def test_nothing_one_and_everything_kept(head, mode):
    pools = "pool" in head
    for options, count in (
        ({"thresholds": 0.999}, int(pools)),
        ({"thresholds": 1e-9}, 16),
        ({}, 1),
    ):
        sparse = sparse_vit(head, mode=mode, **options)
        if not options:
            one_best(sparse)
        trace = sparse.trace(X[:1])
        assert [stage.counts.tolist() for stage in trace.stages] == [[count]] * 2
        assert trace.logits.isfinite().all()
        assert sparse(X).isfinite().all()
        sparse.train()
        parts = sparse.losses(X, TARGET)
        parts["total"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in sparse.parameters())
    dense = sharp_vit(head)
    everything = sparse_vit(head, mode=mode, backbone=dense, thresholds=1e-9)
    torch.testing.assert_close(everything(X), dense(X), atol=1e-5, rtol=0)


def test_a_threshold_is_strict_and_follows_the_number_of_patches():
    backbone = sharp_vit(dynamic_img_size=True)
    sparse = sparse_vit(backbone=backbone)
    assert sparse.method.threshold(0, 16).item() == pytest.approx(0.055)
    assert sparse.method.threshold(0, 64).item() == pytest.approx(0.055 / 4)
    big = images(3, size=64)
    score = sparse.trace(big).stages[0].scores
    assert score.shape == (3, 64)
    kept = sparse.trace(big).stages[0].kept
    for row in range(3):
        assert torch.equal(kept[row], (score[row] > 0.055 / 4).nonzero().flatten())
    with torch.no_grad():  # a score that equals the threshold goes
        sparse.method.thresholds[0].fill_(score[0].max())
    sparse.method.turn(64 / 16)
    assert sparse.trace(big).stages[0].counts[0].item() == 0


def test_a_dropped_token_stays_dropped_unless_asked():
    """Without a floor under it, the second stage would take every token back."""
    sparse = sparse_vit(thresholds=(0.055, 1e-12)).train()
    first, second = sparse.method.train_forward(sparse.family, X).keeps
    torch.testing.assert_close(first, second)
    assert (first < 0.5).any()
    previous = first.detach().round().requires_grad_()
    tokens, score = (
        sparse.family.stem(X).with_keep(previous),
        torch.rand(6, 16, generator=seeded(2)),
    )
    keep_BN = sparse.method._mask(sparse.family, tokens, score, torch.tensor(0.5))
    keep_BN.sum().backward()  # the stage's decision goes through all masks before it
    torch.testing.assert_close(previous.grad, (previous * (score > 0.5)).detach())
    masked = in_mode(sparse, "mask").trace(X).stages[1]
    assert masked.counts.tolist() == sparse.trace(X).stages[1].counts.tolist()
    free = sparse_vit(thresholds=(0.055, 1e-12), monotone=False).train()
    first, second = free.method.train_forward(free.family, X).keeps
    assert (first < 0.5).any()
    assert (second > 0.5).all()


def test_straight_through_gradients_reach_thresholds_and_scores():
    score = torch.tensor([[0.0500, 0.0551, 0.0900]], requires_grad=True)
    threshold = torch.tensor(0.055, requires_grad=True)
    keep_BN = straight_through(score > threshold, score, threshold, 1e-4)
    torch.testing.assert_close(keep_BN.detach(), torch.tensor([[0.0, 1.0, 1.0]]))
    keep_BN.sum().backward()
    sigmoid = torch.sigmoid(torch.tensor(1.0))
    slope = (sigmoid * (1 - sigmoid) / 1e-4).item()
    assert score.grad[0].tolist() == pytest.approx([0, slope, 0], rel=1e-2)
    assert threshold.grad.item() == pytest.approx(-slope, rel=1e-2)


def test_budget_moves_the_thresholds_towards_it():
    """Above the budget the loss raises thresholds, below it lowers them."""
    for budget, sign in ((0.5, -1), (1.0, 1)):
        sparse = sparse_vit(budget=budget, temperature=1e-2).train()
        parts = sparse.losses(X)
        assert parts.keys() == {"budget", "total"}
        output = sparse.method.train_forward(sparse.family, X)
        gap = (output.macs_B.mean() - budget * sparse.dense_macs()).abs().item() / 1e9
        assert parts["budget"].item() == pytest.approx(gap, rel=1e-5)
        assert parts["total"].item() == pytest.approx(2 * gap, rel=1e-5)
        parts["budget"].backward()
        assert sign * sparse.method.thresholds.grad[0] > 0


def test_the_budget_is_met_by_learning():
    sparse = sparse_vit(thresholds=0.03, budget=0.7, budget_weight=1e3, temperature=1e-2).train()
    optimizer = torch.optim.Adam(sparse.method.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sparse.losses(X)["total"].backward()
        optimizer.step()
    share = sparse.eval().trace(X).macs.mean().item() / sparse.dense_macs()
    assert share == pytest.approx(0.7, abs=0.03)


def test_the_step_is_taken_in_float32_under_autocast():
    sparse = sparse_vit().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = sparse.method.train_forward(sparse.family, X)
        total = sparse.method.losses(output, TARGET, None)["total"]
    assert all(keep.dtype == torch.float32 for keep in output.keeps)
    assert output.macs_B.dtype == torch.float32
    assert total.dtype == torch.float32
    assert all(
        set(keep.detach().round(decimals=5).unique().tolist()) <= {0, 1} for keep in output.keeps
    )
    total.backward()
    assert sparse.method.thresholds.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    sparse = sparse_vit(backbone=sharp_vit().to(dtype))
    assert sparse(X.to(dtype)).dtype == dtype
    sparse.train().losses(X.to(dtype), TARGET)["total"].backward()


def test_the_dial_spans_nothing_to_everything_and_is_saved(tmp_path):
    sparse = sparse_vit(thresholds=None)
    dial = sparse.method.dial()
    assert (dial.name, dial.value, dial.logarithmic) == ("threshold_factor", 1.0, True)
    costs = []
    for value in (dial.dearest, 1.0, 3.0, 4.0, 5.0, 6.0, 8.0, dial.cheapest):
        sparse.method.turn(value)
        costs.append(sparse.trace(X).macs.mean().item())
    assert sparse.trace(X).stages[0].counts.tolist() == [0] * 6
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 5
    sparse.method.turn(4.0)
    assert sparse.trace(X).macs.mean().item() == costs[3]
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.threshold_factor == 4.0
    assert torch.equal(loaded(X), sparse(X))
    assert from_pretrained(tmp_path, mode="mask").config.mode == "mask"
    for change in (sparse.set_keep_ratio, sparse.set_density):
        with pytest.raises(ConfigError, match="asvit has no"):
            change(0.5)
    with pytest.raises(ConfigError, match="computes every token"):
        in_mode(sparse, "mask").method.dial()


@pytest.mark.parametrize("head", ["class token", "average pool"])
def test_says_what_it_scores_by(head):
    weighted, plain = sparse_vit(head), sparse_vit(head, head_weighting=False)
    source = "class attention" if head == "class token" else "mean received attention"
    assert plain.method.score_name == source
    assert weighted.method.score_name == f"{source}, heads weighted by context norm"
    assert not torch.equal(weighted.trace(X).stages[0].scores, plain.trace(X).stages[0].scores)


def test_the_mask_mode_compiles_and_exports():
    backbone = sharp_vit(depth=3)
    sparse = sparse_vit(backbone=backbone, stages=(1, 2), mode="mask").requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), sparse(X))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(sparse, (X,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(X[:2]), sparse(X[:2]))


def test_trains_from_a_recipe_with_a_teacher(tmp_path):
    folder = write_images(tmp_path / "data", per_class=4)
    method = {"name": "asvit", "thresholds": 0.058, "budget": 0.6, "budget_weight": 100.0}
    recipe = tiny_recipe(folder, run__epochs=1)
    recipe = dataclasses.replace(
        recipe, method=dataclasses.replace(recipe.method, name=method.pop("name"), config=method)
    )
    train(recipe, tmp_path / "run", on_progress=quiet)
    steps = [line for line in curve(tmp_path / "run") if "total" in line]
    assert len(steps) == 2
    assert {"budget", "classification", "distill"} <= steps[0].keys()
    sparse = from_pretrained(tmp_path / "run" / "checkpoint")
    assert all(threshold.item() != pytest.approx(0.058) for threshold in sparse.method.thresholds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget is 0.0; expected a share in \(0, 1\]"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (0, 2)}, "stage 0 has no block before it"),
        ({"stages": (2, 1)}, "increasing"),
        ({"stages": (1, 2), "thresholds": (0.1,)}, "thresholds has 1 numbers for 2 stages"),
        ({"thresholds": ()}, "thresholds is empty"),
        ({"thresholds": 0.0}, "thresholds holds 0.0"),
        ({"thresholds": (0.1, 1.0)}, "thresholds holds 1.0"),
        ({"threshold_factor": 0.0}, "threshold_factor is 0.0"),
        ({"threshold_factor": float("inf")}, "threshold_factor is inf"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0"),
        ({"mode": "packed"}, "mode is 'packed'; use one of 'adaptive'"),
        ({"counting": "theirs"}, "counting is 'theirs'"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        ASViTConfig(**options)


def test_configs_that_do_not_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"stage 4 is outside .* blocks are 0 to 3"):
        sparsify(tiny_vit(), ASViTConfig(stages=(1, 4)))
    with pytest.raises(ConfigError, match="has one block"):
        sparsify(tiny_vit(depth=1), ASViTConfig())
    with pytest.raises(ConfigError, match="3 numbers for 2 stages"):
        sparsify(tiny_vit(), ASViTConfig(thresholds=(0.1, 0.1, 0.1)))


def test_foreign_files_that_do_not_fit():
    weights = tiny_vit("deit_tiny_patch16_224").state_dict()
    with pytest.raises(CheckpointError, match="no AS-ViT state dict"):
        load_official(weights, "asvit")
    weights["score_predictor.0.keep_threshold"] = torch.tensor(0.02)
    with pytest.raises(CheckpointError, match=r"1 thresholds, the config 2 stages; pass stages"):
        load_official(weights, "asvit")
    model = load_official(weights, "asvit", stages=(2,))
    assert model.method.threshold(0, 16).item() == pytest.approx(0.02)
    assert model.origin == "converted from a checkpoint of the authors' AS-ViT code"
