"""Pictures of what a sparse model looks at: dropped patches fade, stage by stage.

Drawn with Pillow alone. The picture shown is the model's own input, with the normalisation undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrim.model import Trace

_PAPER = (255, 255, 255)
_INK = (28, 32, 40)
_SOFT_INK = (96, 103, 115)
_FADED = (247, 247, 247)
_FADE = 0.88
"""Weight of the paper colour where a patch was dropped; the rest is its grey image."""
_LINE = 0.30
"""Opacity of the grid lines."""


@dataclass(frozen=True)
class Panel:
    """One picture of a strip and what is written under it."""

    image: Image.Image
    title: str
    caption: str


def denormalize(image_CHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture that a model input shows.

    Args:
        image_CHW: (3, H, W), or (1, H, W) for a grey model, normalised with ``mean`` and ``std``.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, the same.
    """
    pixels = image_CHW.detach().float().cpu()
    shape = (-1, 1, 1)
    pixels = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def panels(
    image: Image.Image,
    trace: Trace,
    i: int,
    *,
    class_names: Sequence[str] | None = None,
    truth: int | None = None,
    side: int = 320,
) -> list[Panel]:
    """Image ``i`` of a traced batch, then the same image after each stage.

    Args:
        image: what the model saw, with the normalisation undone.
        trace: of the batch.
        i: the image's place in the batch.
        class_names: to name the prediction; None gives its number.
        truth: the true class; None when it is not known.
        side: pixels of the longer side of each picture, about (patches stay whole pixels).
    """
    rows, columns = trace.grid
    num_patches = rows * columns
    cell = max(2, round(side / max(rows, columns)))
    large = image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    found = [Panel(large, "input", _prediction(trace, i, class_names, truth))]
    for number, stage in enumerate(trace.stages, 1):
        keep = torch.zeros(num_patches, dtype=torch.bool)
        keep[stage.kept[i].cpu()] = True
        kept = int(keep.sum())
        found.append(
            Panel(
                fade(large, keep.view(rows, columns)),
                f"stage {number}, before block {stage.block}",
                f"{kept} of {num_patches} patches ({100 * kept / num_patches:.0f}%)",
            )
        )
    return found


def fade(image: Image.Image, keep: Tensor) -> Image.Image:
    """``image`` with a patch grid on it and the patches where ``keep`` (rows, columns) is False
    turned into pale grey.
    """
    rows, columns = keep.shape
    pale = Image.blend(image.convert("L").convert("RGB"), _plain(image.size, _FADED), _FADE)
    # One pixel per patch, enlarged: sharp edges at the patch borders.
    mask = Image.fromarray(keep.byte().mul(255).numpy()).resize(
        image.size, Image.Resampling.NEAREST
    )
    shown = Image.composite(image, pale, mask)
    lined = shown.copy()
    draw = ImageDraw.Draw(lined)
    width, height = image.size
    for column in range(1, columns):
        draw.line([(column * width // columns, 0), (column * width // columns, height)], _PAPER)
    for row in range(1, rows):
        draw.line([(0, row * height // rows), (width, row * height // rows)], _PAPER)
    return Image.blend(shown, lined, _LINE)


def lay_out(row: Sequence[Panel]) -> Image.Image:
    """Panels side by side with their titles and captions, as one picture."""
    width, height = row[0].image.size
    gap = max(12, width // 20)
    size = max(13, width // 18)
    bold, plain = ImageFont.load_default(size), ImageFont.load_default(round(size * 0.92))
    canvas = _plain((len(row) * (width + gap) + gap, height + 2 * gap + round(3.1 * size)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, panel in enumerate(row):
        left, below = gap + place * (width + gap), gap + height + size // 2
        canvas.paste(panel.image, (left, gap))
        draw.text((left, below), _fit(panel.title, bold, width), _INK, bold)
        draw.text(
            (left, below + round(1.35 * size)), _fit(panel.caption, plain, width), _SOFT_INK, plain
        )
    return canvas


def _prediction(trace: Trace, i: int, class_names: Sequence[str] | None, truth: int | None) -> str:
    probability = trace.logits[i].float().softmax(0)
    best = int(probability.argmax())
    text = f"{_class_name(best, class_names)}, {100 * float(probability[best]):.0f}% sure"
    if truth is not None and truth != best:
        text += f" (truth: {_class_name(truth, class_names)})"
    return text


def _class_name(number: int, class_names: Sequence[str] | None) -> str:
    if not class_names:
        return f"class {number}"
    return class_names[number].split(",")[0]  # ImageNet's names list their synonyms


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text``, shortened with an ellipsis until it is no wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip(" ,(") + "..."


def _plain(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)
