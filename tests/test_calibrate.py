"""Calibration to a budget, its record, and budgets set at run time."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import vitrim
from tests.conftest import forge, images, seeded, tiny_vit
from vitrim import (
    ASViTConfig,
    CheckpointError,
    ConfigError,
    DynamicViTConfig,
    InputError,
    MergingConfig,
    SaiTConfig,
    SPViTConfig,
    STViTConfig,
    calibrate,
    from_pretrained,
    sparsify,
)
from vitrim.budget import Curve
from vitrim.budgets.calibrate import MAX_BYTES
from vitrim.methods import METHODS
from vitrim.methods.records import Dial
from vitrim.tools.evaluate import evaluate
from vitrim.train.recipe import list_recipes

WHOLE = {"exact_last_block": False}
"""Up to the dense model's cost, every budget can be met; the last of four blocks is a quarter."""
ADAPTIVE = {
    "sait mass": SaiTConfig(min_kept=0, **WHOLE),
    "sait threshold": SaiTConfig(selector="threshold", min_kept=0, **WHOLE),
    "asvit": ASViTConfig(**WHOLE),
    "dynamicvit threshold": DynamicViTConfig(threshold=0.5, **WHOLE),
    "merging threshold": MergingConfig(stages=(1, 2), threshold=0.1, **WHOLE),
}
FIXED = {
    "sait density": SaiTConfig(selector="density", **WHOLE),
    "dynamicvit": DynamicViTConfig(**WHOLE),
    "dynamicvit ratios": DynamicViTConfig(keep_ratio=(0.9, 0.5, 0.4), **WHOLE),
}


def made(config, **kwargs):
    """A sparse model with 64 patches, whose selector, if it has one, tells tokens apart."""
    sparse = sparsify(tiny_vit(**{"patch_size": 4} | kwargs), config, generator=seeded(1))
    with torch.no_grad():
        for name, parameter in sparse.method.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(20)
    return sparse


def loader(count: int = 24, batch: int = 8):
    return list(images(count, seed=5).split(batch))


def share_on(sparse, batches) -> float:
    """Mean cost by tracing, as a share of the dense model's."""
    macs = torch.cat([sparse.trace(part).macs for part in batches])
    return float(macs.mean()) / sparse.dense_macs()


each_adaptive = pytest.mark.parametrize("case", ADAPTIVE)


# meeting budgets


@each_adaptive
@pytest.mark.parametrize("budget", [0.5, 0.75])
def test_the_mean_cost_meets_the_budget(case, budget):
    sparse, batches = made(ADAPTIVE[case]), loader()
    found = calibrate(sparse, batches, budget, tolerance=0.02)
    assert share_on(sparse, batches) == pytest.approx(budget, rel=0.02)
    assert found.fraction == pytest.approx(share_on(sparse, batches))
    macs = torch.cat([sparse.trace(part).macs for part in batches])
    assert found.macs.mean == pytest.approx(float(macs.mean()))
    assert found.macs.std == pytest.approx(float(macs.std(correction=0)))
    assert (found.macs.min, found.macs.max) == (float(macs.min()), float(macs.max()))
    assert found.budget == budget
    assert found.images == 24
    assert 2 <= found.passes <= 22
    assert (found.dial, found.value) == (sparse.method.dial().name, sparse.method.dial().value)
    assert sparse.calibration == (found,)


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("budget", [0.6, 0.9, 1.0])
def test_fixed_counts_need_no_image(case, budget):
    sparse = made(FIXED[case])
    found = calibrate(sparse, None, budget)
    assert sparse.macs() / sparse.dense_macs() == pytest.approx(budget, rel=0.01)
    assert found.fraction == sparse.macs() / sparse.dense_macs()
    assert (found.images, found.passes) == (0, 0)
    again = made(FIXED[case])
    again.set_budget(budget)
    assert again.config == sparse.config


def test_several_budgets_share_their_passes():
    config, batches = ADAPTIVE["sait mass"], loader()
    sparse = made(config)
    told: list[str] = []
    found = calibrate(sparse, batches, (0.75, 0.5, 0.6), progress=told.append)
    assert [point.budget for point in found] == [0.75, 0.5, 0.6]
    assert sparse.calibration == found
    assert sparse.method.dial().value == found[0].value
    assert len(told) == sum(point.passes for point in found)
    alone = [calibrate(made(config), batches, budget).passes for budget in (0.75, 0.5, 0.6)]
    assert sum(point.passes for point in found) < sum(alone)
    assert found[1].value < found[2].value < found[0].value


