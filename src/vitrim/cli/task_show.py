"""What ``vitrim show`` does for detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import functional

from vitrim.cli.show import Found, png, read_all, strip_name, write_page
from vitrim.tasks.scenes import IMAGES, SIDE, is_scenes, open_scenes
from vitrim.tools.visualize import Panel


def read_task_images(model: Any, sources: Sequence[str], limit: int) -> Found:
    """Read at most ``limit`` images of each file or folder, or of the embedded scenes, whole and
    as they are.
    """
    named = []
    for source in sources:
        if is_scenes(source):
            split = "scenes/test" if source == "scenes" else source
            source = str(open_scenes(split, limit, model.data_config["input_size"][-1]) / IMAGES)
        named.append(source)
    found = Found(model.data_config | {"input_size": (3, SIDE, SIDE)}, model.classes)
    read_all(named, _as_tensor, limit, found)
    return found


def _as_tensor(image: Any) -> torch.Tensor:
    """(3, H, W) from 0 to 1."""
    pixels: torch.Tensor = functional.pil_to_tensor(image)
    return pixels.float() / 255


def draw_task(
    models: Mapping[str, Any], found: Found, folder: Path, advance: Callable[[int], None]
) -> None:
    """Write a PNG strip per image, what each of the models finds side by side, and ``page.html``
    with all of them.
    """
    model = [*models.values()][-1]
    device = next(model.parameters()).device
    strips, files = list[tuple[str, list[Panel]]](), dict[str, bytes]()
    for number, shown in enumerate(found.images, 1):
        pixels = shown.pixels.to(device)
        row = [panel for name, each in models.items() for panel in _panels(each, pixels, name)]
        files[strip_name(number, shown.name)] = png(row)
        strips.append((Path(shown.name).name, row))
        advance(number)
    sparse = model.sparse
    means = "dense" if sparse is None else f"{sparse.method.name}: what is not computed is faded"
    note = f"{model.task} on {model.timm_model.__class__.__name__}, {means}."
    write_page(folder, files, "What the model finds, and where it looks", note, strips)


def _panels(model: Any, image: torch.Tensor, title: str) -> list[Panel]:
    if model.task == "detection":
        from vitrim.tasks.detection_show import detection_panels

        return detection_panels(model, image, title)
    from vitrim.tasks.segmentation_show import segmentation_panels

    return segmentation_panels(model, image, title)
