"""What a segmenter says of an image, drawn, and the positions that were computed fully."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_segmentation_masks

from vitrim.errors import InputError
from vitrim.tasks.segmentation import Segmenter
from vitrim.tasks.segmentation_batches import preparation_of
from vitrim.tools.evaluate import check_scores
from vitrim.tools.visualize import Panel, denormalize, stage_panels, token_colours

SIDE = 320
"""Of the longer side of a picture in pixels, about."""
BACKGROUND = "background"
"""A class of this name is not coloured."""


@torch.no_grad()
def segmentation_panels(model: Segmenter, image: Tensor, title: str) -> list[Panel]:
    """The classes of an image's pixels, then the image after each stage of a sparse backbone.

    Args:
        model: in evaluation mode.
        image: (3, H, W) from 0 to 1, on the model's device.
        title: of the first picture.

    Raises:
        InputError: scores are not finite.
    """
    pixels = preparation_of(model).whole(functional.to_pil_image(image.cpu())).to(image.device)
    scores = model(pixels.unsqueeze(0))
    if not bool(scores.isfinite().all()):
        raise InputError("the segmenter's scores hold NaN or infinity; check its weights")
    rows = [Panel(_drawn(model, image.cpu(), scores.cpu()), title, _said(model, scores))]
    if model.sparse is None:
        return rows
    seen, sizes = model.prepared(pixels.unsqueeze(0))
    trace = model.sparse.trace(seen, sizes)
    check_scores(trace)
    picture = denormalize(seen[0], model.data_config["mean"], model.data_config["std"])
    return rows + stage_panels(picture, trace, 0, SIDE)


def _drawn(model: Segmenter, image: Tensor, scores: Tensor) -> Image.Image:
    scale = SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    canvas = (functional.resize(image, size, antialias=True).clamp(0, 1) * 255).byte()
    found = F.interpolate(scores, size, mode="bilinear", align_corners=False)[0].argmax(0)
    colours = token_colours(model.config.num_classes)
    there = torch.bincount(found.flatten()).nonzero().flatten().tolist()
    shown = [label for label in there if class_name(model, label) != BACKGROUND]
    if shown:
        masks = torch.stack([found == label for label in shown])
        chosen = [colours[label] for label in shown]
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.6, colors=chosen)
    picture: Image.Image = functional.to_pil_image(canvas)
    return picture


def _said(model: Segmenter, scores: Tensor) -> str:
    """The classes, and the share of the image that each has, the largest first."""
    counts = torch.bincount(scores.argmax(1).flatten())
    shares = (100 * counts / counts.sum()).tolist()
    order = sorted(range(len(shares)), key=lambda label: -shares[label])
    return ", ".join(
        f"{class_name(model, label)} {shares[label]:.0f}%" for label in order if shares[label]
    )


def class_name(model: Segmenter, label: int) -> str:
    """What a class is called."""
    return model.classes[label] if model.classes else f"class {label}"
