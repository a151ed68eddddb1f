"""What a detector found, drawn: boxes and masks, and the positions that were computed fully."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from vitrim.tasks.detection import Detector
from vitrim.tools.evaluate import check_scores
from vitrim.tools.visualize import Panel, denormalize, stage_panels, token_colours

SIDE = 320
"""Of the longer side of a picture in pixels, about."""
_INK, _PAPER = (28, 32, 40), (255, 255, 255)


@torch.no_grad()
def detection_panels(
    model: Detector, image: Tensor, title: str, threshold: float = 0.5
) -> list[Panel]:
    """What is found in an image, then the image after each stage of a sparse backbone.

    Args:
        model: in evaluation mode.
        image: (3, H, W) from 0 to 1, on its device.
        title: of the first picture.
        threshold: objects that are less sure are not drawn.
    """
    found = model([image])[0]
    keep = found["scores"] >= threshold
    found = {name: value[keep].cpu() for name, value in found.items()}
    rows = [Panel(_drawn(model, image.cpu(), found), title, _said(model, found))]
    if model.sparse is None:
        return rows
    seen, sizes = model.prepared([image])
    trace = model.sparse.trace(seen, sizes)
    check_scores(trace)
    picture = denormalize(seen[0], model.data_config["mean"], model.data_config["std"])
    return rows + stage_panels(picture, trace, 0, SIDE)


def _drawn(model: Detector, image: Tensor, found: dict[str, Tensor]) -> Image.Image:
    scale = SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    canvas = (functional.resize(image, size, antialias=True).clamp(0, 1) * 255).byte()
    known = token_colours(model.config.num_classes)
    colours = [known[label] for label in found["labels"].tolist()]
    if "masks" in found and colours:
        masks = functional.resize(found["masks"].squeeze(1), size) > 0.5
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colours)
    boxes = found["boxes"] * scale
    if colours:
        canvas = draw_bounding_boxes(canvas, boxes, colors=colours, width=2)
    picture: Image.Image = functional.to_pil_image(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(SIDE // 20)
    for box, label, colour in zip(boxes.tolist(), found["labels"].tolist(), colours, strict=True):
        place, name = (box[0] + 3, box[1] + 1), class_name(model, label)
        left, top, right, bottom = draw.textbbox(place, name, font)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), _PAPER, colour)
        draw.text(place, name, _INK, font)
    return picture


def _said(model: Detector, found: dict[str, Tensor]) -> str:
    count = len(found["labels"])
    if not count:
        return "nothing found"
    pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    listed = ", ".join(f"{class_name(model, label)} {100 * score:.0f}%" for label, score in pairs)
    return f"{count} found: {listed}"


def class_name(model: Detector, label: int) -> str:
    """What a label, from 1, is called."""
    return model.classes[label - 1] if model.classes else f"class {label}"
