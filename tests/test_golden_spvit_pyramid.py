"""Parity with the authors' SPViT code on PiT: their numbers on fixed weights."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import golden, golden_input, golden_weights
from tests.golden_checks import assert_feature, assert_gradients, taught
from vitrim import CheckpointError, SPViTPyramidConfig, load_official
from vitrim.families import PiT


def features_of(model, monkeypatch):
    """What the backbone's parts return, by the authors' names, once the model runs."""
    kept, enter_stage, run = {}, PiT.enter_stage, type(model.method)._run_tokens

    def entered(self, stage, tokens):
        out = enter_stage(self, stage, tokens)
        kept["patch_embed" if stage == 0 else f"pools.{stage - 1}"] = self.as_map(stage, out)
        return out

    def ran(self, family, stage, *rest):
        out = run(self, family, stage, *rest)
        kept[f"transformers.{stage}"] = family.as_map(stage, out)
        return out

    monkeypatch.setattr(PiT, "enter_stage", entered)
    monkeypatch.setattr(type(model.method), "_run_tokens", ran)
    model.backbone.norm.register_forward_hook(lambda _m, _i, out: kept.__setitem__("norm", out))
    model.backbone.patch_embed.register_forward_hook(
        lambda _m, _i, out: kept.__setitem__("embedded", out)
    )
    return kept


def assert_features(found, case):
    for module, feature in case["outputs"]["features"].items():
        value = found["embedded" if module == "patch_embed" else module]
        assert_feature(value, feature, case["tolerance"])


def test_evaluation(monkeypatch):
    case = golden("spvit_pit-s_eval")
    model = load_official(golden_weights(case), "spvit")
    assert model.config == SPViTPyramidConfig.official()
    assert model.method.stages == (1, 5, 10)
    outputs, allowed = case["outputs"], case["tolerance"]
    features = features_of(model, monkeypatch)
    trace = model.trace(golden_input(case))
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(trace.logits, expected, atol=allowed["logits_atol"], rtol=0)
    for stage, kept in zip(trace.stages, outputs["kept_indices"], strict=True):
        assert [places.tolist() for places in stage.kept] == kept
    assert [stage.grid for stage in trace.stages] == [(27, 27), (14, 14), (7, 7)]
    assert_features(features, case)
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    # They score the package token too, to no effect, and widen it after the last stage's end.
    macs = trace.macs[0].item()
    assert macs == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-4)


def test_what_is_carried_decides_the_same_at_first():
    """Ours differs from theirs from the first pooling on: there the dropped tokens stood still."""
    case = golden("spvit_pit-s_eval")
    model = load_official(golden_weights(case), "spvit", dropped="carry", execution="gather")
    trace = model.trace(golden_input(case))
    first, second, _ = trace.stages
    assert [places.tolist() for places in first.kept] == case["outputs"]["kept_indices"][0]
    assert [places.tolist() for places in second.kept] != case["outputs"]["kept_indices"][1]
    assert trace.macs.max() < 0.8 * case["model_stats"]["gmacs_eval_batch1"] * 1e9


def test_training(monkeypatch):
    case = golden("spvit_pit-s_train")
    model = load_official(golden_weights(case), "spvit", sampling="argmax").train()
    outputs, allowed = case["outputs"], case["tolerance"]
    features = features_of(model, monkeypatch)
    output = model.method.train_forward(model.family, golden_input(case))
    found = model.method.losses(output, *taught(case))
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=allowed["logits_atol"], rtol=0)
    assert_feature(output.patch_features, outputs["tokens"], allowed)
    assert_features(features, case)
    for keep_BN, kept in zip(output.keeps, outputs["kept_indices"], strict=True):
        assert [row.nonzero().flatten().tolist() for row in keep_BN > 0.5] == kept
    loss = outputs["loss"]
    pairs = {
        "total": loss["total"],
        "classification": loss["cls_ce"],
        "ratio": loss["ratio_sum_over_stages"] / 3,
        "distill": loss["cls_kl"],
        "token": loss["token"],
    }
    for term, value in pairs.items():
        assert found[term].item() == pytest.approx(value, rel=allowed["loss_rtol"])

    gradients = {official_name(name): p.grad for name, p in model.named_parameters()}
    assert_gradients(gradients, outputs, allowed)


def official_name(name):
    name = name.removeprefix("backbone.")
    name = re.sub(r"method\.selectors\.(\d)", r"transformers.\1.score_predictor.0", name)
    name = re.sub(r"transformers\.(\d)\.pool", lambda m: f"pools.{int(m[1]) - 1}", name)
    name = name.replace(".head_attention.", ".senet.")
    return name.replace(".embed.", ".in_conv.").replace(".classify.", ".out_conv.")


def test_files_that_do_not_fit():
    weights = golden_weights(golden("spvit_pit-s_eval"))
    two = {key: value for key, value in weights.items() if "0.score_predictor" not in key}
    with pytest.raises(CheckpointError, match=r"2 selectors, the config 3 stages; pass stages"):
        load_official(two, "spvit")
    model = load_official(two, "spvit", stages=(5, 10), keep_ratio=(0.5, 0.3))
    assert model.method.stages == (5, 10)
    none = {key: value for key, value in weights.items() if "score_predictor" not in key}
    with pytest.raises(CheckpointError, match="no SPViT state dict"):
        load_official(none, "spvit")
    bare = {key: value for key, value in weights.items() if key != "pos_embed"}
    with pytest.raises(CheckpointError, match="another model's state dict: missing pos_embed"):
        load_official(bare, "spvit")
    key = "transformers.1.score_predictor.0.out_conv.2.0.weight"
    with pytest.raises(CheckpointError, match="pass share_heads=False"):
        load_official(weights | {key: weights[key] + 1}, "spvit")
