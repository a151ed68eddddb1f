"""One engine, several tasks: what recipes say of them, and what they hand to the engine."""

from __future__ import annotations

import json

import pytest
import timm
import torch

import vitrim
from tests.training import TINY, quiet, tiny_recipe, write_images
from vitrim import ConfigError
from vitrim.tasks.base import on_device
from vitrim.tasks.registry import task_class
from vitrim.train.engine import train
from vitrim.train.optim import parameter_groups
from vitrim.train.recipe import OptimRecipe, recipe_from_plain

SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "num_classes": 3,
}


def tables(**task):
    recipe = {
        "name": "x",
        "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
        "data": {"train": "unused"},
        "run": {"epochs": 1},
    }
    return recipe | ({"task": task} if task else {})


def test_recipes_are_of_classification_unless_they_say_otherwise():
    assert recipe_from_plain(tables()).task.name == "classification"
    asked = recipe_from_plain(tables(name="detection", num_classes=4)).task
    assert asked.build().num_classes == 4


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "detektion"}, "did you mean 'detection'"),
        ({"name": "classification", "num_classes": 3}, "task.num_classes"),
        ({"name": "detection"}, "task lacks num_classes"),
        ({"name": "detection", "num_classes": 1}, "num_classes is 1; expected 2"),
        ({"name": "detection", "num_classes": 4, "head": "yolo"}, "mask_rcnn"),
        ({"name": "detection", "num_classes": 4, "short_sides": []}, "sides of images"),
        ({"name": "detection", "num_classes": 4, "fixed_size": [64]}, "a height and a width"),
        ({"name": "detection", "num_classes": 4, "crop_sides": [9, 3]}, "the smaller first"),
        ({"name": "detection", "num_classes": 4, "box_width": 10**9}, "box_width"),
    ],
)
def test_a_task_that_cannot_be_is_refused(task, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_plain(tables(**task))


def test_folders_of_before_there_were_tasks_go_on(tmp_path):
    """Their recipe.json has no task."""
    recipe = tiny_recipe(write_images(tmp_path / "data"), run__epochs=1)
    train(recipe, tmp_path / "run", on_progress=quiet)
    path = tmp_path / "run" / "recipe.json"
    content = json.loads(path.read_text())
    assert content.pop("task") == {"name": "classification", "config": {}}
    path.write_text(json.dumps(content))
    assert train(recipe, tmp_path / "run", on_progress=quiet).folder == tmp_path / "run"


def test_batches_are_moved_whatever_their_form():
    batch = ([torch.zeros(1)], {"boxes": torch.zeros(2), "image_id": 7}, None)
    images, target, nothing = on_device(batch, "meta")
    assert images[0].is_meta
    assert target["boxes"].is_meta
    assert target["image_id"] == 7
    assert nothing is None


@pytest.mark.parametrize("config", [None, vitrim.DynamicSpatialConfig()])
def test_the_head_learns_at_the_method_s_rate(config):
    """The timm model's parameters have the backbone's role, all others the method's."""
    backbone = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    own = {id(parameter) for parameter in backbone.parameters()}
    if config is not None:
        backbone = vitrim.sparsify(backbone, config)
    detector = vitrim.tasks.mask_rcnn(backbone, 3, short_sides=(64,), channels=8, box_width=8)
    for group in parameter_groups(detector, OptimRecipe()):
        of_backbone = {id(parameter) in own for parameter in group["params"]}
        assert of_backbone == {group["role"] == "backbone"}


def test_tasks_by_name():
    assert task_class("classification").name == "classification"
    assert task_class("detection").name == "detection"
    assert task_class("video").name == "video"
    with pytest.raises(ConfigError, match="no task 'depth'"):
        task_class("depth")
