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
from vitrim.tools import demo
from vitrim.tools.demo import run_demo
from vitrim.train.recipe import load_recipe
from vitrim.train.shipped import DIGITS_ARCHITECTURE, DIGITS_ARGUMENTS, digits_backbone


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo's folder, its summary and the parts that showed progress."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    recipe = load_recipe(
        demo.RECIPE,
        [
            "model.weights=none",
            "model.kwargs={img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, "
            "num_classes=10}",
            "data.length=64",
            "data.val_length=20",
            "data.batch_size=32",
            "run.epochs=1",
            "run.precision=fp32",
            "run.tensorboard=false",
        ],
    )
    parts: dict[str, list[int]] = {}

    @contextmanager
    def progress(label, total):
        parts[label] = []
        yield parts[label].append

    lines = run_demo(
        folder,
        seconds=20,
        recipe=recipe,
        test_images=120,
        rounds=1,
        slice_seconds=0,
        progress=progress,
    )
    return folder, lines, parts


def test_folder_holds_report_results_and_checkpoint(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "report.html",
        "results.json",
    ]
    sparse = vitrim.from_pretrained(folder / "checkpoint")
    results = json.loads((folder / "results.json").read_text())
    assert sparse.config.keep_ratio == results["trained_keep_ratio"] == 0.6
    assert results["evaluation"]["images"] == 120
    assert results["evaluation"]["macs"]["mean"] == sparse.macs()
    assert {entry["keep_ratio"] for entry in results["sweep"]} == {0.6, *demo.RATIOS}
    assert len(results["benchmark"]) == len(demo.BATCHES) * (1 + len({0.6, *demo.RATIOS}))
    described = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert described["metrics"]["test"] == results["evaluation"]


def test_the_dense_model_is_the_one_before_training(finished):
    """Its row is that of the untouched dense weights, not of the trained backbone run densely."""
    from vitrim.tools.evaluate import evaluate_dense
    from vitrim.train.data import eval_loader
    from vitrim.train.recipe import recipe_from_plain
    from vitrim.train.task import create_dense

    folder, _, _ = finished
    results = json.loads((folder / "results.json").read_text())
    recipe = recipe_from_plain(results["recipe"])
    config = vitrim.from_pretrained(folder / "checkpoint").data_config
    loader = eval_loader("digits/test", config, 60, length=120)
    found = evaluate_dense(create_dense(recipe.model, recipe.run.seed), loader)
    assert dataclasses.asdict(found.dense) == results["evaluation"]["dense"]


def test_summary_has_six_lines_with_what_was_measured(finished):
    folder, lines, _ = finished
    results = json.loads((folder / "results.json").read_text())
    assert len(lines) == 6
    assert [line.split()[0] for line in lines] == [
        "data",
        "dense",
        "sparse",
        "difference",
        "speed-up",
        "report",
    ]
    assert not any("\n" in line for line in lines)
    found = results["evaluation"]
    assert f"{found['dense']['top1']:.2f}% top-1" in lines[1]
    assert f"{found['sparse']['top1']:.2f}% top-1" in lines[2]
    assert f"{found['paired']['difference']:+.2f} points" in lines[3]
    own = next(row for row in results["benchmark"] if row["name"] == "0.6")
    assert own["batch"] == demo.BATCHES[0]
    assert f"{own['speedup']['median']:.2f}x" in lines[4]


def test_report_is_whole_and_self_contained(finished):
    folder, _, _ = finished
    page = (folder / "report.html").read_text()
    found = parse(page)
    assert len(found.pictures) == 6 * 4
    assert all(address.startswith("data:image/png;base64,") for address in found.pictures)
    assert page.count("<svg") == 2
    assert page.count("<circle") == 2 * (1 + len({0.6, *demo.RATIOS}))
    assert 'name="viewport"' in page
    assert not re.search(r"https?://", page)


def test_every_part_shows_progress_to_its_end(finished):
    _, _, parts = finished
    assert len(parts) == 5
    assert all(numbers == sorted(numbers) for numbers in parts.values())
    assert parts["making the test images"][-1] == 120
    assert parts["evaluating dense and sparse"][-1] == 120
    assert parts["fine-tuning the sparse model"][-1] == 100


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
