"""Parity with the authors' DynamicViT code: their numbers on fixed weights (see golden/README)."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import golden, golden_input, golden_weights
from tests.golden_checks import assert_feature, assert_gradients, features_of, taught
from vitrim import load_official
from vitrim.layers.predictor import Predictor
from vitrim.tokens.attention import masked_softmax
from vitrim.tokens.plain import Tokens


@pytest.mark.parametrize("name", ["dynamicvit_deit-s_r0.7_eval", "dynamicvit_deit-256_r0.5_eval"])
def test_evaluation(name):
    case = golden(name)
    ratio = case["official"]["kwargs"]["token_ratio"][0]
    model = load_official(golden_weights(case), "dynamicvit", keep_ratio=ratio)
    outputs, tolerance = case["outputs"], case["tolerance"]
    features = features_of(model, outputs["features"])
    trace = model.trace(golden_input(case))
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(trace.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    for stage, kept in zip(trace.stages, outputs["kept_indices"], strict=True):
        assert [places.tolist() for places in stage.kept] == kept
    for module, feature in outputs["features"].items():
        assert_feature(features[module], feature, tolerance)
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    assert trace.macs[0].item() == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)


def test_training():
    case = golden("dynamicvit_deit-s_r0.7_train")
    model = load_official(golden_weights(case), "dynamicvit", keep_ratio=0.7, sampling="argmax")
    model.train()
    outputs, tolerance = case["outputs"], case["tolerance"]
    output = model.method.train_forward(model.family, golden_input(case))
    found = model.method.losses(output, *taught(case))
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    assert_feature(output.patch_features, outputs["tokens"], tolerance)
    for decision, kept in zip(output.decisions, outputs["kept_indices"], strict=True):
        assert [row.nonzero().flatten().tolist() for row in decision.keep_BN > 0.5] == kept
    loss = outputs["loss"]
    pairs = {
        "total": loss["total"],
        "classification": loss["cls_ce"],
        "ratio": loss["ratio_sum_over_stages"] / 3,
        "distill": loss["cls_kl"],
        "token": loss["token"],
    }
    for term, value in pairs.items():
        assert found[term].item() == pytest.approx(value, rel=tolerance["loss_rtol"])

    gradients = {official_name(name): p.grad for name, p in model.named_parameters()}
    assert_gradients(gradients, outputs, tolerance)


def official_name(name):
    name = name.removeprefix("backbone.").replace("method.predictors.", "score_predictor.")
    if name.startswith("score_predictor."):
        name = name.replace(".embed.", ".in_conv.").replace(".classify.", ".out_conv.")
    return name


def test_predictor():
    case = golden("unit_dynamicvit_predictor")
    predictor = Predictor(case["official"]["kwargs"]["embed_dim"])
    predictor.load_state_dict(
        {
            key.replace("in_conv", "embed").replace("out_conv", "classify"): value
            for key, value in golden_weights(case).items()
        }
    )
    keep_BN = torch.tensor(case["inputs"]["policy"])[..., 0]
    tokens = Tokens.of(torch.tensor(case["inputs"]["x"]), num_prefix=0)
    found = predictor(tokens.with_keep(keep_BN))
    torch.testing.assert_close(found, torch.tensor(case["outputs"]["log_probs"]), **tolerance(case))


def official_masked_softmax(logits, keep_BN, eps):
    """The released formula, for the cases where ours departs from it on purpose."""
    visible = keep_BN[:, None, None, :].expand_as(logits).clone()
    visible.diagonal(dim1=-2, dim2=-1).fill_(1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * visible
    return (weights + eps / logits.shape[-1]) / (weights.sum(-1, keepdim=True) + eps)


SOFTMAX_CASES = {case["name"]: case for case in golden("unit_masked_softmax")["cases"]}


@pytest.mark.parametrize("name", SOFTMAX_CASES)
def test_masked_softmax(name):
    case = SOFTMAX_CASES[name]
    logits, keep_BN = torch.tensor(case["logits"]), torch.tensor(case["policy"])
    expected, eps = torch.tensor(case["output"]), case["eps"]
    torch.testing.assert_close(
        official_masked_softmax(logits, keep_BN, eps), expected, atol=1e-6, rtol=1e-5
    )
    found = masked_softmax(logits, keep_BN, eps)
    hidden = keep_BN[:, None, None, :].expand_as(logits) < 0.5
    hidden = hidden & ~torch.eye(logits.shape[-1], dtype=torch.bool)
    peak = logits.masked_fill(hidden, -torch.inf).amax(-1)
    lead = (logits.amax(-1) - peak).exp()  # how far a dropped key beats every visible one
    # Where none does, the released numbers; where one does, theirs is off by eps times the lead.
    bound = 1e-6 + 2 * eps * (lead - 1)
    assert ((found - expected).abs().amax(-1) <= bound + 1e-5 * expected.amax(-1)).all()
    exact = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    assert (found - exact).abs().max() <= 2e-6


def tolerance(case):
    return {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}
