"""Parity with the authors' SPViT code: their numbers on fixed weights (see golden/README)."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import golden, golden_input, golden_weights, watch_blocks
from tests.golden_checks import assert_feature, assert_gradients, taught
from tests.test_golden_dynamicvit import tolerance
from vitrim import CheckpointError, SPViTConfig, load_official
from vitrim.layers.selector import Selector
from vitrim.tokens.plain import Tokens


def features_of(model, monkeypatch):
    """What the backbone's parts return, by the authors' names, once the model runs."""
    kept = {}
    watch_blocks(model, monkeypatch, lambda i, _, after: kept.update({f"blocks.{i}": after.x}))
    for name in ("patch_embed", "norm"):
        module = model.backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
    return kept


@pytest.mark.parametrize("execution", ["gather", "mask"])
@pytest.mark.parametrize("name", ["spvit_deit-t_eval", "spvit_deit-s_eval"])
def test_evaluation(name, execution, monkeypatch):
    case = golden(name)
    model = load_official(golden_weights(case), "spvit", execution=execution)
    assert model.config == SPViTConfig.official(execution=execution)
    outputs, allowed = case["outputs"], case["tolerance"]
    features = features_of(model, monkeypatch)
    trace = model.trace(golden_input(case))
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(trace.logits, expected, atol=allowed["logits_atol"], rtol=0)
    for stage, kept in zip(trace.stages, outputs["kept_indices"], strict=True):
        assert [places.tolist() for places in stage.kept] == kept
    stats = case["model_stats"]
    assert sum(p.numel() for p in model.parameters()) == stats["params"]
    if execution == "mask":  # theirs, so that every feature can be compared
        for module, feature in outputs["features"].items():
            assert_feature(features[module], feature, allowed)
        # They score the package tokens too, 3 of them over the stages, to no effect.
        dim, heads = model.family.embed_dim, model.backbone.blocks[0].attn.num_heads
        width = dim // heads
        unused = heads * (width * width // 2 + width * width // 8 + width // 2)
        unused += 2 * heads * (heads // 2)
        expected_macs = stats["gmacs_eval_batch1"] * 1e9 - 3 * unused
        assert trace.macs[0].item() == pytest.approx(expected_macs, rel=1e-8)


@pytest.mark.parametrize("name", ["spvit_deit-t_train", "spvit_deit-s_train"])
def test_training(name, monkeypatch):
    case = golden(name)
    model = load_official(golden_weights(case), "spvit", sampling="argmax").train()
    outputs, allowed = case["outputs"], case["tolerance"]
    features = features_of(model, monkeypatch)
    output = model.method.train_forward(model.family, golden_input(case))
    found = model.method.losses(output, *taught(case))
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=allowed["logits_atol"], rtol=0)
    assert_feature(output.patch_features, outputs["tokens"], allowed)
    for module, feature in outputs["features"].items():
        assert_feature(features[module], feature, allowed)
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
        assert found[term].item() == pytest.approx(value, rel=allowed["loss_rtol"])

    gradients = {official_name(name): p.grad for name, p in model.named_parameters()}
    assert_gradients(gradients, outputs, allowed)


def official_name(name):
    name = name.removeprefix("backbone.").replace("method.selectors.", "score_predictor.")
    if name.startswith("score_predictor."):
        name = name.replace(".head_attention.", ".senet.")
        name = name.replace(".embed.", ".in_conv.").replace(".classify.", ".out_conv.")
    return name


@pytest.mark.parametrize("share_heads", [True, False])
def test_selector(share_heads):
    case = golden("unit_spvit_selector")
    kwargs = case["official"]["kwargs"]
    selector = Selector(
        kwargs["embed_dim"], kwargs["num_heads"], SPViTConfig(share_heads=share_heads)
    )
    renamed = {
        key.replace("senet", "head_attention")
        .replace("in_conv", "embed")
        .replace("out_conv", "classify"): value
        for key, value in golden_weights(case).items()
    }
    wanted = selector.state_dict()
    selector.load_state_dict({key: value for key, value in renamed.items() if key in wanted})
    keep_BN = torch.tensor(case["inputs"]["policy"])[..., 0]
    x = torch.tensor(case["inputs"]["x"])
    found = selector(Tokens.of(x, num_prefix=0).with_keep(keep_BN), x[:, :0])
    outputs = {name: torch.tensor(value) for name, value in case["outputs"].items()}
    log_probs = outputs["mean_log_probs"].log_softmax(-1)
    torch.testing.assert_close(found.log_probs, log_probs, **tolerance(case))
    torch.testing.assert_close(found.keep_score, outputs["mean_probs"][..., 0], **tolerance(case))


def official_weights():
    return golden_weights(golden("spvit_deit-t_eval"))


def test_heads_that_differ_are_loaded_as_they_are():
    weights = official_weights()
    key = "score_predictor.1.out_conv.2.0.weight"
    weights[key] = weights[key] + 1
    with pytest.raises(CheckpointError, match=re.escape(key) + ".* pass share_heads=False"):
        load_official(weights, "spvit")
    model = load_official(weights, "spvit", share_heads=False)
    assert torch.equal(model.method.selectors[1].classify[2][0].weight, weights[key])


def test_files_that_do_not_fit():
    weights = official_weights()
    two = {key: value for key, value in weights.items() if "score_predictor.2." not in key}
    with pytest.raises(CheckpointError, match=r"2 selectors, the config 3 stages; pass stages"):
        load_official(two, "spvit")
    none = {key: value for key, value in weights.items() if "score_predictor" not in key}
    with pytest.raises(CheckpointError, match="no SPViT state dict"):
        load_official(none, "spvit")
    old = {key: value for key, value in weights.items() if "senet" not in key}
    with pytest.raises(CheckpointError, match=r"missing method\.selectors\.0\.head_attention"):
        load_official(old, "spvit")
    model = load_official(two, "spvit", stages=(3, 6), keep_ratio=(0.6, 0.4))
    assert model.method.stages == (3, 6)
