"""Parity with the authors' STViT-R code: their numbers on fixed weights (see golden/README)."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.conftest import golden, golden_input, golden_weights, seeded
from vitrim import load_official


def assert_summary(found, expected, tolerance):
    """Compare a tensor with its golden sums and first values."""
    values = found.detach().double()
    scale = tolerance["feature_sum_over_abs_sum"] * expected["abs_sum"]
    assert list(found.shape) == expected["shape"]
    assert abs(values.sum().item() - expected["sum"]) <= scale
    assert abs(values.abs().sum().item() - expected["abs_sum"]) <= scale
    rms = (expected["sq_sum"] / values.numel()) ** 0.5
    head = values.flatten()[:8] - torch.tensor(expected["head"], dtype=torch.float64)
    assert head.abs().max() <= tolerance["feature_head_over_rms"] * rms


MODULES = {
    "patch_embed": "patch_embed",
    "layers.0": "layers.1.downsample",
    "layers.1": "layers.2.downsample",
    "layers.2": "layers.3.downsample",
    "norm": "norm",
}
"""The authors' modules, and ours with the same output."""


def spy(model, monkeypatch):
    """What the authors' modules give, by their names, of the forwards that follow."""
    seen = {}

    def keep(name):
        return lambda _module, _input, out: seen.__setitem__(name, out.flatten(1, 2))

    for theirs, ours in MODULES.items():
        model.backbone.get_submodule(ours).register_forward_hook(keep(theirs))
    run, finish = model.family.run_block, model.method._after_attention

    def run_block(stage, index, fmap, *options):
        out = run(stage, index, fmap, *options)
        seen[f"layers.{stage}.blocks.{index}"] = out.x_BHWC.flatten(1, 2)
        seen["layers.3"] = out.x_BHWC.flatten(1, 2)  # the last one is the stage's
        return out

    def after_attention(family, index, *tensors):
        out = finish(family, index, *tensors)
        seen[f"layers.2.blocks.{index}"] = out.flatten(1, 2)
        return out

    monkeypatch.setattr(model.family, "run_block", run_block)
    monkeypatch.setattr(model.method, "_after_attention", after_attention)
    return seen


def used_parameters(model):
    """Ours but for the position biases of blocks that have none in the authors' models."""
    unused = re.compile(r"backbone\.layers\.2\.blocks\.(\d+)\.attn\.relative_position_bias_table")
    return {
        name: p
        for name, p in model.named_parameters()
        if not ((match := unused.fullmatch(name)) and int(match[1]) % 6)
    }


@pytest.mark.parametrize("name", ["swin-t_eval", "swin-t_allflags_eval", "swin-s_eval"])
def test_evaluation(name, monkeypatch):
    case = golden(f"stvit-r_{name}")
    flags = case["official"]["kwargs"]
    weights = golden_weights(case)
    model = load_official(weights, "stvit-r", residual=flags["shortcut"], project_once=False)
    outputs, tolerance, stats = case["outputs"], case["tolerance"], case["model_stats"]
    seen, x = spy(model, monkeypatch), golden_input(case)
    with torch.no_grad():
        logits = model(x)
    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(logits, expected, atol=tolerance["logits_atol"], rtol=0)
    for module, feature in outputs["features"].items():
        assert_summary(seen[module], feature, tolerance)
    assert sum(p.numel() for p in used_parameters(model).values()) == stats["params"]
    assert model.macs() == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)
    if name == "swin-t_allflags_eval":
        once = load_official(weights, "stvit-r", residual=True)
        with torch.no_grad():
            torch.testing.assert_close(once(x), logits, atol=1e-5, rtol=0)
        assert once.macs() < model.macs()


