"""Parity with the authors' code on LV-ViT: their numbers on fixed weights (see golden/README)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from tests import test_golden_asvit, test_golden_dynamicvit, test_golden_spvit
from tests.conftest import golden, golden_input, golden_weights
from tests.golden_checks import assert_feature, assert_gradients, gradients_of, taught
from vitrim import ASViTConfig, load_official, sparsify
from vitrim.convert import load_dense


def features_of(model):
    """What the backbone's parts return, by the authors' names, once the model runs."""
    kept, blocks = {}, range(len(model.backbone.blocks))
    for name in ("patch_embed", "norm", *(f"blocks.{block}" for block in blocks)):
        module = model.backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
    return kept


def assert_features(found, expected, tolerance):
    for name, feature in expected.items():
        value = found[name]
        if name == "patch_embed":  # theirs is a map, channels first
            value = value.transpose(1, 2).reshape(feature["shape"])
        assert_feature(value, feature, tolerance)


def assert_kept(trace, expected):
    for stage, kept in zip(trace.stages, expected, strict=True):
        assert [places.tolist() for places in stage.kept] == kept


def assert_training(case, model, official_name):
    """The golden numbers of a training step, terms of the loss by our names excepted."""
    outputs, tolerance = case["outputs"], case["tolerance"]
    features = features_of(model)
    output = model.method.train_forward(model.family, golden_input(case))
    found = model.method.losses(output, *taught(case))
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    assert_feature(output.patch_features, outputs["tokens"], tolerance)
    assert_features(features, outputs["features"], tolerance)
    gradients = gradients_of(model, official_name)
    assert_gradients(gradients, outputs, tolerance)
    return output, found


def assert_terms(found, expected, rtol):
    assert found.keys() == expected.keys()
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value, rel=rtol), term


def test_dynamicvit_evaluation():
    case = golden("dynamicvit_lvvit-s_r0.7_eval")
    model = load_official(golden_weights(case), "dynamicvit", keep_ratio=0.7)
    outputs, tolerance = case["outputs"], case["tolerance"]
    features = test_golden_dynamicvit.features_of(model, outputs["features"])
    assert model.method.stages == tuple(case["official"]["kwargs"]["pruning_loc"])
    trace = model.trace(golden_input(case))
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(trace.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    assert_kept(trace, outputs["kept_indices"])
    assert_features(features, outputs["features"], tolerance)
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    assert trace.macs[0].item() == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)


def test_spvit_evaluation(monkeypatch):
    """Theirs masks, and lets the dropped tokens, which it computes, into the largest logit; ours
    does not, so that masking and removing tokens are the same.
    """
    case = golden("spvit_lvvit-s_eval")
    outputs, tolerance, x = case["outputs"], case["tolerance"], golden_input(case)
    model = load_official(golden_weights(case), "spvit", execution="mask")
    features, head, last = features_of(model), model.family.head, []
    monkeypatch.setattr(model.family, "head", lambda tokens: (last.append(tokens), head(tokens))[1])
    masked = model.trace(x)
    assert_kept(masked, outputs["kept_indices"])
    assert_features(features, outputs["features"], tolerance)
    assert sum(p.numel() for p in model.parameters()) == case["model_stats"]["params"]
    allowed = {"atol": tolerance["logits_atol"], "rtol": 0}
    with torch.no_grad():
        theirs = head(replace(last[0], keep_BN=None))
    torch.testing.assert_close(theirs, torch.tensor(outputs["logits"]), **allowed)

    gathered = load_official(golden_weights(case), "spvit").trace(x)
    assert_kept(gathered, outputs["kept_indices"])
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    assert (gathered.logits - theirs).abs().max() > 10 * allowed["atol"]


def test_spvit_training():
    case = golden("spvit_lvvit-s_train")
    model = load_official(golden_weights(case), "spvit", sampling="argmax").train()
    official_name = test_golden_spvit.official_name
    output, found = assert_training(case, model, official_name)
    for decision, kept in zip(output.decisions, case["outputs"]["kept_indices"], strict=True):
        assert [row.nonzero().flatten().tolist() for row in decision.keep_BN > 0.5] == kept
    loss = case["outputs"]["loss"]
    expected = {
        "ratio": loss["ratio_sum_over_stages"] / 3,
        "classification": loss["cls_ce"],
        "distill": loss["cls_kl"],
        "token": loss["token"],
        "total": loss["total"],
    }
    assert_terms(found, expected, case["tolerance"]["loss_rtol"])


@pytest.mark.parametrize("mode", ["adaptive", "batch_mean", "mask"])
def test_asvit_evaluation_of_single_images(mode):
    case = golden("asvit_lvvit-s_eval_b1_adaptive")
    model = load_official(golden_weights(case), "asvit", mode=mode)
    assert model.method.stages == tuple(case["official"]["kwargs"]["pruning_loc"])
    outputs, tolerance, x = case["outputs"], case["tolerance"], golden_input(case)
    features = features_of(model)
    for row, image in enumerate(case["input"]["images"]):
        trace = model.trace(x[image : image + 1])
        expected = torch.tensor(outputs["logits"][row : row + 1])
        torch.testing.assert_close(trace.logits, expected, atol=tolerance["logits_atol"], rtol=0)
        assert_kept(trace, [[images[row]] for images in outputs["kept_indices"]])
        for stage, score in zip(trace.stages, outputs["score_stats_per_image"][row], strict=True):
            alive = stage.scores[~stage.scores.isnan()]
            assert alive.sum().item() == pytest.approx(score["sum"], rel=1e-4)
        if mode == "adaptive":
            before = {f"blocks.{stage - 1}" for stage in model.method.stages}  # dropped mid-block
            shown = outputs["features_per_image"][row]
            comparable = {name: shown[name] for name in shown if name not in before}
            assert {"patch_embed", "blocks.5", "norm"} <= comparable.keys()
            assert_features(features, comparable, tolerance)
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    if mode == "adaptive":
        counts = [images[0] for images in outputs["kept_counts"]]
        macs = test_golden_asvit.authors_macs(model, counts)
        family = model.family
        macs += family.head_macs(counts[-1] + 1) - family.head_macs(0)
        assert macs == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)


def test_asvit_training():
    case = golden("asvit_lvvit-s_train")
    budget = case["train"]["loss_kwargs"]["keep_ratio"]
    options = {"counting": "elementwise", "monotone": False, "budget": budget}
    model = load_official(golden_weights(case), "asvit", **options).train()
    official_name = test_golden_asvit.official_name
    output, found = assert_training(case, model, official_name)
    for keep_BN, kept in zip(output.keeps, case["outputs"]["kept_indices"], strict=True):
        assert [row.nonzero().flatten().tolist() for row in keep_BN > 0.5] == kept
    gmacs = (output.macs_B / 1e9).tolist()
    assert gmacs == pytest.approx(case["outputs"]["student_gflops_per_image"], rel=1e-6)
    assert output.dense_macs / 1e9 == pytest.approx(case["train"]["teacher_cal_flops"], rel=1e-7)
    loss = case["outputs"]["loss"]
    expected = {
        "budget": loss["budget_l1"],
        "classification": loss["cls_ce"],
        "distill": loss["cls_kl"],
        "token": loss["token"],
        "total": loss["total"],
    }
    assert_terms(found, expected, case["tolerance"]["loss_rtol"])


FLOPS = golden("unit_asvit_flops")["outputs"]


@pytest.mark.parametrize("size", ["s", "m"])
def test_budget_counting_with_elementwise_operations(size):
    expected = FLOPS[f"lvvit-{size}"]
    with torch.device("meta"):
        backbone = timm.create_model(f"lvvit_{size}")
    model = sparsify(backbone, ASViTConfig(counting="elementwise"))
    counts = [torch.tensor([float(count)]) for count in (149, 100, 49)]
    macs_B, dense = model.method.budget_macs(model.family, 196, counts)
    assert dense / 1e9 == pytest.approx(expected["teacher_cal_flops"], rel=1e-6)
    stem = expected["patch_embed_flops"]
    assert model.family.stem_macs(196) / 1e9 == pytest.approx(stem, rel=1e-6)
    first, second, third = model.method.stages
    depth, block = model.family.depth, expected["block_flops"]
    spans = {"197": first, "150": second - first, "101": third - second, "50": depth - third}
    sparse = stem + sum(span * block[count] for count, span in spans.items())
    assert macs_B.item() / 1e9 == pytest.approx(sparse, rel=1e-6)


def test_dense_weights():
    """The keys of a dense file are those of a sparse one without the predictors."""
    case = golden("dynamicvit_lvvit-s_r0.7_eval")
    every = golden_weights(case)
    weights = {key: value for key, value in every.items() if "score_predictor" not in key}
    dense = load_dense({"state_dict": {f"module.{key}": weights[key] for key in weights}})
    assert dense.pretrained_cfg["architecture"] == "lvvit_s"
    sparse = load_official(every, "dynamicvit", keep_ratio=1.0)
    x = golden_input(case)[:1]
    with torch.no_grad():
        assert torch.equal(dense(x), sparse(x))
