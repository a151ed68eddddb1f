"""COCO data: a folder of images, and a json file with the boxes, classes and masks in them.

What users of pycocotools expect is kept: crowd regions are marked, an image may have no object, a
mask is a polygon or a run-length code, compressed or not, an area that is not given is measured.
What pycocotools would fail on, or read wrongly in silence, is left out, counted and told: records
without a usable image, category, box or mask. More of it than a share, and the data are refused.
No address in the file is ever followed, and no image outside the folder is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.config import closest, read_text, shown
from vitrim.errors import InputError, MissingExtraError
from vitrim.runtime import UnreadableImageError, open_image
from vitrim.tasks.left_out import LeftOut

MOST_BYTES = 2**31
"""Of a json file; the largest of COCO has 450 MB, that of LVIS 1.1 GB."""
MOST_SIDE = 2**15
"""Of an image, in pixels."""

Target = dict[str, Any]
Box = tuple[float, float, float, float]


class _UnfitError(Exception):
    """A record is of no use; the text is the reason."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of the file."""

    id: int
    file_name: str
    """Relative to the folder of images."""
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An annotation."""

    label: int
    """From 1; 0 is the background in torchvision's detectors."""
    box_XYWH: Box
    """Left, top, width and height in pixels, as in the file."""
    area: float
    """In square pixels: the file's, or else the mask's, or else the box's."""
    is_crowd: bool
    """Whether it is a region of many objects, which no detector is asked to find."""
    shape: Sequence[Any] | None
    """Polygons (lists of x, y, x, y ...), or the lengths of runs (down the columns, from runs
    without the object), or None where masks were not asked for.
    """


class CocoFolder(Dataset[tuple[Tensor, Target]]):
    """Images with their objects; items are ``(image, target)``.

    ``image`` is uint8 (3, H, W). ``target`` has torchvision's keys: ``boxes`` (N, 4) float32 as
    x1, y1, x2, y2 within the image, ``labels`` (N,) int64 from 1 without gaps, ``masks`` (N, H, W)
    uint8 where they were asked for, ``area`` (N,) float32, ``iscrowd`` (N,) int64, and
    ``image_id``. N is 0 for an image without objects.

    Args:
        images: folder of the images.
        annotations: json file.
        classes: names in label order, such as a trained head's; None takes the file's categories
            in the order of their ids.
        masks: read masks as well; False is for detectors of boxes.
        crowd: False leaves crowd regions out of the targets, as training does.
        max_skipped: share of the images, and of the annotations, that may be of no use.

    Raises:
        InputError: the file or folder is absent, damaged, empty, leads out of the folder, has a
            category that ``classes`` lacks, or too much of it is of no use.
        MissingExtraError: pycocotools is not installed; masks need it.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        masks: bool = True,
        crowd: bool = True,
        max_skipped: float = 0.01,
    ) -> None:
        self.folder, self.file = Path(images), Path(annotations)
        self.masks, self.crowd = masks, crowd
        if not self.folder.is_dir():
            raise InputError(f"the folder of images {images} does not exist")
        if masks:
            mask_tools()
        content = _read(self.file)
        ids = _category_ids(content["categories"], self.file)
        names = list(ids) if classes is None else list(classes)
        _check_classes(ids, names, self.file)
        self.categories: dict[int, str] = dict(enumerate(names, start=1))
        """Names by label."""
        self.category_ids = {
            label: ids[name] for label, name in self.categories.items() if name in ids
        }
        """Ids in the file by label; a class that the file does not know has none."""
        self.skipped_images = LeftOut("images", self.file)
        self.skipped_annotations = LeftOut("annotations", self.file)
        self._read_images(content["images"])
        self._read_objects(content["annotations"])
        self.skipped_images.tell(len(content["images"]), max_skipped)
        self.skipped_annotations.tell(len(content["annotations"]), max_skipped)
        if not self.images or not any(self.objects.values()):
            found = f"{self.skipped_images}; {self.skipped_annotations}".strip("; ")
            missing = "objects" if self.images else "images"
            raise InputError(f"{self.file} has no {missing} that can be used {found}".rstrip())

    def _read_images(self, records: Iterable[Any]) -> None:
        self.images: list[CocoImage] = []
        listed, self._absent = set[int](), set[int]()
        for record in records:
            try:
                image = _image(record)
            except _UnfitError as error:
                self.skipped_images.add(str(error), _name(record))
                continue
            if image.id in listed:
                raise InputError(f"{self.file} has two images of id {image.id}; give each its own")
            listed.add(image.id)
            _check_inside(image.file_name, self.file)
            if os.path.isfile(self.folder / image.file_name):
                self.images.append(image)
            else:
                self._absent.add(image.id)
                self.skipped_images.add(f"not in {self.folder}", image.file_name)

    def _read_objects(self, records: Iterable[Any]) -> None:
        images = {image.id: image for image in self.images}
        labels = {number: label for label, number in self.category_ids.items()}
        self.objects: dict[int, list[CocoObject]] = {number: [] for number in images}
        for record in records:
            number = record.get("image_id") if isinstance(record, dict) else None
            if _is_whole(number) and number in self._absent:
                continue  # it was told that the image is absent
            try:
                if not _is_whole(number) or number not in images:
                    raise _UnfitError("of an image that the file does not list")
                found = _object(record, images[number], labels, self.masks)
            except _UnfitError as error:
                self.skipped_annotations.add(str(error), _name(record))
            else:
                self.objects[number].append(found)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        record = self.images[index]
        path = str(self.folder / record.file_name)
        picture = open_image(path)
        if picture.size != (record.width, record.height):
            raise UnreadableImageError(
                path,
                f"it has {picture.width} x {picture.height} pixels, and {record.width} x "
                f"{record.height} in {self.file}",
            )
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return image, self.target(index)

    def target(self, index: int) -> Target:
        """What is in image ``index``, without reading it."""
        image = self.images[index]
        objects = [o for o in self.objects[image.id] if self.crowd or not o.is_crowd]
        boxes = [_within(o.box_XYWH, image) for o in objects]
        target: Target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([o.label for o in objects], dtype=torch.int64),
            "area": torch.tensor([o.area for o in objects], dtype=torch.float32),
            "iscrowd": torch.tensor([o.is_crowd for o in objects], dtype=torch.int64),
            "image_id": image.id,
        }
        if self.masks:
            masks = np.zeros((len(objects), image.height, image.width), np.uint8)
            for mask, found in zip(masks, objects, strict=True):
                mask[:] = drawn(found, image)
            target["masks"] = torch.from_numpy(masks)
        return target


def mask_tools() -> Any:
    """The module for masks of pycocotools.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingExtraError("data in COCO's form", "pycocotools", "dense") from error
    return mask


