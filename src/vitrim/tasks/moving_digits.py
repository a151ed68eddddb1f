"""Moving digits: embedded clips whose label needs both the picture and the time.

A real handwritten digit of :mod:`vitrim.train.digits` moves left, right, up or down over a still
ground: a flat one, or, with clutter, a crop of a photograph with distractors. The label is digit
and direction together, 40 classes. The digit leaves on one side and comes in on the other, and
starts anywhere. So a single frame says nothing of the direction, and a model that learned from
single frames is right in about a quarter of the clips; whatever does not know the order of the
frames cannot tell a clip from the same one backwards.

Clip ``i`` of a split is a function of ``(seed, split, epoch, i)`` alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrim.errors import InputError
from vitrim.tasks.video_files import write_video
from vitrim.train.digits import CLASS_NAMES, ClutteredDigits, Split, ink_colour

NAME = "moving-digits"
"""Of the source in recipes and commands, with ``/train``, ``/val`` or ``/test`` behind it."""
FRAMES = 16
SIDE = 64
"""Of a frame in pixels."""
CLUTTER = 0.0
"""Of the still ground, see :class:`ClutteredDigits`: flat, which a model learns in minutes."""
RATE = 16
"""Frames per second of the files."""

_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns that a digit moves by."""
_PACE = (1 / 64, 1 / 40)
"""Slowest and fastest step between two frames, as a share of the side: so slow that the direction
is seen in a few pixels of a few frames."""
_SHARE = (0.55, 0.75)
"""Of the side that a digit takes."""
_KEY = 19
"""Keeps the clips' draws apart from those of other embedded sets."""


class MovingDigits(ClutteredDigits):
    """The drawing of clips; arguments are those of :class:`ClutteredDigits`.

    Items are ``(transform(frames), label)``, where frames are (16, side, side, 3) uint8.
    """

    classes = tuple(f"{digit} {direction}" for digit in CLASS_NAMES for direction in _STEPS)

    def __init__(
        self,
        split: Split = "train",
        length: int = 20_000,
        *,
        image_size: int = SIDE,
        clutter: float = CLUTTER,
        seed: int = 0,
        transform: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        super().__init__(split, length, image_size=image_size, clutter=clutter, seed=seed)
        self.change = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        frames, label = self.clip(index)
        return (frames if self.change is None else self.change(frames)), label

    def clip(self, index: int) -> tuple[np.ndarray, int]:
        """Frames (16, side, side, 3) uint8 of clip ``index``, and its label."""
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        rng = np.random.default_rng((self.seed, _KEY, *map(ord, self.split), self.epoch, index))
        ground = self._background(rng)
        self._draw_clutter(ground, rng)
        number, direction = int(rng.integers(len(self._digits))), int(rng.integers(len(_STEPS)))
        opacity = self._layer(number, rng)
        colour = Image.new("RGB", ground.size, ink_colour(rng))
        rows, columns = list(_STEPS.values())[direction]
        pace = rng.uniform(*_PACE) * self.image_size
        frames = []
        for time in range(FRAMES):
            shift = round(pace * time)
            moved = np.roll(opacity, (rows * shift, columns * shift), (0, 1))
            frames.append(np.asarray(Image.composite(colour, ground, Image.fromarray(moved))))
        return np.stack(frames), int(self._labels[number]) * len(_STEPS) + direction

    def _layer(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Opacity (side, side) of digit ``number``, anywhere, beyond an edge at the other one."""
        side, ink = self.image_size, np.asarray(self._ink(number, rng, _SHARE))
        layer = np.zeros((side, side), np.uint8)
        layer[: len(ink), : len(ink)] = ink
        return np.roll(layer, rng.integers(0, side, size=2), (0, 1))


def is_moving_digits(source: str) -> bool:
    """Whether ``source`` names the embedded clips, and no folder of that name."""
    return source.partition("/")[0] == NAME and not Path(source).exists()


def write_moving_digits(
    folder: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    side: int = SIDE,
    *,
    split: Split = "train",
) -> Path:
    """Write ``count`` clips as MP4 files, ``3_left/000012.mp4``, in a folder for each class that
    occurs; they appear whole or not at all.

    Args:
        folder: a new one, or an empty one.
        count: number of clips.
        seed: everything is a function of it.
        side: of the square frames in pixels, an even number.
        split: whose handwriting and photographs are used; splits share none.

    Raises:
        InputError: the folder is in use, or cannot be written to.
        ConfigError: an argument is out of range.
        MissingExtraError: scikit-learn or PyAV is not installed.
    """
    folder = Path(folder)
    clips = MovingDigits(split, count, image_size=side, seed=seed)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use; give a new folder for the clips")
    draft = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for index in range(count):
            frames, label = clips.clip(index)
            place = draft / clips.classes[label].replace(" ", "_")
            place.mkdir(parents=True, exist_ok=True)
            write_video(place / f"{index:06d}.mp4", frames, RATE)
        os.replace(draft, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
