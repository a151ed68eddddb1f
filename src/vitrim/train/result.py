"""What a run is for: its validated accuracy, and the files of its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from vitrim import checkpoint
from vitrim.config import to_plain
from vitrim.errors import InputError
from vitrim.model import SparseModel
from vitrim.train.data import EvalLoader
from vitrim.train.recipe import Recipe


@torch.no_grad()
def top1(accelerator: Any, model: nn.Module, loader: EvalLoader) -> tuple[float, int]:
    """Top-1 in percent over all processes, and on how many images, by the inference forward.

    Every process brings its own share of the images, none of them twice, so sums are exact.
    """
    hits = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    was_training = model.training
    model.eval()
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images.to(accelerator.device))
        right = (logits.argmax(-1) == labels.to(accelerator.device)).sum()
        hits += torch.stack([right, torch.full_like(right, len(labels))])
    model.train(was_training)
    right, count = accelerator.reduce(hits, "sum").tolist()
    if count == 0:
        raise InputError("no validation image can be read; check data.val")
    return 100 * right / count, int(count)


def save_result(
    model: nn.Module,
    folder: Path,
    recipe: Recipe,
    data_config: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write ``checkpoint/`` of a sparse model, or ``backbone.safetensors`` and how it was made."""
    if isinstance(model, SparseModel):
        start = recipe.model.checkpoint or recipe.model.weights or recipe.model.name
        origin = f"recipe {recipe.name}, from {start}"
        model.save_pretrained(folder / "checkpoint", metrics=metrics, origin=origin)
        return
    description = {
        "backbone": checkpoint.describe_backbone(model),
        "data": data_config,
        "metrics": metrics,
        "recipe": to_plain(recipe),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    text = json.dumps(description, indent=2) + "\n"
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    content = safetensors.torch.save(weights, {"format": "pt"})
    checkpoint.write_atomic(folder / "backbone.safetensors", content)
    checkpoint.write_atomic(folder / "backbone.json", text.encode())
