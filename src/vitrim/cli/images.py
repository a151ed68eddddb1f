"""Images that the commands look at without their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budgets.milliseconds import batches_of
from vitrim.cli import common
from vitrim.errors import InputError


def calibration_loader(
    model: nn.Module,
    source: str,
    images: int,
    batch: int,
    workers: int,
    *,
    crop_pct: float | None = None,
    split: str | None = None,
) -> Any:
    """Images of ``source``, spread evenly over it; labels are not read."""
    from vitrim.train.data import eval_loader

    config = common.data_config_of(model, source)
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    return eval_loader(source, config, batch, workers, images, labelled=False, split=split)


def prepared_images(model: nn.Module, source: str, count: int, batch: int) -> Tensor:
    """Prepared images of ``source`` in one tensor; those that cannot be read are named."""
    loader = calibration_loader(model, common.data_source(source), count, batch, 0)
    found = [images for images, _ in loader]
    common.name_unreadable(tuple(str(file.name) for file in loader.unreadable))
    if not found:
        raise InputError(f"{source} has not one readable image")
    return torch.cat(found)


def unlabelled_batches(
    model: nn.Module,
    data: str,
    images: int,
    batch: int,
    workers: int,
    split: str | None,
    device: torch.device,
) -> tuple[str, list[Tensor]]:
    """Prepared images of ``data`` to calibrate on, in batches, and where they come from: never from
    the test images of the embedded set. Those that cannot be read are named.
    """
    source = "digits/train" if common.data_source(data) == "digits/test" else data
    loader = calibration_loader(model, source, images, batch, workers, split=split)
    batches = batches_of(loader, device)
    common.name_unreadable(tuple(str(file.name) for file in loader.unreadable))
    return source, batches