def test_labels_and_modes_do_not_matter():
    batches = loader()
    plain = calibrate(made(SaiTConfig()), batches, 0.7)
    sparse = made(SaiTConfig())
    sparse.train()
    sparse.backbone.blocks[1].eval()
    modes = [module.training for module in sparse.modules()]
    with_labels = [(part, torch.full((len(part),), -1)) for part in batches]
    assert calibrate(sparse, with_labels, 0.7) == plain
    assert [module.training for module in sparse.modules()] == modes
    assert not any(tensor.is_inference() for tensor in sparse.state_dict().values())


def test_no_more_images_than_asked_for_are_taken(monkeypatch):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield images(8, seed=taken)

    assert calibrate(made(SaiTConfig()), endless(), 0.7, max_images=20).images == 20
    assert taken == 3
    assert MAX_BYTES >= 256 * 3 * 224 * 224 * 4
    monkeypatch.setattr("vitrim.budgets.calibrate.MAX_BYTES", images(16).nbytes)
    assert calibrate(made(SaiTConfig()), endless(), 0.7).images == 16


def test_images_of_several_sizes_are_weighed_by_their_own_dense_cost():
    sparse = made(SaiTConfig(min_kept=0), dynamic_img_size=True)
    batches = [images(4, 32), images(4, 48)]
    found = calibrate(sparse, batches, 0.7)
    spent = sum(float(sparse.trace(part).macs.sum()) for part in batches)
    dense = 4 * sparse.dense_macs((32, 32)) + 4 * sparse.dense_macs((48, 48))
    assert spent / dense == pytest.approx(0.7, rel=0.01)
    assert found.fraction == pytest.approx(spent / dense)


def test_evaluation_agrees_with_the_record():
    sparse, batches = made(SaiTConfig(min_kept=0)), loader()
    found = calibrate(sparse, batches, 0.6)
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part in batches]
    assert evaluate(sparse, labelled).macs == found.macs


# the search


@pytest.mark.parametrize(
    ("dial", "cost"),
    [
        (Dial("flat ends", 0.5, 0.0, 1.0), lambda v: 0.3 + 0.7 / (1 + math.exp(-60 * (v - 0.8)))),
        (Dial("falling", 1.0, 100.0, 0.0), lambda v: 0.3 + 0.7 * math.exp(-v)),
        (Dial("log", 1.0, 1e6, 1e-6, logarithmic=True), lambda v: 0.3 + 0.7 / (1 + v**3)),
        (Dial("line", 0.1, 0.0, 1.0), lambda v: 0.2 + 0.8 * v),
        (Dial("dip", 0.1, 0.0, 1.0), lambda v: 0.2 + 0.8 * v + 0.05 * math.sin(20 * v)),
    ],
    ids=lambda value: value.name if isinstance(value, Dial) else "",
)
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8, 0.97])
def test_the_search_needs_few_looks(dial, cost, budget):
    curve = Curve(dial, cost)
    position = curve.search(budget, tolerance=0.01, near_enough=0.01, tries=20)
    assert cost(dial.at(position)) == pytest.approx(budget, rel=0.01)
    assert len(curve.known) <= 16
    assert dial.position(dial.at(position)) == pytest.approx(position)


def test_the_dial_reaches_its_ends_exactly():
    for dial in (Dial("a", 0.5, 1e-3, 1.0), Dial("b", 1, 1e3, 1e-3, logarithmic=True)):
        assert (dial.at(0.0), dial.at(1.0)) == (dial.cheapest, dial.dearest)


# budgets at run time, and the record


def test_set_budget_by_the_record_and_between(tmp_path):
    sparse, batches = made(SaiTConfig(min_kept=0)), loader()
    found = calibrate(sparse, batches, (0.5, 0.7))
    for point in found:
        sparse.set_budget(point.budget)
        assert sparse.config.mass == point.value
    sparse.set_budget(0.6)
    assert share_on(sparse, batches) == pytest.approx(0.6, rel=0.05)
    before = sparse.config
    for outside in (0.4, 0.9):
        with pytest.raises(ConfigError, match=r"recorded for mass: 0.5, 0.7\); call .*calibrate"):
            sparse.set_budget(outside)
    sparse.method.set_selector("threshold")
    with pytest.raises(ConfigError, match="recorded for threshold: none"):
        sparse.set_budget(0.6)
    sparse.method.set_selector("mass")
    assert sparse.config == before
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.calibration == found
    loaded.set_budget(0.5)
    assert share_on(loaded, batches) == pytest.approx(0.5, rel=0.01)
    assert from_pretrained(tmp_path, min_kept=3).calibration == ()


