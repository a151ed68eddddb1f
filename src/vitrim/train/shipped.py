"""The dense model that comes with the package: a small ViT trained on the cluttered digits.

It was made by these two commands; the second keeps half precision:

    vitrim train digits-dense -o runs/digits-dense
    python -m vitrim.train.shipped runs/digits-dense
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn

from vitrim.checkpoint import load_strict, read_weights, write_atomic
from vitrim.errors import CheckpointError
from vitrim.train.backbone import package_file
from vitrim.train.state import is_finite

DIGITS_NAME = "digits_vit"
"""What the command line calls the model."""
DIGITS_ARCHITECTURE = "vit_tiny_patch16_224"
DIGITS_ARGUMENTS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 10,
}


def digits_backbone(weights: Path | None = None) -> nn.Module:
    """The dense model of the embedded data set, trained, in evaluation mode.

    Args:
        weights: another safetensors file of the same architecture; None takes the shipped one.
    """
    if weights is None:
        weights = package_file(DIGITS_NAME)
        if not weights.is_file():
            raise CheckpointError(
                f"the package lacks {weights.name}; its installation is damaged, install it again"
            )
    model: nn.Module = timm.create_model(DIGITS_ARCHITECTURE, **DIGITS_ARGUMENTS)
    # The file holds half precision; loading copies into the model's float32 parameters.
    load_strict(model, read_weights(weights), str(weights))
    return model.eval()


def ship(run: Path) -> Path:
    """Put the result of a ``digits-dense`` run into the package, in half precision."""
    weights = read_weights(run / "backbone.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    if not is_finite(half):
        raise CheckpointError(f"half precision cannot hold the weights of {run}")
    target = package_file(DIGITS_NAME)
    target.parent.mkdir(exist_ok=True)
    write_atomic(target, safetensors.torch.save(half, {"format": "pt"}))
    return target


if __name__ == "__main__":
    print(ship(Path(sys.argv[1])))
