"""The embedded data set, and the dense model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vitrim
from vitrim import ConfigError
from vitrim.tools.evaluate import evaluate_dense
from vitrim.train.data import digits_data_config, eval_loader
from vitrim.train.digits import ClutteredDigits, _sources
from vitrim.train.recipe import load_recipe
from vitrim.train.shipped import DIGITS_ARCHITECTURE, DIGITS_ARGUMENTS, digits_backbone

SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_is_a_function_of_its_place(split):
    one, other = ClutteredDigits(split, 50), ClutteredDigits(split, 10)
    for index in (3, 0, 9):
        a, b = one.sample(index), other.sample(index)
        assert np.array_equal(a.image, b.image)
        assert (a.label, a.box) == (b.label, b.box)
        assert np.array_equal(a.mask, b.mask)


def test_epochs_seeds_and_splits_show_other_pictures():
    data = ClutteredDigits("train", 10)
    first = np.asarray(data.sample(0).image)
    data.set_epoch(1)
    assert not np.array_equal(first, data.sample(0).image)
    assert not np.array_equal(first, ClutteredDigits("train", 10, seed=1).sample(0).image)
    assert not np.array_equal(first, ClutteredDigits("val", 10).sample(0).image)


def test_splits_share_no_handwriting():
    digits = {s: {np.asarray(image).tobytes() for image in _sources(s)[0]} for s in SPLITS}
    assert not digits["train"] & digits["test"]
    assert not digits["train"] & digits["val"]
    assert not digits["val"] & digits["test"]
    assert all(set(_sources(split)[1]) == set(range(10)) for split in SPLITS)


@pytest.mark.parametrize("size", [48, 64, 224])
def test_box_and_mask_hold_the_digit(size):
    data = ClutteredDigits("train", 20, image_size=size)
    for index in range(20):
        sample = data.sample(index)
        left, top, right, bottom = sample.box
        assert sample.image.size == (size, size)
        assert sample.mask.shape == (size, size)
        assert 0 <= left < right <= size
        assert 0 <= top < bottom <= size
        assert sample.mask[top:bottom, left:right].sum() == sample.mask.sum() > 20
        # The ink is brighter than what surrounds it in its box.
        grey = np.asarray(sample.image.convert("L"), dtype=float)
        inside = np.zeros_like(sample.mask)
        inside[top:bottom, left:right] = True
        assert grey[sample.mask].mean() > grey[inside & ~sample.mask].mean()


def test_clutter_is_a_curriculum():
    flat = ClutteredDigits("train", 5, clutter=0.0)
    for index in range(5):
        sample = flat.sample(index)
        pixels = np.asarray(sample.image).reshape(-1, 3)
        left, top, right, bottom = sample.box
        outside = np.ones(sample.mask.shape, bool)
        outside[top - 4 if top > 4 else 0 : bottom + 4, left - 4 if left > 4 else 0 : right + 4] = 0
        assert len(np.unique(pixels[outside.flatten()], axis=0)) == 1


@pytest.mark.parametrize(
    "arguments", [{"split": "trial"}, {"length": 0}, {"image_size": 32}, {"split": ""}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ConfigError):
        ClutteredDigits(**arguments)
    with pytest.raises(IndexError):
        ClutteredDigits("train", 3)[3]


def test_recipes_are_for_the_shipped_model():
    for name in ("digits-dense", "digits-dynamicvit"):
        model = load_recipe(name).model
        assert (model.name, model.kwargs) == (DIGITS_ARCHITECTURE, DIGITS_ARGUMENTS)


def test_shipped_model():
    """At least 95 % of unseen digits, from a file of at most 4 MB."""
    path = Path(vitrim.__file__).parent / "assets" / "digits_vit.safetensors"
    assert path.stat().st_size <= 4_000_000
    loader = eval_loader("digits/test", digits_data_config(64), 100, length=1000)
    model = digits_backbone()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    found = evaluate_dense(model, loader)
    assert found.images == 1000
    assert found.dense.top1 >= 95