def test_a_record_holds_for_the_weights_that_it_was_made_with(tmp_path):
    sparse = made(ASViTConfig())
    calibrate(sparse, loader(), (0.6, 0.7))
    sparse.losses(images(2), torch.tensor([1, 2]))["total"].backward()
    sparse.set_budget(0.65)
    assert copy.deepcopy(sparse).set_budget(0.6) is None
    sparse.backbone.blocks[0].mlp.fc1.weight.data[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"weights have changed since .*calibrate again"):
        sparse.set_budget(0.7)
    sparse.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).calibration == ()
    sparse.backbone.blocks[0].mlp.fc1.weight.data[0, 0] -= 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": "half"}, "calibration.0..budget"),
        ({"value": math.nan}, "finite"),
        ({"fraction": -0.5}, "fraction is -0.5"),
        ({"macs": {"mean": 1.0, "std": 0.0, "min": 2.0, "max": 3.0}}, "min <= mean"),
        ({"macs": 7}, "macs"),
        ({"images": -1}, "0 or more"),
        ({"dial": ""}, "dial is empty"),
        ({"passses": 1}, "did you mean 'passes'"),
        ({"passes": None}, "passes"),
    ],
    ids=str,
)
def test_a_damaged_record_is_named(tmp_path, change, message):
    sparse = made(SaiTConfig())
    calibrate(sparse, loader(), 0.7)
    sparse.save_pretrained(tmp_path)
    forge(tmp_path, lambda config: config["calibration"][0].update(change))
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path)


def test_an_incomplete_record_is_named_and_none_is_fine(tmp_path):
    sparse = made(SaiTConfig())
    calibrate(sparse, loader(), 0.7)
    sparse.save_pretrained(tmp_path)
    for record, message in (([{"budget": 0.7}], "lacks dial, value"), ([3], "table"), (3, "list")):
        forge(tmp_path, lambda config, record=record: config.update(calibration=record))
        with pytest.raises(ConfigError, match=message):
            from_pretrained(tmp_path)
    forge(tmp_path, lambda config: config.pop("calibration"))
    assert from_pretrained(tmp_path).calibration == ()
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path / "nowhere")


# bad input; the model is left as it was


def refused(error, match, sparse, *arguments, **options):
    """``calibrate`` fails so, and changes nothing."""
    config, record = sparse.config, sparse.calibration
    weights = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    with pytest.raises(error, match=match):
        calibrate(sparse, *arguments, **options)
    assert sparse.config == config
    assert sparse.calibration == record
    for name, tensor in sparse.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, math.nan])
def test_budgets_that_are_no_share(budget):
    refused(ConfigError, "share of the dense", made(SaiTConfig()), loader(), budget)
    with pytest.raises(ConfigError, match="share of the dense"):
        made(SaiTConfig()).set_budget(budget)


@each_adaptive
def test_a_budget_below_the_floor_names_the_reachable_range(case):
    refused(ConfigError, r"out of reach: .* gives 0\.\d+ to 1", made(ADAPTIVE[case]), loader(), 0.1)


def test_a_budget_above_the_ceiling():
    sparse = made(SaiTConfig(max_kept=20))
    refused(ConfigError, r"out of reach: .* to 0\.\d+$", sparse, loader(), 0.9)


@pytest.mark.parametrize("case", [*ADAPTIVE, *FIXED])
def test_the_exact_last_block_is_counted_and_lowers_the_ceiling(case):
    sparse = made(replace((ADAPTIVE | FIXED)[case], exact_last_block=True))
    calibrate(sparse, loader(), 0.5, tolerance=0.02)
    assert share_on(sparse, loader()) == pytest.approx(0.5, rel=0.02)
    refused(ConfigError, r"out of reach: .* to 0\.[78]\d+$", sparse, loader(), 1.0)


@pytest.mark.parametrize("case", FIXED)
def test_fixed_counts_out_of_reach(case):
    refused(ConfigError, "out of reach", made(FIXED[case]), None, 0.05)
    sparse = made(FIXED[case])
    before = sparse.config
    with pytest.raises(ConfigError, match="out of reach"):
        sparse.set_budget(0.05)
    assert sparse.config == before


def test_steps_that_pass_over_the_budget_name_the_nearest():
    few = {"patch_size": 16}  # four patches
    for sparse, batches in (
        (made(SaiTConfig(selector="density"), **few), None),
        (made(SaiTConfig(min_kept=0), **few), [images(1)]),
    ):
        refused(
            ConfigError, r"nearest that \w+ reaches are 0\.\d+ and 0\.\d+", sparse, batches, 0.7
        )
        found = calibrate(sparse, batches, 0.7, tolerance=0.3)
        assert abs(found.fraction / 0.7 - 1) < 0.3


