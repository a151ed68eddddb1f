"""Parity with the authors' Swin and ConvNeXt code: their numbers on fixed weights (golden/README).

Dynamic spatial sparsification comes from the repository of DynamicViT, and so do its files' names.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.conftest import golden, golden_input, golden_weights, seeded, tiny_convnext
from tests.golden_checks import assert_feature, taught
from vitrim import DynamicSpatialConfig, load_official, sparsify
from vitrim.convert.spatial import _CONVNEXT, _counted_from, _renamed
from vitrim.layers.predictor import Predictor
from vitrim.methods.dynamic_spatial import TwoMaps
from vitrim.tokens.feature_map import FeatureMap, Partition
from vitrim.tokens.plain import Tokens


def load(case, **options):
    ratio = case["official"]["base_rate"]
    return load_official(golden_weights(case), "dynamicvit", keep_ratio=ratio, **options)


def features_of(model, monkeypatch):
    """The maps that leave stem, blocks and stages, by the authors' names, once the model runs."""
    kept, swin = {}, model.family.name == "swin"
    last = tuple(depth - 1 for depth in model.family.depths)

    def name_of(stage, index):
        return f"layers.{stage}.blocks.{index}" if swin else f"stages.{stage}.{index}"

    def keep(name, x_BHWC):
        kept[name] = x_BHWC.flatten(1, 2) if swin else x_BHWC.permute(0, 3, 1, 2)

    def watch(owner, attribute, record):
        run = getattr(owner, attribute)

        def watched(*arguments):
            out = run(*arguments)
            record(arguments, out)
            return out

        monkeypatch.setattr(owner, attribute, watched)

    def after_block(arguments, fmap):
        stage, index, _ = arguments
        keep(name_of(stage, index), fmap.x_BHWC)
        if swin and stage == 3 and index == last[3]:
            keep("layers.3", fmap.x_BHWC)

    def after_whole_block(arguments, fmap):
        _, stage, index, before = arguments
        after_block((stage, index, before), fmap)

    watch(model.family, "run_block", after_block)
    watch(model.method, "_whole_block", after_whole_block)
    watch(model.family, "stem", lambda _, fmap: keep("patch_embed", fmap.x_BHWC))
    watch(
        model.family,
        "enter_stage",
        lambda arguments, fmap: keep(f"layers.{arguments[0] - 1}", fmap.x_BHWC),
    )
    watch(
        model.method,
        "_split_block",
        lambda arguments, fmap: keep(name_of(2, arguments[1]), fmap.x_BHWC),
    )
    watch(
        model.method,
        "_train_block",
        lambda arguments, maps: keep(name_of(2, arguments[1]), maps.slow_BHWC),
    )

    def after_norm(_module, _input, out):
        kept["norm"] = out.flatten(1, 2) if swin else out.flatten(1)  # the head's comes last

    norm = model.backbone.norm if swin else model.backbone.head.norm
    norm.register_forward_hook(after_norm)
    return kept


@pytest.mark.parametrize(
    "name",
    [
        "dynamicvit_convnext-t_r0.7_eval",
        "dynamicvit_swin-t_r0.7_eval_b1",
        "dynamicvit_swin-t_r0.7_eval_b3",
    ],
)
def test_evaluation(name, monkeypatch):
    case = golden(name)
    model = load(case)
    outputs, tolerance = case["outputs"], case["tolerance"]
    with monkeypatch.context() as patch:
        features = features_of(model, patch)
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
    assert (
        model.unwrap().pretrained_cfg["architecture"]
        == {
            "swin-t": "swin_tiny_patch4_window7_224",
            "convnext-t": "convnext_tiny",
        }[case["model"]]
    )


