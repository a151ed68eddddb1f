"""The demo from end to end on a model of toy size, and what its summary and report say."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

import vitrim
from tests.conftest import tiny_vit
from tests.test_visualize import parse
from vitrim import CheckpointError
from vitrim.demo import run as demo
from vitrim.demo.run import run_demo
from vitrim.train.recipe import load_recipe
from vitrim.train.shipped import DIGITS_ARCHITECTURE, DIGITS_ARGUMENTS, digits_backbone

NAMES = [name.removeprefix("digits-") for name in demo.RECIPES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo's folder, its summary and the parts that showed progress."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    changes = [
        "model.weights=none",
        "model.kwargs={img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, "
        "num_classes=10}",
        "data.length=64",
        "data.val_length=20",
        "data.batch_size=32",
        "run.epochs=1",
        "run.precision=fp32",
        "run.tensorboard=false",
    ]
    own = {"digits-stvit": ["method.semantic_tokens=4"], "digits-sait": ["method.min_kept=1"]}
    recipes = [load_recipe(name, changes + own.get(name, [])) for name in demo.RECIPES]
    parts: dict[str, list[int]] = {}

    @contextmanager
    def progress(label, total):
        parts[label] = []
        yield parts[label].append

    lines = run_demo(
        folder,
        seconds=20,
        recipes=recipes,
        test_images=120,
        rounds=1,
        slice_seconds=0,
        tolerance=0.5,
        threads=1,
        progress=progress,
    )
    return folder, lines, parts


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_folder_holds_report_results_and_a_checkpoint_per_method(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "report.html",
        "results.json",
    ]
    results = results_of(folder)
    main = {point["method"]: point for point in results["points"] if point["is_main"]}
    assert list(main) == NAMES
    assert len(results["benchmark"]) == len(demo.BATCHES) * (1 + len(results["points"]))
    for name, point in main.items():
        sparse = vitrim.from_pretrained(folder / "checkpoints" / name)
        assert sparse.method.name == name
        assert point["images"] == 120
        described = json.loads((folder / "checkpoints" / name / "config.json").read_text())
        assert described["metrics"]["test"].items() <= point.items()


def test_budgets_are_calibrated(finished):
    folder, _, _ = finished
    for point in results_of(folder)["points"]:
        if point["budget"] is not None:
            # a tiny model that has hardly learned costs what its coarse steps allow
            assert point["macs"]["mean"] < 1.1 * point["dense_macs"]
            assert point["name"] == f"{point['method']} {point['budget']}"
        else:
            assert point["method"] == "stvit"
    costs = {
        method: [p["macs"]["mean"] for p in results_of(folder)["points"] if p["method"] == method]
        for method in NAMES
    }
    low, high = demo.BUDGETS.index(min(demo.BUDGETS)), demo.BUDGETS.index(max(demo.BUDGETS))
    assert all(cost[low] < cost[high] for cost in costs.values() if len(cost) > 1)


def test_the_dense_model_is_the_one_before_training(finished):
    """Its row is that of the untouched dense weights, not of the trained backbone run densely."""
    from vitrim.tools.evaluate import evaluate_dense
    from vitrim.train.backbone import create_dense
    from vitrim.train.data import eval_loader
    from vitrim.train.recipe import recipe_from_plain

    folder, _, _ = finished
    results = results_of(folder)
    recipe = recipe_from_plain(results["recipes"]["dynamicvit"])
    config = vitrim.from_pretrained(folder / "checkpoints" / "dynamicvit").data_config
    loader = eval_loader("digits/test", config, 60, length=120)
    found = evaluate_dense(create_dense(recipe.model, recipe.run.seed), loader)
    for point in results["points"]:
        assert dataclasses.asdict(found.dense) == point["dense"]


def test_summary_has_seven_lines_with_what_was_measured(finished):
    folder, lines, _ = finished
    results = results_of(folder)
    assert len(lines) == 7
    assert [line.split()[0] for line in lines] == ["dense", *NAMES]
    assert not any("\n" in line for line in lines)
    main = {point["method"]: point for point in results["points"] if point["is_main"]}
    for line in lines[1:]:
        point = main[line.split()[0]]
        assert f"{point['sparse']['top1']:.2f}% top-1" in line
        assert f"{point['paired']['difference']:+.2f} points" in line
        row = next(row for row in results["benchmark"] if row["name"] == point["name"])
        assert row["batch"] == demo.BATCHES[0]
        assert f"{row['speedup']['median']:.2f}x" in line
    assert "report.html" in lines[-1]


def test_report_is_whole_and_self_contained(finished):
    folder, _, _ = finished
    page = (folder / "report.html").read_text()
    found = parse(page)
    assert len(found.pictures) >= 6 * 5 * 2
    assert all(address.startswith("data:image/png;base64,") for address in found.pictures)
    assert page.count("<svg") == 2
    points = 1 + len(results_of(folder)["points"])
    assert page.count("<title>") == 1 + 2 * points
    assert all(f"What {method} looks at" in page for method in NAMES)
    assert page.count("Patches that 120 images kept") == 3  # AS-ViT, SaiT, SPViT
    assert page.count("Images that kept least") == page.count("Images that kept most") == 3
    assert 'name="viewport"' in page
    assert not re.search(r"https?://", page)


def test_every_part_shows_progress_to_its_end(finished):
    _, _, parts = finished
    assert len(parts) == 6 + 4
    assert all(numbers == sorted(numbers) for numbers in parts.values())
    assert parts["making the test images"][-1] == 120
    assert parts["fine-tuning with dynamicvit"][-1] == 100
    assert parts["evaluating methods and budgets"][-1] == 6


def test_shipped_model_is_loaded_from_half_precision(tmp_path):
    model = tiny_vit(DIGITS_ARCHITECTURE, **DIGITS_ARGUMENTS)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "weights.safetensors")
    loaded = digits_backbone(tmp_path / "weights.safetensors")
    assert not loaded.training
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, model.head.weight.half().float())
    with pytest.raises(CheckpointError, match="does not exist"):
        digits_backbone(tmp_path / "absent.safetensors")
