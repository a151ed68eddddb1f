"""Cluttered digits: the embedded data set, made from scikit-learn's own files, offline.

Real handwritten digits (``load_digits``, 8 x 8) are scaled, coloured and laid on crops of real
photographs (``load_sample_images``) among distractors: pieces of other digits and pen strokes. It
is the translated-cluttered-digits benchmark of the attention models (Mnih et al. 2014, "Recurrent
models of visual attention", section 4.1) on real backgrounds: most of the picture says nothing
about the label, which is what token sparsity is for. Every sample has a class, a box and a mask.

Sample ``i`` of a split is a function of ``(seed, split, i)`` alone, so any worker makes the same
one. The splits share neither a handwritten digit nor a region of a photograph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from vitrim.errors import ConfigError, MissingExtraError

Split = Literal["train", "val", "test"]

CLASS_NAMES = tuple(str(digit) for digit in range(10))
SMALLEST_SIDE = 48
"""Of a picture in pixels."""
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

# Share of the handwritten digits, and of each photograph's width, that a split may use.
_SPLITS: dict[str, tuple[float, float]] = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1)}
_MAX_CROP = 1.6  # of a photograph, relative to the picture's side
_SPLIT_KEYS = {"train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class DigitSample:
    """One picture with everything that is known about it."""

    image: Image.Image  # RGB, image_size x image_size
    label: int  # 0 to 9
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive
    mask: np.ndarray  # (image_size, image_size) bool, True where the digit has ink


class ClutteredDigits(Dataset[tuple[Any, int]]):
    """The embedded data set; items are ``(transform(image), label)``.

    Args:
        split: which handwriting and which photograph regions to draw from.
        length: number of samples, at most ten million.
        image_size: side of the square picture in pixels, from 48 to 2048.
        clutter: 1 is the data set; less fades the photograph and thins the distractors, down to a
            lone digit on a flat ground at 0. It is a curriculum for training from scratch.
        seed: everything is a function of it.
        transform: applied to the PIL image by ``__getitem__``; None keeps the PIL image.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ConfigError: an argument is out of range.
    """

    classes = CLASS_NAMES

    def __init__(
        self,
        split: Split = "train",
        length: int = 20_000,
        *,
        image_size: int = 64,
        clutter: float = 1.0,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if split not in _SPLITS:
            raise ConfigError(f"split is {split!r}; use one of {', '.join(_SPLITS)}")
        if not (1 <= length <= 10_000_000 and SMALLEST_SIDE <= image_size <= 2048 and seed >= 0):
            raise ConfigError(
                f"length {length}, image_size {image_size} and seed {seed}: expected 1 to ten "
                f"million samples of {SMALLEST_SIDE} to 2048 pixels, and a seed of 0 or more"
            )
        self.split = split
        self.length = length
        self.image_size = image_size
        self.clutter = clutter
        self.seed = seed
        self.epoch = 0
        self.transform = transform
        self._digits, self._labels, regions = _sources(split)
        # Narrow regions are enlarged so that the largest crop finds room.
        side = max(320, math.ceil(_MAX_CROP * image_size) + 1)
        self._photos = [_at_least(region, side) for region in regions]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.sample(index)
        image = sample.image if self.transform is None else self.transform(sample.image)
        return image, sample.label

    def set_epoch(self, epoch: int) -> None:
        """Let every epoch show new pictures; training calls it, evaluation stays at epoch 0."""
        self.epoch = epoch

    def sample(self, index: int) -> DigitSample:
        """Sample ``index`` with its box and mask."""
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        rng = np.random.default_rng((self.seed, _SPLIT_KEYS[self.split], self.epoch, index))
        ground = self._background(rng)
        image = ground.copy()
        self._draw_clutter(image, rng)
        return self._paste_digit(image, ground, rng)

    def _draw_clutter(self, image: Image.Image, rng: np.random.Generator) -> None:
        for _ in range(round(self.clutter * rng.integers(2, 6))):
            self._paste_fragment(image, rng)
        for _ in range(round(self.clutter * rng.integers(1, 4))):
            self._draw_stroke(image, rng)

    def _background(self, rng: np.random.Generator) -> Image.Image:
        photo = self._photos[rng.integers(len(self._photos))]
        side = int(rng.uniform(1.0, _MAX_CROP) * self.image_size)
        left = int(rng.integers(0, photo.width - side + 1))
        top = int(rng.integers(0, photo.height - side + 1))
        size = (self.image_size, self.image_size)
        box = (left, top, left + side, top + side)
        image = photo.resize(size, Image.Resampling.BILINEAR, box=box)
        if self.clutter < 1:
            flat = Image.new("RGB", size, tuple(np.asarray(image).mean((0, 1)).astype(int)))
            image = Image.blend(flat, image, self.clutter)
        return image

    def _paste_fragment(self, image: Image.Image, rng: np.random.Generator) -> None:
        """A quarter or so of some digit: the texture of ink, but no class."""
        ink = self._ink(int(rng.integers(len(self._digits))), rng)
        side = max(ink.width * 2 // 5, 6)
        left, top = rng.integers(0, ink.width - side + 1, size=2)
        piece = ink.crop((left, top, left + side, top + side))
        x, y = (int(v) for v in rng.integers(-2, self.image_size - side + 3, size=2))
        image.paste(ink_colour(rng), (x, y), piece)

    def _draw_stroke(self, image: Image.Image, rng: np.random.Generator) -> None:
        start = rng.uniform(0, self.image_size, size=2)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3) * self.image_size
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        line = (float(start[0]), float(start[1]), float(end[0]), float(end[1]))
        width = int(rng.integers(1, 4))
        ImageDraw.Draw(image).line(line, fill=ink_colour(rng), width=width)

    def _paste_digit(
        self, image: Image.Image, ground: Image.Image, rng: np.random.Generator
    ) -> DigitSample:
        index = int(rng.integers(len(self._digits)))
        ink = self._ink(index, rng)
        left, top = (int(v) for v in rng.integers(0, self.image_size - ink.width + 1, size=2))
        mask = self._paste_ink(image, ground, ink, (left, top), rng)
        return DigitSample(image, int(self._labels[index]), box_of(mask), mask)

    def _paste_ink(
        self,
        image: Image.Image,
        ground: Image.Image,
        ink: Image.Image,
        place: tuple[int, int],
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Lay ``ink`` on the bare ground with its corner at ``place``; returns the picture's mask:
        clutter surrounds a digit and never lies under it, so every label can be read.
        """
        left, top = place
        image.paste(ground.crop((left, top, left + ink.width, top + ink.height)), place)
        image.paste(ink_colour(rng), place, ink)
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        mask[top : top + ink.height, left : left + ink.width] = np.asarray(ink) > 96
        return mask

    def _ink(
        self, index: int, rng: np.random.Generator, share: tuple[float, float] = (0.40, 0.55)
    ) -> Image.Image:
        """Digit ``index`` as an opacity map, scaled to a ``share`` of the picture's side."""
        side = int(rng.uniform(*share) * self.image_size)
        ink = self._digits[index].resize((side, side), Image.Resampling.BICUBIC)
        return ink.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is True in ``mask``; right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def ink_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour, for digit and distractors alike, on photographs that are dimmed below it."""
    red, green, blue = rng.integers(190, 256, size=3)
    return int(red), int(green), int(blue)


@lru_cache(maxsize=3)
def _sources(split: Split) -> tuple[list[Image.Image], np.ndarray, list[Image.Image]]:
    """Digits (as 8-bit opacity), labels and photograph regions that ``split`` may use."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise MissingExtraError("the embedded data set", "scikit-learn", "demo") from error
    start, end = _SPLITS[split]
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[int(start * len(order)) : int(end * len(order))]
    opacity = (data.images[chosen] * (255 / 16)).clip(0, 255).astype(np.uint8)
    # One empty pixel of margin keeps the ink whole when it is rotated.
    digits = [Image.fromarray(np.pad(image, 1)) for image in opacity]
    # Dimmed, so that light ink can be read everywhere.
    photos = [
        Image.fromarray((photo * 0.6).astype(np.uint8)) for photo in load_sample_images().images
    ]
    regions = [
        photo.crop((int(start * photo.width), 0, int(end * photo.width), photo.height))
        for photo in photos
    ]
    return digits, data.target[chosen], regions


def _at_least(photo: Image.Image, side: int) -> Image.Image:
    scale = side / min(photo.size)
    if scale <= 1:
        return photo
    size = (round(photo.width * scale), round(photo.height * scale))
    return photo.resize(size, Image.Resampling.BICUBIC)
