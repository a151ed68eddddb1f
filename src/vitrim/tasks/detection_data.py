"""Images with objects on their way to a detector: where they lie, how they are changed, in batches.

The random changes are those of DETR's authors, by torchvision's operators: a mirror image, and for
every second image a crop of random size; images are resized by the detector, which draws the length
of the shorter side. What is drawn for a sample is a function of the run's seed, the epoch and the
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from vitrim.errors import InputError
from vitrim.tasks.base import ALONE, Share
from vitrim.tasks.coco import CocoFolder
from vitrim.tasks.config import DetectionConfig
from vitrim.tasks.scenes import IMAGES, INSTANCES, SIDE, is_scenes, open_scenes
from vitrim.train.loader import HeldOutLoader, SampleLoader
from vitrim.train.recipe import AugmentRecipe, Recipe
from vitrim.train.samples import Unreadable

Target = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DetectionBatch:
    """What the workers hand over."""

    images: list[Tensor]
    """(3, H, W) each, float, from 0 to 1."""
    targets: list[Target]
    """As torchvision's detectors take them."""
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.images)


def collate(items: Sequence[Any]) -> DetectionBatch:
    """List the readable items, and the others."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    return DetectionBatch(
        [image for image, _ in readable], [target for _, target in readable], unreadable
    )


def open_coco(
    source: str,
    annotations: str | None,
    *,
    classes: Sequence[str] | None,
    masks: bool,
    crowd: bool = True,
    count: int = 1000,
    side: int | None = None,
    max_skipped: float = 0.01,
) -> CocoFolder:
    """The images and objects that ``source`` names.

    Args:
        source: ``scenes/train``, ``scenes/val``, ``scenes/test``; a folder with ``images/`` and
            ``instances.json`` in it; or the folder of the images themselves.
        annotations: the json file, where the images lie in ``source`` itself.
        classes: names by label; None takes those of the file.
        masks: read masks too.
        crowd: whether crowd regions are among the targets.
        count: of the embedded scenes, how many.
        side: of the embedded scenes in pixels; None: 128.
        max_skipped: share of the images, and of the annotations, that may be of no use.

    Raises:
        InputError: the data cannot be used, or have classes that ``classes`` lack.
    """
    folder = Path(source)
    if is_scenes(source):
        folder = open_scenes(source, count, side or SIDE)
    if annotations is None and not (folder / INSTANCES).is_file():
        raise InputError(
            f"{source} has no {INSTANCES}; give a folder with {IMAGES}/ and {INSTANCES} in it, "
            "the json file of a folder of images, or the embedded set, scenes/val"
        )
    images = folder if annotations is not None else folder / IMAGES
    return CocoFolder(
        images,
        annotations or folder / INSTANCES,
        classes=list(classes) if classes else None,
        masks=masks,
        crowd=crowd,
        max_skipped=max_skipped,
    )


class DetectionSamples(Dataset[Any]):
    """Items of a :class:`CocoFolder` with float images, changed at random where it is asked for."""

    def __init__(
        self,
        folder: CocoFolder,
        augment: AugmentRecipe | None = None,
        config: DetectionConfig | None = None,
    ) -> None:
        self.folder, self.augment, self.config = folder, augment, config

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.folder[index]
        if self.augment is not None and self.config is not None and not self.augment.none:
            image, target = _changed(image, target, self.augment.hflip, self.config)
        return image.float() / 255, target


def _changed(
    image: Tensor, target: Target, hflip: float, config: DetectionConfig
) -> tuple[Tensor, Target]:
    """An image with its objects, mirrored, or cropped, or both, or neither."""
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
    parts: list[Any] = [tv_tensors.Image(image), boxes]
    if "masks" in target:
        parts.append(tv_tensors.Mask(target["masks"]))
    if torch.rand(()) < hflip:
        parts = [functional.horizontal_flip(part) for part in parts]
    crops = bool(config.crop_short_sides) and bool(torch.rand(()) < 0.5)
    if crops:
        parts = _cropped(parts, config)
    found = [part.as_subclass(Tensor) for part in parts]
    changed = target | {"boxes": found[1]}
    if "masks" in target:
        changed["masks"] = found[2]
    return found[0], _with_extent(changed) if crops else changed


def _cropped(parts: list[Any], config: DetectionConfig) -> list[Any]:
    """All parts resized to one of the short sides, then cropped at a random place and size."""
    height, width = parts[0].shape[-2:]
    short = config.crop_short_sides[_draw(0, len(config.crop_short_sides) - 1)]
    scale = short / min(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    least, most = config.crop_sides
    sides = [_draw(min(least, side), min(most, side)) for side in size]
    corner = [_draw(0, side - kept) for side, kept in zip(size, sides, strict=True)]
    resized = [functional.resize(part, size, antialias=True) for part in parts]
    return [functional.crop(part, *corner, *sides) for part in resized]


def _draw(least: int, most: int) -> int:
    """A whole number from ``least`` to ``most``."""
    return int(torch.randint(least, most + 1, ()))


def _with_extent(target: Target) -> Target:
    """The objects that a crop has left something of."""
    boxes = target["boxes"]
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    if "masks" in target:
        keep &= target["masks"].flatten(1).bool().any(1)
    per_object = ("boxes", "labels", "area", "iscrowd", "masks")
    return {name: value[keep] if name in per_object else value for name, value in target.items()}


class DetectionTrainLoader(SampleLoader):
    """This process's batches ``(images, targets)`` of any epoch, from any batch on."""

    def __init__(
        self, folder: CocoFolder, recipe: Recipe, config: DetectionConfig, share: Share
    ) -> None:
        samples = DetectionSamples(folder, recipe.augment, config)
        super().__init__(samples, recipe, share, collate)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Batches of ``epoch`` from number ``first`` on.

        Raises:
            TrainingError: more images than the recipe allows cannot be read, or a whole batch.
        """
        for _, batch in self.batches(epoch, first):
            yield batch.images, batch.targets


class DetectionLoader(HeldOutLoader):
    """Batches ``(images, targets)`` of this process's share of the data, once per iteration; see
    :class:`HeldOutLoader`.
    """

    def __init__(
        self,
        folder: CocoFolder,
        batch_size: int,
        workers: int = 0,
        share: Share = ALONE,
        limit: int | None = None,
    ) -> None:
        super().__init__(DetectionSamples(folder), collate, batch_size, workers, share, limit)
        self.folder = folder

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target]]]:
        for batch in self.batches():
            yield batch.images, batch.targets
