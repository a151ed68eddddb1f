"""Pictures of what a sparse model looks at: dropped patches fade, stage by stage; patches that are
one token have one colour, and so have those of a semantic token; histograms say how many patches
images kept.

Drawn with Pillow alone. The picture shown is the model's own input, with the normalisation undone.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrim.methods.records import StageTrace
from vitrim.model import Trace
from vitrim.tokens.plain import Grid

_PAPER = (255, 255, 255)
_INK = (28, 32, 40)
_SOFT_INK = (96, 103, 115)
_FADED = (247, 247, 247)
_FADE = 0.88
"""Weight of the paper colour where a patch was dropped; the rest is its grey image."""
_LINE = 0.30
"""Opacity of the grid lines."""
_TINT = 0.5
"""Opacity of the semantic tokens' colours."""
_BAR = (31, 111, 235)
_GOLDEN = 0.6180339887498949
_BINS = 20


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

    A stage whose semantic tokens replace the patches shows who looks at what.

    Args:
        image: what the model saw, with the normalisation undone.
        trace: of the batch.
        i: the image's place in the batch.
        class_names: to name the prediction; None gives its number.
        truth: the true class; None when it is not known.
        side: pixels of the longer side of each picture, about (patches stay whole pixels).
    """
    answer = _prediction(trace.logits[i], class_names, truth)
    first = Panel(_enlarged(image, trace.grid, side), "input", answer)
    return [first, *stage_panels(image, trace, i, side)]


def stage_panels(image: Image.Image, trace: Trace, i: int, side: int = 320) -> list[Panel]:
    """Image ``i`` of a traced batch after each stage; see :func:`panels`."""
    found = []
    for number, stage in enumerate(trace.stages, 1):
        rows, columns = stage.grid
        num_patches, large = rows * columns, _enlarged(image, stage.grid, side)
        title = f"stage {number}, before block {stage.block}"
        if stage.assignment is not None:
            looks_SN = stage.assignment[i]
            caption = f"{len(looks_SN)} semantic tokens for {num_patches} patches"
            found.append(Panel(assignment(large, looks_SN, stage.grid), title, caption))
            continue
        kept = len(stage.kept[i])
        share = f"{100 * kept / num_patches:.0f}%"
        keep = torch.zeros(num_patches, dtype=torch.bool)
        keep[stage.kept[i].cpu()] = True
        caption, shown = f"{kept} of {num_patches} patches ({share})", keep.view(rows, columns)
        picture = fade(large, shown)
        group = None if stage.groups is None else stage.groups[i].cpu()
        if group is not None and bool((group[~keep] >= 0).any()):
            caption = f"{kept} tokens for {num_patches} patches ({share})"
            picture = merged(large, group.view(rows, columns))
        found.append(Panel(picture, title, caption))
    return found


def clip_panels(
    frames: Sequence[Image.Image],
    trace: Trace,
    *,
    class_names: Sequence[str] | None = None,
    truth: int | None = None,
    most: int = 8,
    side: int = 200,
) -> list[Panel]:
    """The first frame of a clip, then frames after the last stage, evenly over the clip: who looks
    at what, or what an image model keeps of each.

    Args:
        frames: what the model saw, with the normalisation undone.
        trace: of the clip, or, of an image model, of its frames as a batch; the answer is the mean
            of theirs.
        class_names: to name the prediction; None gives its number.
        truth: the true class; None when it is not known.
        most: frames that are shown.
        side: pixels of the longer side of each picture, about.
    """
    answer = _prediction(trace.logits.float().mean(0), class_names, truth)
    grid = (trace.grid[-2], trace.grid[-1])
    first = Panel(_enlarged(frames[0], grid, side), "first frame", answer)
    looks = [stage for stage in trace.stages if len(stage.grid) == 3]
    if looks:
        return [first, *_looks_of_frames(frames, looks[0], most, side)]
    places = sorted({place * len(frames) // most for place in range(most)})
    found = [(place, stage_panels(frames[place], trace, place, side)[-1:]) for place in places]
    return [first, *(replace(panel, title=f"frame {n + 1}") for n, row in found for panel in row)]


def _looks_of_frames(
    frames: Sequence[Image.Image], stage: StageTrace, most: int, side: int
) -> Iterator[Panel]:
    """What the semantic tokens of some maps of a clip look at; a map is of several frames."""
    assert stage.assignment is not None
    shape: Any = stage.grid
    maps, rows, columns = shape
    looks_STN = stage.assignment[0].reshape(-1, maps, rows * columns)
    for number in sorted({place * maps // most for place in range(most)}):
        place, end = number * len(frames) // maps, (number + 1) * len(frames) // maps
        looks_SN = looks_STN[:, number]
        own = looks_SN[looks_SN.sum(1) > 0]  # the others are of other frames
        picture = _enlarged(frames[place], (rows, columns), side)
        title = f"frames {place + 1} to {end}" if end - place > 1 else f"frame {end}"
        caption = f"{len(own)} tokens for {rows * columns} places"
        yield Panel(assignment(picture, own, (rows, columns)), title, caption)


def _enlarged(image: Image.Image, grid: Grid, side: int) -> Image.Image:
    """``image`` with a longer side of about ``side`` pixels, whole ones for each patch."""
    rows, columns = grid
    cell = max(2, round(side / max(rows, columns)))
    return image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)


def fade(image: Image.Image, keep: Tensor) -> Image.Image:
    """``image`` with a patch grid on it and the patches where ``keep`` (rows, columns) is False
    turned into pale grey.
    """
    rows, columns = keep.shape
    pale = Image.blend(image.convert("L").convert("RGB"), _plain(image.size, _FADED), _FADE)
    shown = Image.composite(image, pale, _by_patch(keep.byte() * 255, image.size))
    lined = shown.copy()
    draw = ImageDraw.Draw(lined)
    width, height = image.size
    for column in range(1, columns):
        draw.line([(column * width // columns, 0), (column * width // columns, height)], _PAPER)
    for row in range(1, rows):
        draw.line([(0, row * height // rows), (width, row * height // rows)], _PAPER)
    return Image.blend(shown, lined, _LINE)


def assignment(image: Image.Image, looks_SN: Tensor, grid: Grid) -> Image.Image:
    """``image`` tinted patch by patch with the colour of the semantic token that looks at the patch
    most; white lines part what belongs to different ones.

    Args:
        image: the picture.
        looks_SN: how much each semantic token looks at each patch (``StageTrace.assignment``).
        grid: rows and columns of the patch grid.
    """
    rows, columns = grid
    leader = looks_SN.float().argmax(0).view(rows, columns).cpu()
    colours = torch.tensor(token_colours(len(looks_SN)), dtype=torch.uint8)
    tint = _by_patch(colours[leader], image.size)
    return _parted(Image.blend(image.convert("RGB"), tint, _TINT), leader)


def merged(image: Image.Image, group: Tensor) -> Image.Image:
    """``image`` with a colour for each token that stands for several patches; white lines part what
    belongs to different tokens, and patches that are gone fade.

    Args:
        image: the picture.
        group: (rows, columns), the token of each patch, -1 where it is gone: those that
            ``StageTrace.groups`` has for an image.
    """
    tokens, place, size = torch.unique(group, return_inverse=True, return_counts=True)
    colours = torch.tensor(token_colours(len(tokens)), dtype=torch.uint8)
    tinted = Image.blend(image.convert("RGB"), _by_patch(colours[place], image.size), _TINT)
    several = _by_patch(((size > 1)[place] & (group >= 0)).byte() * 255, image.size)
    shown = Image.composite(tinted, fade(image.convert("RGB"), group >= 0), several)
    return _parted(shown, group)


def _by_patch(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A picture of one colour a patch: one pixel for each, enlarged, for edges that are sharp."""
    return Image.fromarray(values.numpy()).resize(size, Image.Resampling.NEAREST)