def test_training(monkeypatch):
    case = golden("dynamicvit_convnext-t_r0.7_train")
    model = load(case, sampling="argmax").train()
    outputs, tolerance = case["outputs"], case["tolerance"]
    with monkeypatch.context() as patch:
        features = features_of(model, patch)
        output = model.method.train_forward(model.family, golden_input(case))
    target, teacher = taught(case)
    teacher = replace(teacher, patch_features=teacher.patch_features.flatten(1, 2))
    found = model.method.losses(output, target, teacher)
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    map_BHWC = output.patch_features.unflatten(1, outputs["tokens"]["shape"][1:3])
    assert_feature(map_BHWC, outputs["tokens"], tolerance)
    for module, feature in outputs["features"].items():
        assert_feature(features[module], feature, tolerance)
    for keep_BN, kept in zip(output.keeps_BN, outputs["kept_indices"], strict=True):
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
        assert found[term].item() == pytest.approx(value, rel=tolerance["loss_rtol"])

    rtol = tolerance["grad_norm_rtol"]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    named = _counted_from(1, {_renamed(key, _CONVNEXT): key for key in outputs["grads"]})
    for name, key in named.items():
        expected_gradient = outputs["grads"][key]
        norm = gradients[name].norm().item()
        assert norm == pytest.approx(expected_gradient["norm"], rel=rtol), key
        head = gradients[name].flatten()[: len(expected_gradient["head"])]
        allowed = rtol * expected_gradient["norm"]
        assert (head - torch.tensor(expected_gradient["head"])).abs().max() <= allowed, key
    total = sum(g.double().norm() ** 2 for g in gradients.values()) ** 0.5
    assert total.item() == pytest.approx(outputs["grad_norm_total"], rel=rtol)


def close(found, expected, case):
    tolerance = {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}
    torch.testing.assert_close(found, torch.tensor(expected), **tolerance)


def test_predictor():
    """Small inputs, so that the epsilon of ConvNeXt's norms matters."""
    case = golden("unit_dynamicvit_predictor_convnext")
    predictor = Predictor(case["official"]["kwargs"]["embed_dim"], norm_eps=1e-6)
    predictor.load_state_dict(
        {
            key.replace("in_conv", "embed").replace("out_conv", "classify"): (
                value.flatten(1) if value.ndim == 4 else value
            )
            for key, value in golden_weights(case).items()
        }
    )
    x_BCN = torch.tensor(case["inputs"]["x"]).flatten(2)
    found = predictor(Tokens.of(x_BCN.mT, num_prefix=0))
    outputs = case["outputs"]
    close(found.mT, torch.tensor(outputs["log_probs"]).flatten(2).tolist(), case)
    count = len(outputs["kept_sorted"][0])
    first_BN = Partition.best(found[..., 0], count).first_BN(len(found))
    assert [row.nonzero().flatten().tolist() for row in first_BN] == outputs["kept_sorted"]
    assert [row.nonzero().flatten().tolist() for row in ~first_BN] == outputs["rest_sorted"]


def ada_block(case):
    """A model whose third stage is the one block of a unit case."""
    dim = case["official"]["kwargs"]["dim"]
    backbone = tiny_convnext(depths=(1, 1, 1, 1), dims=(4, 8, dim, 32), norm_eps=1e-6)
    model = sparsify(backbone, DynamicSpatialConfig(stages=(0,))).eval()
    weights = golden_weights(case)
    names = {_renamed(f"stages.2.0.{key}", _CONVNEXT): tensor for key, tensor in weights.items()}
    missing, unexpected = nn.Module.load_state_dict(model, names, strict=False)
    assert not unexpected
    assert len(missing) == len(model.state_dict()) - len(weights)
    return model


def channels_last(values):
    return torch.tensor(values).permute(0, 2, 3, 1)


def channels_first(x_BHWC):
    return x_BHWC.permute(0, 3, 1, 2)


def test_block_at_inference():
    case = golden("unit_dynamicvit_adablock_convnext_eval")
    model, fmap = ada_block(case), FeatureMap(channels_last(case["inputs"]["x"]))
    slow = torch.tensor(case["inputs"]["slow_index"])
    score_BN = torch.rand(len(slow), math.prod(fmap.grid), generator=seeded(0))
    partition = Partition.best(score_BN.scatter_add(1, slow, torch.ones(slow.shape)), slow.shape[1])
    found = model.method._split_block(model.family, 0, fmap, partition)
    close(channels_first(found.x_BHWC), case["outputs"]["y"], case)


def test_block_in_training():
    case = golden("unit_dynamicvit_adablock_convnext_train")
    model = ada_block(case)
    maps = TwoMaps(*(channels_last(case["inputs"][name]) for name in ("x1", "x2", "mask")))
    found = model.method._train_block(model.family, 0, maps, FeatureMap(maps.slow_BHWC))
    close(channels_first(found.slow_BHWC), case["outputs"]["x1"], case)
    close(channels_first(found.fast_BHWC), case["outputs"]["x2"], case)
