"""What a run is for: its validated accuracy, and the files of its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.config import to_plain
from vitrim.errors import InputError, TrainingError
from vitrim.model import SparseModel, eval_mode
from vitrim.tools.evaluate import check_logits, check_scores, check_weights
from vitrim.train.data import EvalLoader
from vitrim.train.recipe import Recipe

RESULTS = ("checkpoint", "backbone.safetensors", "backbone.json")
"""What may be the result of a run, by name."""


@torch.no_grad()
def top1(accelerator: Any, model: nn.Module, loader: EvalLoader) -> tuple[float, int]:
    """Top-1 in percent over all processes, and on how many images, by the inference forward.

    Every process brings its own share of the images, none of them twice, so sums are exact.

    Raises:
        TrainingError: an answer is not finite.
        InputError: there is no image.
    """
    hits = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    with eval_mode(model):
        for images, labels in loader:
            with accelerator.autocast():
                logits = model(images.to(accelerator.device))
            right = (logits.argmax(-1) == labels.to(accelerator.device)).sum()
            broken = (~logits.isfinite().all(-1)).sum()
            hits += torch.stack([right, torch.full_like(right, len(labels)), broken])
    right, count, broken = accelerator.reduce(hits, "sum").tolist()
    if broken:
        raise TrainingError(
            f"the logits of {int(broken)} of {int(count)} validation images hold NaN or infinity; "
            "the last saved state and result are kept"
        )
    if count == 0:
        raise InputError("no validation image can be read; check data.val")
    return 100 * right / count, int(count)


@torch.no_grad()
def check_result(model: nn.Module, images: Tensor) -> None:
    """Check that the weights, and what the model answers to ``images``, are finite.

    Raises:
        InputError: they are not.
    """
    check_weights("trained", model)
    if isinstance(model, SparseModel):
        trace = model.trace(images)
        check_logits("trained", trace.logits)
        check_scores(trace)
        return
    with eval_mode(model):
        check_logits("trained", model(images))


def is_finite(value: Any) -> bool:
    """Whether every tensor in a nested state holds finite numbers only."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, dict) or all(map(is_finite, value.values()))


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
