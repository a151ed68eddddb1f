"""Parity with the authors' AS-ViT code: their numbers on fixed weights (see golden/README)."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Attention

from tests.conftest import golden, golden_input, golden_weights, seeded
from tests.golden_checks import assert_feature, assert_gradients, features_of, gradients_of
from vitrim import ASViTConfig, load_official, sparsify
from vitrim.layers.token_scores import token_score
from vitrim.methods.asvit import straight_through
from vitrim.methods.records import DenseOutput
from vitrim.tokens.attention import recorded_attention


def official(case, **options):
    """The case's model; the blocks stand in the authors' arguments, not in their files."""
    stages = tuple(case["official"]["kwargs"]["pruning_loc"])
    return load_official(golden_weights(case), "asvit", stages=stages, **options)


def scoring(model):
    """The blocks that score: the authors' drop nothing yet, the next one does."""
    return {f"blocks.{stage - 1}" for stage in model.method.stages}


def authors_macs(model, counts):
    """What the authors' evaluation executes: the MLP before a stage still sees every token."""
    family, total = model.family, model.family.stem_macs(196) + model.family.head_macs(0)
    for block in range(family.depth):
        stage = sum(block >= first for first in model.method.stages)
        total += family.block_macs(block, ([196, *counts][stage]) + 1)
    return total


@pytest.mark.parametrize("mode", ["adaptive", "batch_mean", "mask"])
def test_evaluation_of_single_images(mode):
    case = golden("asvit_deit-s_eval_b1_adaptive")
    model = official(case, mode=mode)
    outputs, tolerance = case["outputs"], case["tolerance"]
    features = features_of(model, outputs["features_per_image"][0])
    x = golden_input(case)
    for row, image in enumerate(case["input"]["images"]):
        trace = model.trace(x[image : image + 1])
        expected = torch.tensor(outputs["logits"][row : row + 1])
        torch.testing.assert_close(trace.logits, expected, atol=tolerance["logits_atol"], rtol=0)
        statistics = outputs["score_stats_per_image"][row]
        expected_kept = [images[row] for images in outputs["kept_indices"]]
        assert [stage.kept[0].tolist() for stage in trace.stages] == expected_kept
        for stage, score in zip(trace.stages, statistics, strict=True):
            alive = stage.scores[~stage.scores.isnan()]
            assert alive.min().item() == pytest.approx(score["min"], rel=1e-4)
            assert alive.max().item() == pytest.approx(score["max"], rel=1e-4)
            assert alive.sum().item() == pytest.approx(score["sum"], rel=1e-4)
        if mode == "adaptive":
            for name, feature in outputs["features_per_image"][row].items():
                if name not in scoring(model):
                    assert_feature(features[name], feature, tolerance)
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    macs = authors_macs(model, [counts[0] for counts in outputs["kept_counts"]])
    assert macs == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)


def test_evaluation_of_a_batch_as_one():
    """In the adaptive mode a batch gives what its images give one by one."""
    case = golden("asvit_deit-s_eval_b1_adaptive")
    chosen, outputs = case["input"]["images"], case["outputs"]
    trace = official(case).trace(golden_input(case)[chosen])
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(
        trace.logits, expected, atol=case["tolerance"]["logits_atol"], rtol=0
    )
    for stage, kept in zip(trace.stages, outputs["kept_indices"], strict=True):
        assert [places.tolist() for places in stage.kept] == kept


