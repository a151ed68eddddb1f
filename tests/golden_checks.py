"""What the tests of golden cases compare, all in one way."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import seeded
from vitrim.methods.records import DenseOutput


def assert_feature(found, expected, tolerance):
    """Compare a tensor with its golden sums; the class token's first channels come first."""
    values = found.detach().double()
    scale = tolerance["feature_sum_over_abs_sum"] * expected["abs_sum"]
    assert list(found.shape) == expected["shape"]
    assert abs(values.sum().item() - expected["sum"]) <= scale
    assert abs(values.abs().sum().item() - expected["abs_sum"]) <= scale
    rms = (expected["sq_sum"] / values.numel()) ** 0.5
    head = values.flatten()[:8] - torch.tensor(expected["head"], dtype=torch.float64)
    assert head.abs().max() <= tolerance["feature_head_over_rms"] * rms


def features_of(model, names):
    """Hooks that keep the outputs of the backbone's modules ``names``."""
    kept = {}
    for name in names:
        module = model.backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
    return kept


def gradients_of(model, official_name):
    """Gradients by the authors' names; of AS-ViT's thresholds each is a parameter of theirs."""
    found = {official_name(name): p.grad for name, p in model.named_parameters()}
    thresholds = found.pop("method.thresholds", None)
    for stage, gradient in enumerate([] if thresholds is None else thresholds):
        found[f"score_predictor.{stage}.keep_threshold"] = gradient
    return found


def assert_gradients(gradients, outputs, tolerance):
    """Compare gradients, by the authors' names of their parameters, with the golden ones."""
    for name, expected in outputs["grads"].items():
        threshold = name.endswith("keep_threshold")
        rtol = tolerance["threshold_grad_rtol" if threshold else "grad_norm_rtol"]
        assert gradients[name].norm().item() == pytest.approx(expected["norm"], rel=rtol), name
        head = gradients[name].flatten()[: len(expected["head"])] - torch.tensor(expected["head"])
        assert head.abs().max() <= rtol * expected["norm"], name
    total = sum(gradient.double().norm() ** 2 for gradient in gradients.values()) ** 0.5
    rtol = tolerance["grad_norm_rtol"]
    assert total.item() == pytest.approx(outputs["grad_norm_total"], rel=rtol)


def taught(case):
    """Soft targets and what the teacher says, both random, of a training case."""
    recipe = case["train"]["teacher"]
    logits = torch.randn(recipe["logits_shape"], generator=seeded(recipe["logits_seed"]))
    tokens = torch.randn(recipe["tokens_shape"], generator=seeded(recipe["tokens_seed"]))
    noise = torch.randn(recipe["logits_shape"], generator=seeded(recipe["targets_seed"]))
    return (2 * noise).softmax(-1), DenseOutput(logits, tokens)