def encoded(found: CocoObject, image: CocoImage) -> dict[str, Any]:
    """The mask of an object as pycocotools' compressed run-length code."""
    return _encode(found.shape, image)


def drawn(found: CocoObject, image: CocoImage) -> np.ndarray:
    """The mask of an object, (height, width) uint8 of 0 and 1."""
    code = encoded(found, image)["counts"].decode()
    runs = run_lengths(code) or []
    columns = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return columns.reshape(image.width, image.height).T


def _encode(shape: Any, image: CocoImage) -> dict[str, Any]:
    tools, size = mask_tools(), (image.height, image.width)
    if isinstance(shape[0], list):
        code: dict[str, Any] = tools.merge(tools.frPyObjects(shape, *size))
    else:
        code = tools.frPyObjects({"size": list(size), "counts": shape}, *size)
    return code


def _read(path: Path) -> dict[str, list[Any]]:
    """The three lists of a json file in COCO's form."""
    text = read_text(path, InputError, MOST_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no json file: {error}") from error
    names = ("images", "annotations", "categories")
    found = content if isinstance(content, dict) else {}
    missing = [name for name in names if not isinstance(found.get(name), list)]
    empty = [name for name in names if found.get(name) == []]
    if missing or empty:
        raise InputError(
            f"{path} has {'no list' if missing else 'an empty list'} of "
            f"{' and '.join(missing or empty)}; data in COCO's form have "
            f"{', '.join(names)} (instances_*.json)"
        )
    return {name: found[name] for name in names}


def _category_ids(records: list[Any], path: Path) -> dict[str, int]:
    """Ids by name, in the order of the ids."""
    ids, taken = dict[str, int](), set[int]()
    for record in records:
        sound = isinstance(record, dict) and isinstance(record.get("name"), str)
        if not sound or not _is_whole(record.get("id")):
            raise InputError(
                f"{path} has the category {shown(record)}; expected an id and a name of each"
            )
        if record["name"] in ids or record["id"] in taken:
            raise InputError(f"{path} has two categories of one id or name: {shown(record)}")
        ids[record["name"]] = record["id"]
        taken.add(record["id"])
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _check_classes(ids: Mapping[str, int], names: Sequence[str], path: Path) -> None:
    unknown = [*(ids.keys() - set(names))]
    if unknown:
        raise InputError(
            f"{path} has {len(unknown)} categories that the model does not know: "
            f"{', '.join(map(shown, unknown[:5]))}{closest(unknown[0], names)}; it knows "
            f"{', '.join(map(shown, names[:5]))}{' ...' if len(names) > 5 else ''}. Use data of "
            "the model's classes, or train a model for these"
        )


def _image(record: Any) -> CocoImage:
    if not isinstance(record, dict) or not _is_whole(record.get("id")):
        raise _UnfitError("without an id that is a whole number")
    name = record.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise _UnfitError("without a file_name")
    sides = (record.get("height"), record.get("width"))
    if not all(_is_whole(side) and 1 <= side <= MOST_SIDE for side in sides):
        raise _UnfitError(f"without a height and width from 1 to {MOST_SIDE}")
    return CocoImage(record["id"], name, *sides)  # type: ignore[arg-type]  # checked


def _check_inside(name: str, path: Path) -> None:
    """Refuse a file name that leads out of the folder of images."""
    parts = PureWindowsPath(name)  # takes both separators, and knows drives
    if parts.drive or parts.root or ".." in parts.parts:
        raise InputError(
            f"{path} names the image {shown(name)}, which is not inside the folder of images; use "
            "names relative to it"
        )


def _object(
    record: dict[str, Any], image: CocoImage, labels: Mapping[int, int], masks: bool
) -> CocoObject:
    category, box = record.get("category_id"), record.get("bbox")
    if not _is_whole(category) or category not in labels:
        raise _UnfitError("of a category that the file does not list")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise _UnfitError("without a box of four numbers")
    left, top, right, bottom = _within(box, image)  # type: ignore[arg-type]  # four numbers
    if not (left < right and top < bottom):
        raise _UnfitError("whose box has no extent within the image")
    if record.get("iscrowd") not in (0, 1, None):
        raise _UnfitError("whose iscrowd is neither 0 nor 1")
    shape = _shape(record.get("segmentation"), image) if masks else None
    area = record.get("area")
    if not (_is_number(area) and area >= 0):
        area = box[2] * box[3] if shape is None else mask_tools().area(_encode(shape, image))
    return CocoObject(
        label=labels[category],
        box_XYWH=tuple(map(float, box)),  # type: ignore[arg-type]  # four
        area=float(area),
        is_crowd=bool(record.get("iscrowd")),
        shape=shape,
    )


def _within(box_XYWH: Box, image: CocoImage) -> Box:
    """x1, y1, x2, y2, cut off at the image's edges."""
    left, top, width, height = box_XYWH
    right, bottom = left + width, top + height
    return (
        min(max(left, 0.0), image.width),
        min(max(top, 0.0), image.height),
        min(max(right, 0.0), image.width),
        min(max(bottom, 0.0), image.height),
    )


def _shape(segmentation: Any, image: CocoImage) -> list[Any]:
    """Polygons or run lengths that pycocotools can draw in the image."""
    if isinstance(segmentation, dict):
        return _runs(segmentation, image)
    if not isinstance(segmentation, list) or not segmentation:
        raise _UnfitError("without a mask")
    # Fewer than three points enclose nothing; other polygons of the object may.
    polygons = [p for p in segmentation if not isinstance(p, list) or len(p) >= 6]
    if not polygons:
        raise _UnfitError("whose polygons have fewer than three points")
    for polygon in polygons:
        _check_polygon(polygon, image)
    return polygons


def _check_polygon(polygon: Any, image: CocoImage) -> None:
    # A set of millions of polygons is opened: whatever is in C here saves minutes.
    even = isinstance(polygon, list) and len(polygon) % 2 == 0
    if not even or not set(map(type, polygon)) <= {int, float}:
        raise _UnfitError("whose polygons are no lists of x, y, x, y ...")
    across, down = polygon[::2], polygon[1::2]
    width, height = image.width, image.height
    # The outline is drawn point by point: what is far away would take all memory.
    if not (
        -width <= min(across) <= max(across) <= 2 * width
        and -height <= min(down) <= max(down) <= 2 * height
    ):
        raise _UnfitError("whose polygons lie far outside of the image")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    outline = abs(np.diff(points, axis=0)).max(1).sum()
    if not outline <= height * width + 4 * (height + width):
        raise _UnfitError("whose polygons have outlines longer than the image has pixels")


def _runs(segmentation: dict[str, Any], image: CocoImage) -> list[int]:
    if segmentation.get("size") != [image.height, image.width]:
        raise _UnfitError("whose mask is of another size than the image")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = run_lengths(counts)
    if not isinstance(counts, list) or not all(_is_whole(run) and run >= 0 for run in counts):
        raise _UnfitError("whose mask is a damaged run-length code")
    if sum(counts) != image.height * image.width:
        raise _UnfitError("whose run-length code does not fill the image")
    return counts


def run_lengths(code: str) -> list[int] | None:
    """The run lengths in COCO's compressed form; None where it is damaged.

    Each number takes characters of 5 bits, lowest first, with a bit for "more follows", and is the
    difference to the number before the last from the fourth number on (pycocotools'
    ``rleFrString``, which trusts the text).
    """
    runs: list[int] = []
    value = shift = 0
    for character in code:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that pixels can have: neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _name(record: Any) -> str:
    """What a message calls a record of the file."""
    number = record.get("id") if isinstance(record, dict) else record
    return f"id {shown(number)}"