def test_evaluation_with_the_mean_count_of_the_batch():
    case = golden("asvit_deit-s_eval_b4_batchmean")
    model = official(case, mode="batch_mean")
    outputs, tolerance = case["outputs"], case["tolerance"]
    features = features_of(model, outputs["features"])
    trace = model.trace(golden_input(case))
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(trace.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    for stage, kept in zip(trace.stages, outputs["kept_indices"], strict=True):
        assert [places.tolist() for places in stage.kept] == kept
    others = features.keys() - scoring(model)
    assert {"patch_embed", "blocks.4", "blocks.7", "blocks.11", "norm"} <= others
    for name in others:
        assert_feature(features[name], outputs["features"][name], tolerance)


def test_training():
    case = golden("asvit_deit-s_train")
    recipe, tolerance, outputs = case["train"], case["tolerance"], case["outputs"]
    budget = recipe["loss_kwargs"]["keep_ratio"]
    model = official(case, counting="authors", monotone=False, budget=budget).train()
    seeds = recipe["teacher"]
    logits = torch.randn(seeds["logits_shape"], generator=seeded(seeds["logits_seed"]))
    noise = torch.randn(seeds["logits_shape"], generator=seeded(seeds["targets_seed"]))
    x = golden_input(case)
    output = model.method.train_forward(model.family, x)
    found = model.method.losses(output, (2 * noise).softmax(-1), DenseOutput(logits, logits))
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    for keep_BN, kept in zip(output.keeps, outputs["kept_indices"], strict=True):
        assert [row.nonzero().flatten().tolist() for row in keep_BN > 0.5] == kept
    assert output.dense_macs / 1e9 == pytest.approx(recipe["teacher_cal_flops"], rel=1e-7)
    gmacs = (output.macs_B / 1e9).tolist()
    assert gmacs == pytest.approx(outputs["student_gflops_per_image"], rel=1e-6)
    loss = outputs["loss"]
    pairs = {
        "total": loss["total"],
        "classification": loss["cls_ce"],
        "budget": loss["budget_l1"],
        "distill": loss["cls_kl"],
    }
    assert found.keys() == pairs.keys()
    for term, value in pairs.items():
        assert found[term].item() == pytest.approx(value, rel=tolerance["loss_rtol"])

    gradients = gradients_of(model, official_name)
    assert_gradients(gradients, outputs, tolerance)

    with torch.no_grad():  # a mask that cannot return changes nothing here, as nothing returns
        model.method.config = official(case).config
        monotone = model.method.train_forward(model.family, x)
    torch.testing.assert_close(monotone.logits, output.logits.detach(), atol=1e-5, rtol=0)


def official_name(name):
    return name.removeprefix("backbone.")


@pytest.mark.parametrize("policy", [False, True])
def test_score(policy):
    case = golden("unit_asvit_attention_score")
    attention = Attention(16, num_heads=2, qkv_bias=True).eval()
    attention.load_state_dict(golden_weights(case))
    keep_BN = torch.tensor(case["inputs"]["policy"])[..., 0] if policy else None
    x = torch.tensor(case["inputs"]["x"])
    suffix = "_masked" if policy else ""
    out, record = recorded_attention(attention, x, 1, True, keep_BN)
    tolerance = {key: case["tolerance"][key] for key in ("atol", "rtol")}
    torch.testing.assert_close(out, torch.tensor(case["outputs"][f"y{suffix}"]), **tolerance)
    expected = torch.tensor(case["outputs"][f"score{suffix}"])
    torch.testing.assert_close(token_score(record), expected, **tolerance)


def test_straight_through_threshold():
    case = golden("unit_asvit_threshold_ste")
    score = torch.tensor(case["inputs"]["score"], requires_grad=True)
    threshold = torch.tensor(case["official"]["kwargs"]["threshold_init"], requires_grad=True)
    keep_BN = straight_through(score > threshold, score, threshold, case["inputs"]["tau"])
    outputs, rtol = case["outputs"], case["tolerance"]["rtol"]
    torch.testing.assert_close(keep_BN, torch.tensor(outputs["mask"]), atol=1e-6, rtol=0)
    (keep_BN * torch.arange(1, 13).reshape(2, 6) / 10).sum().backward()
    assert threshold.grad.item() == pytest.approx(outputs["grad_threshold"], rel=rtol)
    expected = torch.tensor(outputs["grad_score"])
    torch.testing.assert_close(score.grad, expected, atol=0, rtol=rtol)


FLOPS = golden("unit_asvit_flops")["outputs"]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_budget_counting(size):
    """The authors' hand count; and the exact one, which is torch's (see test_asvit)."""
    expected = FLOPS[f"deit-{size}"]
    with torch.device("meta"):
        backbone = timm.create_model(f"deit_{size}_patch16_224")
    model = sparsify(backbone, ASViTConfig(counting="authors"))
    family, method = model.family, model.method
    counts = [
        torch.tensor([137.0, 196.0]),
        torch.tensor([97.0, 196.0]),
        torch.tensor([58.0, 196.0]),
    ]
    macs_B, dense = method.budget_macs(family, 196, counts)
    assert dense / 1e9 == pytest.approx(expected["teacher_cal_flops"], rel=1e-6)
    assert family.stem_macs(196) / 1e9 == pytest.approx(expected["patch_embed_flops"], rel=1e-6)
    for count, gmacs in expected["block_flops"].items():
        assert family.block_macs(0, int(count)) / 1e9 == pytest.approx(gmacs, rel=1e-6)
    everything = expected["patch_embed_flops"] + 12 * expected["block_flops"]["197"]
    assert macs_B[1].item() / 1e9 == pytest.approx(everything, rel=1e-6)

    exact = sparsify(backbone, ASViTConfig(counting="exact", exact_last_block=False))
    exact_B, exact_dense = exact.method.budget_macs(family, 196, counts)
    assert exact_dense == exact.dense_macs()
    width, head = family.embed_dim, family.head_macs(0)
    scores = [width * (count + 1) for count in (196, 137, 97)]
    mlps = 8 * width**2 * (196 - 58)
    assert exact_B[0].item() == pytest.approx(
        macs_B[0].item() + head + sum(scores) - mlps, rel=1e-6
    )