def test_no_images():
    class Damaged(list):
        unreadable = ("a.png",)

    sparse = made(SaiTConfig())
    refused(InputError, "no image to calibrate on", sparse, [], 0.7)
    refused(InputError, "no image to calibrate on", sparse, Damaged(), 0.7)
    refused(InputError, "no image to calibrate on", sparse, [images(3)[:0]], 0.7)
    refused(ConfigError, "give a loader", sparse, None, 0.7)


def test_things_that_are_no_images():
    sparse = made(SaiTConfig())
    refused(InputError, "the loader gives str", sparse, ["a.png"], 0.7)
    refused(InputError, r"the loader gives torch.uint8", sparse, [images(2).byte()], 0.7)
    refused(InputError, "expected .batch, 3", sparse, [images(2)[0]], 0.7)
    refused(InputError, "40 x 40", sparse, [images(2, 40)], 0.7)


def test_arguments_out_of_range():
    sparse = made(SaiTConfig())
    refused(ConfigError, "tolerance", sparse, loader(), 0.7, tolerance=0)
    refused(ConfigError, "max_images", sparse, loader(), 0.7, max_images=0)
    refused(ConfigError, "no budget", sparse, loader(), ())


@each_adaptive
def test_nan_is_named(case):
    sparse = made(ADAPTIVE[case])
    refused(InputError, "NaN or infinity", sparse, [images(4) * math.nan], 0.7)
    sparse = made(ADAPTIVE[case])
    nn.init.constant_(sparse.backbone.head.bias, math.nan)
    refused(InputError, "logits hold NaN", sparse, loader(), 0.7)


def test_nan_scores_are_named_even_where_logits_are_fine():
    sparse = made(DynamicViTConfig(threshold=0.5))
    nn.init.constant_(sparse.method.predictors[1].classify[4].bias, math.nan)
    assert sparse.eval()(images(2)).isfinite().all()
    refused(InputError, "token scores before block 2", sparse, loader(), 0.7)


def test_a_selector_that_must_be_learned_names_its_recipe(tmp_path):
    for config in (DynamicViTConfig(), DynamicViTConfig(threshold=0.5), SPViTConfig()):
        sparse = sparsify(tiny_vit(), config)
        recipe = sparse.method.needs_training
        refused(ConfigError, f"must be learned.*vitrim train {recipe}", sparse, loader(), 0.7)
    sparse = sparsify(tiny_vit(), DynamicViTConfig(), generator=seeded(1))
    assert sparse.is_untrained
    optimizer = torch.optim.AdamW(sparse.method.parameters(), lr=1e-2)
    for _ in range(3):
        sparse.losses(images(4), torch.tensor([1, 2, 3, 4]))["total"].backward()
        optimizer.step()
    assert not sparse.is_untrained
    sparse.save_pretrained(tmp_path)
    assert not from_pretrained(tmp_path).is_untrained
    assert not sparsify(tiny_vit(), ASViTConfig()).is_untrained


def test_recipes_that_teach_a_selector_exist():
    named = {method.needs_training for method in METHODS.values()} - {None}
    assert named <= set(list_recipes())


def test_semantic_tokens_move_in_steps():
    config = STViTConfig(global_centres=False, pooling="avg", semantic_tokens=9)
    sparse = sparsify(tiny_vit(patch_size=4), config)
    found = calibrate(sparse, None, 0.9, tolerance=0.05)
    assert found.dial == "semantic_tokens"
    assert sparse.macs() / sparse.dense_macs() == pytest.approx(0.9, rel=0.05)


def test_a_method_without_a_dial_says_so():
    sparse = made(SaiTConfig(selector="dense"))
    refused(ConfigError, "set to be dense", sparse, loader(), 0.7)
    with pytest.raises(ConfigError, match="set to be dense"):
        sparse.set_budget(0.7)


def test_an_interruption_leaves_the_model_as_it_was():
    def stop(text: str) -> None:
        raise KeyboardInterrupt("stop here")

    refused(KeyboardInterrupt, "stop here", made(ASViTConfig()), loader(), 0.7, progress=stop)


def test_a_snapshot_brings_everything_back():
    sparse = made(ASViTConfig())
    calibrate(sparse, loader(), 0.7)
    config, record = sparse.config, sparse.calibration
    weights = {name: tensor.clone() for name, tensor in sparse.method.state_dict().items()}
    restore = sparse.snapshot()
    sparse.method.turn(2.0)
    sparse.method.stranger = 1
    sparse.calibration = ()
    with torch.no_grad():
        for parameter in sparse.method.parameters():
            parameter.add_(1)
    restore()
    assert (sparse.config, sparse.calibration) == (config, record)
    assert not hasattr(sparse.method, "stranger")
    for name, tensor in sparse.method.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_the_top_exports_calibration():
    assert vitrim.calibrate is calibrate
    assert {"calibrate", "Calibration"} <= set(vitrim.__all__)