def _parted(shown: Image.Image, leader: Tensor) -> Image.Image:
    """White lines where neighbouring patches have different numbers in ``leader``."""
    (rows, columns), (width, height) = leader.shape, shown.size
    draw, thick = ImageDraw.Draw(shown), max(1, width // (40 * columns))
    for row, column in (leader[:, 1:] != leader[:, :-1]).nonzero().tolist():
        x = (column + 1) * width // columns
        draw.line([(x, row * height // rows), (x, (row + 1) * height // rows)], _PAPER, thick)
    for row, column in (leader[1:] != leader[:-1]).nonzero().tolist():
        y = (row + 1) * height // rows
        draw.line(
            [(column * width // columns, y), ((column + 1) * width // columns, y)], _PAPER, thick
        )
    return shown


def token_colours(count: int) -> list[tuple[int, int, int]]:
    """``count`` colours; those of neighbouring numbers are far apart."""
    found = []
    for number in range(count):
        lightness = (0.45, 0.6, 0.75)[number % 3]
        colour = colorsys.hls_to_rgb(number * _GOLDEN % 1, lightness, 0.85)
        found.append((round(255 * colour[0]), round(255 * colour[1]), round(255 * colour[2])))
    return found


def histogram(counts: Sequence[int], num_patches: int, side: int = 320) -> Image.Image:
    """How many images kept how many of ``num_patches`` patches; a line marks the mean.

    Args:
        counts: kept patches, one number per image.
        num_patches: right end of the axis.
        side: width and height in pixels.
    """
    per_bar = max(1, -(-num_patches // _BINS))
    bars = torch.bincount(torch.tensor(list(counts)) // per_bar)
    size = max(12, side // 20)
    font = ImageFont.load_default(size)
    left, right, top, bottom = 2 * size, side - size, 2 * size, side - 2 * size
    step, rise = (right - left) / (num_patches + 1), (bottom - top) / int(bars.max())
    canvas = _plain((side, side), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, bar in enumerate(bars.tolist()):
        if bar:
            start, end = place * per_bar, min((place + 1) * per_bar, num_patches + 1)
            across = (left + start * step + 1, max(left + end * step - 1, left + start * step + 2))
            draw.rectangle([across[0], bottom - bar * rise, across[1], bottom], _BAR)
    draw.line([(left, bottom), (right, bottom)], _SOFT_INK)
    mean = left + (sum(counts) / len(counts) + 0.5) * step
    draw.line([(mean, top - size // 2), (mean, bottom)], _INK, 2)
    for number in (0, num_patches // 2, num_patches):
        middle = left + (number + 0.5) * step
        draw.text((middle, bottom + size // 3), str(number), _SOFT_INK, font, anchor="ma")
    draw.text((left - size // 3, top), str(int(bars.max())), _SOFT_INK, font, anchor="rm")
    draw.text((left, size // 4), "images", _SOFT_INK, font)
    return canvas


def histograms(counts: Sequence[Sequence[int]], trace: Trace, side: int = 320) -> list[Panel]:
    """A histogram per stage of the patches that each of several images kept.

    Args:
        counts: per image, the kept patches after each stage.
        trace: of any of the images: says where the stages and how large the grid is.
        side: width and height of each picture in pixels.
    """
    found = []
    for number, stage in enumerate(trace.stages):
        num_patches = math.prod(stage.grid)
        kept = [per_stage[number] for per_stage in counts]
        spread = torch.tensor(kept, dtype=torch.float64)
        found.append(
            Panel(
                histogram(kept, num_patches, side),
                f"stage {number + 1}, before block {stage.block}",
                f"{spread.mean():.0f} ± {spread.std(correction=0):.0f} of {num_patches} patches",
            )
        )
    return found


def easiest_first(counts: Sequence[Sequence[int]]) -> list[int]:
    """Places of the images in the order of what they kept: least at the last stage first, and where
    that is equal at the stages before.
    """
    return sorted(range(len(counts)), key=lambda place: list(counts[place])[::-1])


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


def _prediction(logits_C: Tensor, class_names: Sequence[str] | None, truth: int | None) -> str:
    probability = logits_C.float().softmax(0)
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