@pytest.mark.parametrize("name", ["swin-t_train", "swin-t_allflags_train"])
def test_training(name, monkeypatch):
    case = golden(f"stvit-r_{name}")
    flags = case["official"]["kwargs"]
    model = load_official(golden_weights(case), "stvit-r", residual=flags["shortcut"]).train()
    outputs, tolerance = case["outputs"], case["tolerance"]
    seen = spy(model, monkeypatch)
    noise = torch.randn(2, 10, generator=seeded(case["train"]["teacher"]["targets_seed"]))
    output = model.method.train_forward(model.family, golden_input(case))
    found = model.method.losses(output, (2 * noise).softmax(-1), None)
    found["total"].backward()

    expected = torch.tensor(outputs["logits"])
    torch.testing.assert_close(output.logits, expected, atol=tolerance["logits_atol"], rtol=0)
    for module, feature in outputs["features"].items():
        assert_summary(seen[module], feature, tolerance)
    for term, value in (("total", "total"), ("classification", "cls_ce")):
        wanted = pytest.approx(outputs["loss"][value], rel=tolerance["loss_rtol"])
        assert found[term].item() == wanted
    for buffer, statistics in outputs["batchnorm_after_one_step"].items():
        assert_summary(model.backbone.get_buffer(buffer)[None], statistics, tolerance)

    rtol, gradients = tolerance["grad_norm_rtol"], official_gradients(model)
    for key, wanted in outputs["grads"].items():
        gradient = gradients[key]
        assert gradient.norm().item() == pytest.approx(wanted["norm"], rel=rtol), key
        head = gradient.flatten()[: len(wanted["head"])] - torch.tensor(wanted["head"])
        assert head.abs().max() <= rtol * wanted["norm"], key
    total = math.sqrt(sum(p.grad.double().norm() ** 2 for p in used_parameters(model).values()))
    assert total == pytest.approx(outputs["grad_norm_total"], rel=rtol)


def official_gradients(model):
    """Gradients of our parameters by the authors' names; queries apart from keys and values."""
    gradients = {}
    for name, parameter in used_parameters(model).items():
        name = name.removeprefix("backbone.").replace("head.fc.", "head.")
        name = name.replace("method.centres_SC", "layers.2.semantic_token2")
        name = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )
        name = re.sub(r"method\.blocks\.(\d+)\.scale", r"layers.2.blocks.\1.layer_scale_", name)
        gradients[name] = parameter.grad
        if match := re.fullmatch(r"(layers\.2\.blocks\.\d+\.attn)\.qkv\.(\w+)", name):
            width = len(parameter) // 3
            gradients[f"{match[1]}.q.{match[2]}"] = parameter.grad[:width]
            gradients[f"{match[1]}.kv.{match[2]}"] = parameter.grad[width:]
    return gradients


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("swin-t_padmask_250x330", "official"),
        ("swin-t_nopadmask_250x330", "off"),
        ("swin-s_padmask_224x224_b2", "official"),
    ],
)
def test_dense_prediction(name, mask, monkeypatch):
    case = golden(f"stvit-r-det_{name}")
    weights = golden_weights(case)
    model = load_official(weights, "stvit-r", pad_mask=mask, project_once=False)
    if mask == "off":  # a whole detector's file is as good
        detector = {f"backbone.{key}": tensor for key, tensor in weights.items()}
        detector = {"meta": {}, "state_dict": detector | {"neck.convs.0.weight": torch.ones(1)}}
        model = load_official(detector, "stvit-r", pad_mask=mask, project_once=False)
    outputs, tolerance, stats = case["outputs"], case["tolerance"], case["model_stats"]
    seen, x = spy(model, monkeypatch), golden_input(case)
    with torch.no_grad():
        levels = model.features(x)
    for level, expected in zip(levels, outputs["levels"], strict=True):
        assert_summary(level, expected, tolerance)
        for axis, sums in ((3, "row_sums"), (2, "col_sums")):
            allowed = tolerance["point_atol"] * level[0].numel() ** 0.5
            difference = level[0].sum((0, axis - 1)) - torch.tensor(expected[sums])
            assert difference.abs().max() <= allowed
        for *place, value in expected["points"]:
            assert level[tuple(place)].item() == pytest.approx(value, abs=tolerance["point_atol"])
    seen["patch_embed"] = seen["patch_embed"].mT.unflatten(2, levels[0].shape[2:])
    for module, feature in outputs["features"].items():
        assert_summary(seen[module], feature, tolerance)
    classifier = {"backbone.norm.weight", "backbone.norm.bias"}  # which a detector has not
    parameters = {n: p for n, p in used_parameters(model).items() if n not in classifier}
    assert sum(p.numel() for p in parameters.values()) == stats["params"]
    size = (x.shape[2], x.shape[3])
    assert model.macs(size) == pytest.approx(stats["gmacs_eval_batch1"] * 1e9, rel=1e-7)
