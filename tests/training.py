"""What the tests of training share: a toy folder of images, a tiny recipe, a clean subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrim.config import to_plain
from vitrim.train.recipe import Recipe, recipe_from_plain

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 2,
}


def write_images(root: Path, classes: int = 2, per_class: int = 8, size: int = 32) -> Path:
    """A folder data set whose class is told by the colour channel that is bright."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 100, size=(size, size, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def tiny_recipe(train: Path | str, **changes: Any) -> Recipe:
    """Two epochs of four steps of DynamicViT on a tiny ViT; ``table__key=value`` changes it."""
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "vit_tiny_patch16_224", "kwargs": dict(TINY)},
        "method": {"name": "dynamicvit", "keep_ratio": 0.7},
        "data": {"train": str(train), "batch_size": 4, "workers": 0},
        "augment": {"none": True},
        "optim": {"lr": 1e-3},
        "run": {"epochs": 2, "log_every": 1, "checkpoint_steps": 3, "tensorboard": False},
    }
    for place, value in changes.items():
        table, key = place.split("__")
        if value is None and table == "method":
            data["method"] = {}
        else:
            data[table][key] = value
    return recipe_from_plain(data)


def quiet(_record: dict[str, Any]) -> None:
    """Takes the place of the progress lines."""


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    clock = ("time", "images_per_second")
    return [
        {name: value for name, value in json.loads(line).items() if name not in clock}
        for line in lines
    ]


def run_script(
    script: str, recipe: Recipe, folder: Path, *launcher: str
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with ``recipe`` and ``folder`` defined, in processes of one thread."""
    file = folder / "script.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    head = (
        "import json, os, signal\n"
        "from pathlib import Path\n"
        "from vitrim.train.engine import train\n"
        "from vitrim.train.recipe import recipe_from_plain\n"
        f"folder = Path({str(folder)!r})\n"
        f"recipe = recipe_from_plain(json.loads({json.dumps(to_plain(recipe))!r}))\n"
    )
    file.write_text(head + script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, str(file)], capture_output=True, text=True, env=environment
    )
