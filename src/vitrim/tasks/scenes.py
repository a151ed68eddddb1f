"""Embedded scenes: several cluttered digits in a picture, as files of the forms that others use.

They are drawn as the embedded set of :mod:`vitrim.train.digits` is: real handwritten digits on
crops of real photographs, among distractors. A scene has two to six digits side by side, each with
its class, box and mask. Written are PNG images, a json file in COCO's form and PNG labels, so that
detection and segmentation are trained and measured offline through the readers that real data take.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrim.errors import InputError
from vitrim.train.digits import CLASS_NAMES, ClutteredDigits, Split, box_of

IMAGES = "images"
LABELS = "labels"
INSTANCES = "instances.json"
SIDE = 128
"""Of a scene in pixels, where nobody says another."""
LABEL_NAMES = ("background", *CLASS_NAMES)
"""By the values of the PNG labels; a digit's value is also its category in the json file."""

SPLITS = ("train", "val", "test")
_DRAWING = 1
"""Number of the drawing: kept files of another one are not used."""
_SHARE = (0.20, 0.32)
"""Of the picture's side that a digit takes: two of the largest always find room."""


@dataclass(frozen=True)
class SceneObject:
    """One digit of a scene."""

    label: int  # 0 to 9
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive
    mask: np.ndarray  # (side, side) bool, True where the digit has ink


class Scenes(ClutteredDigits):
    """The drawing of scenes; arguments are those of :class:`ClutteredDigits`."""

    def scene(self, index: int) -> tuple[Image.Image, list[SceneObject]]:
        """Picture ``index``, a function of ``(seed, split, index)``, and the digits in it."""
        rng = np.random.default_rng((self.seed, _KEY, *map(ord, self.split), index))
        ground = self._background(rng)
        image = ground.copy()
        self._draw_clutter(image, rng)
        objects, squares = list[SceneObject](), list[tuple[int, int, int]]()
        for _ in range(rng.integers(2, 7)):
            number = int(rng.integers(len(self._digits)))
            ink = self._ink(number, rng, _SHARE)
            place = _place(squares, ink.width, self.image_size, rng)
            if place is None:
                continue
            mask = self._paste_ink(image, ground, ink, place, rng)
            squares.append((*place, ink.width))
            objects.append(SceneObject(int(self._labels[number]), box_of(mask), mask))
        return image, objects


_KEY = 18
"""Keeps the scenes' draws apart from those of the embedded set."""


def _place(
    squares: list[tuple[int, int, int]], side: int, width: int, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Left and top of a square of ``side`` pixels beside the others (left, top, side) in a picture
    of ``width``; None where there is no room.
    """
    free = np.ones((width - side + 1, width - side + 1), dtype=bool)
    for left, top, other in squares:
        free[max(0, top - side + 1) : top + other, max(0, left - side + 1) : left + other] = False
    places = np.flatnonzero(free)
    if not len(places):
        return None
    top, left = divmod(int(places[rng.integers(len(places))]), width - side + 1)
    return left, top


def write_scenes(
    folder: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    side: int = SIDE,
    *,
    split: Split = "train",
) -> Path:
    """Write ``count`` scenes: ``images/*.png``, ``instances.json`` and ``labels/*.png``.

    The same arguments give the same files. They appear whole or not at all.

    Args:
        folder: a new one, or an empty one.
        count: number of scenes.
        seed: everything is a function of it.
        side: of the square pictures in pixels.
        split: whose handwriting and photographs are used; splits share none.

    Raises:
        InputError: the folder is in use, or cannot be written to.
        ConfigError: an argument is out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    folder = Path(folder)
    scenes = Scenes(split, count, image_size=side, seed=seed)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use; give a new folder for the scenes")
    draft = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _write(scenes, draft)
        os.replace(draft, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(scenes: Scenes, folder: Path) -> None:
    for name in (IMAGES, LABELS):
        (folder / name).mkdir(parents=True)
    images, annotations = [], list[dict[str, Any]]()
    for index in range(len(scenes)):
        picture, objects = scenes.scene(index)
        name = f"{index:06d}.png"
        labels = np.zeros((picture.height, picture.width), np.uint8)
        for found in objects:
            labels[found.mask] = 1 + found.label
            number = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(number | _annotation(found))
        picture.save(folder / IMAGES / name)
        Image.fromarray(labels).save(folder / LABELS / name)
        size = {"height": picture.height, "width": picture.width}
        images.append({"id": index + 1, "file_name": name} | size)
    categories = [{"id": 1 + label, "name": name} for label, name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / INSTANCES).write_text(json.dumps(content))


def _annotation(found: SceneObject) -> dict[str, Any]:
    left, top, right, bottom = found.box
    columns = found.mask.T.ravel()
    edges = np.flatnonzero(np.diff(columns, prepend=False, append=not columns[-1]))
    runs = np.diff(edges, prepend=0).tolist()
    return {
        "category_id": 1 + found.label,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(found.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(found.mask.shape), "counts": runs},
    }


def is_scenes(source: str) -> bool:
    """Whether ``source`` names the embedded scenes, and no folder of that name."""
    return source.partition("/")[0] == "scenes" and not Path(source).exists()


def open_scenes(source: str, count: int, side: int = SIDE, seed: int = 0) -> Path:
    """The folder of the embedded scenes that ``source`` names: ``scenes/train``, ``scenes/val`` or
    ``scenes/test``. They are written once, into the user's cache (``XDG_CACHE_HOME``).

    Raises:
        InputError, ConfigError, MissingExtraError: as :func:`write_scenes`.
    """
    split: Any = source.partition("/")[2]
    if split not in SPLITS:
        known = ", ".join(f"scenes/{name}" for name in SPLITS)
        raise InputError(f"{source!r} is none of the embedded scenes; use one of {known}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vitrim" / f"scenes-{_DRAWING}-{split}-{count}-{side}-{seed}"
    if not folder.is_dir():
        try:
            write_scenes(folder, count, seed, side, split=split)
        except InputError:  # unless another process was faster
            if not folder.is_dir():
                raise
    return folder
