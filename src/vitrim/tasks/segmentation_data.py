"""Images with a class for every pixel: a folder of images, and one of labels as PNG files.

Two forms are read: ADE20K's (``images/training``, ``annotations/training`` and the same for
``validation``), and a pair of folders (``images``, ``labels``). A label has its image's name, up to
the ending, in the same place. Its pixels are class numbers, in 8 or 16 bits, grey or as a palette's
indices. What cannot be used, such as an image without its label or a label of another size, is
named, counted and left out, as with every other reader here.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter

from vitrim.errors import InputError
from vitrim.runtime import UnreadableImageError, open_file, open_image
from vitrim.tasks.left_out import LeftOut
from vitrim.train.class_folders import files_in

IGNORED = -100
"""Of pixels that have no class; what torch's cross entropy leaves out."""
SPLITS = {True: ("training", "train"), False: ("validation", "val")}
"""Names of the folders of a split, for training or not."""
_GREY = ("1", "L", "P", "I", "I;16", "I;16B")
_MOST_AREA = 0.75
"""Share of a training crop that one class may have, if another crop has less (mmseg's
``cat_max_ratio``)."""
_TRIES = 10

Pair = tuple[Image.Image, np.ndarray]


@dataclass(frozen=True, slots=True)
class LabelForm:
    """What the numbers in the PNG files mean."""

    num_classes: int
    """Classes that the model tells apart."""
    ignore_index: int = 255
    """Number of pixels without a class."""
    reduce_zero_label: bool = False
    """0 is no class either, and 1 is the first class (ADE20K's)."""

    def read(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Class numbers (H, W) int64 of the label ``path``, :data:`IGNORED` where there is none.

        Args:
            path: PNG file.
            size: width and height of its image.

        Raises:
            UnreadableImageError: it is absent, damaged, no grey PNG or palette, of another size, or
                a number is none of the classes.
        """
        try:
            with open_file(path) as file, Image.open(file, formats=("PNG",)) as opened:
                if opened.size != size:
                    raise ValueError(
                        f"it has {opened.width} x {opened.height} pixels, and its image "
                        f"{size[0]} x {size[1]}"
                    )
                if opened.mode not in _GREY:
                    raise ValueError(
                        f"its pixels are {opened.mode}; expected class numbers (grey, or a palette)"
                    )
                values = np.array(opened).astype(np.int64)
            return self.classes(values)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise UnreadableImageError(str(path), str(error) or repr(error)) from error

    def classes(self, values: np.ndarray) -> np.ndarray:
        """Class numbers of a file's numbers; :class:`ValueError` for one that is no class."""
        first = int(self.reduce_zero_label)
        nothing = (values == self.ignore_index) | (values < first)
        labels = np.where(nothing, IGNORED, values - first)
        if labels.max(initial=0) >= self.num_classes:
            known = f"{first} to {first + self.num_classes - 1}"
            raise ValueError(
                f"it holds the number {int(labels.max()) + first}; the classes are {known}, and "
                f"{self.ignore_index} is no class"
            )
        return labels


class SegmentationFolder(Dataset[Any]):
    """Images with their labels; items are ``transform(image, labels)`` of the PIL image and the
    class numbers (H, W) int64, or the two where there is no transform.

    Args:
        images: folder of images, at any depth.
        labels: folder of PNG files.
        form: what their numbers mean.
        transform: prepares the two together.
        max_skipped: share of the images, and of the labels, that may lack the other.

    Raises:
        InputError: a folder is absent, no image has a label, or more than that share lack one.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        form: LabelForm,
        transform: Callable[[Image.Image, np.ndarray], Any] | None = None,
        *,
        max_skipped: float = 0.01,
    ) -> None:
        self.form, self.transform = form, transform
        root, label_root = Path(images), Path(labels)
        for folder in (root, label_root):
            if not folder.is_dir():
                raise InputError(f"the folder {folder} does not exist")
        found = [(path, path.relative_to(root).with_suffix("")) for path in files_in(root)]
        known = {
            path.relative_to(label_root).with_suffix(""): path
            for path in files_in(label_root)
            if path.suffix.lower() == ".png"
        }
        self.pairs = [(path, known[stem]) for path, stem in found if stem in known]
        self.skipped_images = LeftOut("images", root)
        self.skipped_labels = LeftOut("labels", label_root)
        for path, stem in found:
            if stem not in known:
                self.skipped_images.add("without a label", path.name)
        for stem in known.keys() - {stem for _, stem in found}:
            self.skipped_labels.add("without an image", known[stem].name)
        if not self.pairs:
            raise InputError(
                f"no image of {root} has a label in {label_root}; a label has its image's name, up "
                "to the ending, and is a PNG file"
            )
        self.skipped_images.tell(len(found), max_skipped)
        self.skipped_labels.tell(len(known), max_skipped)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        path, label_path = self.pairs[index]
        image = open_image(path)
        labels = self.form.read(label_path, image.size)
        return (image, labels) if self.transform is None else self.transform(image, labels)


def find_folders(
    source: str | os.PathLike[str], *, training: bool, split: str | None = None
) -> tuple[Path, Path]:
    """The folders of images and of labels under ``source``.

    Args:
        source: holds ``images`` and ``annotations`` (or ``labels``), with or without one folder
            per split.
        training: chooses the split where there are some.
        split: name of the split's folders; None takes those of :data:`SPLITS`.

    Raises:
        InputError: there are none.
    """
    root = Path(source)
    names = SPLITS[training] if split is None else (split,)
    others = {name for both in SPLITS.values() for name in both}
    for labels in ("annotations", "labels"):
        for name in names:
            pair = root / "images" / name, root / labels / name
            if all(folder.is_dir() for folder in pair):
                return pair
        pair = root / "images", root / labels
        # Never the images of all splits together.
        is_split = any((pair[0] / name).is_dir() for name in others)
        if split is None and not is_split and all(folder.is_dir() for folder in pair):
            return pair
    raise InputError(
        f"{root} has no folders of images and labels; expected images/{names[0]} and "
        f"annotations/{names[0]} (ADE20K's form), or images and labels"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """How images and labels become tensors, for training (:meth:`training`) and for evaluation
    (:meth:`evaluation`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: tuple[int, int]
    """Height and width of training images."""
    short_side: int
    """Of an image, in pixels, before the random scale."""
    long_side: int
    """No longer than this, before the random scale."""
    divisor: int = 1
    """Sides of images in evaluation are multiples of it."""
    scale: tuple[float, ...] = (0.5, 2.0)
    """Smallest and largest random scale."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation."""

    def training(self, image: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """A random crop: image (3, *crop) normalised, labels (*crop), and the height and width that
        the image takes of it, from the top left corner; the rest is padding, zeros without a class.

        Draws from Python's and torch's global generators.
        """
        factor = self._factor(image.size) * random.uniform(*self.scale)
        image, labels = _resized(image, labels, factor)
        image, labels = self._cropped(image, labels)
        if random.random() < self.hflip:
            image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1]
        if self.color_jitter:
            image = ColorJitter(*[self.color_jitter] * 3)(image)
        size = torch.tensor(labels.shape)
        padded = torch.full(self.crop, IGNORED)
        padded[: size[0], : size[1]] = torch.from_numpy(labels.copy())
        pixels = torch.zeros(3, *self.crop)
        pixels[:, : size[0], : size[1]] = self.normalised(image)
        return pixels, padded, size

    def evaluation(self, image: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The whole image resized (3, h, w) normalised, and its labels (H, W) as they are."""
        return self.whole(image), torch.from_numpy(labels)

    def whole(self, image: Image.Image) -> Tensor:
        """The whole image resized (3, h, w) normalised, as evaluation takes it."""
        size = _scaled(image.size, self._factor(image.size), self.divisor)
        return self.normalised(image.resize(size, _BILINEAR))

    def normalised(self, image: Image.Image) -> Tensor:
        """(3, H, W) of an RGB image."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    def _factor(self, size: tuple[int, int]) -> float:
        return min(self.short_side / min(size), self.long_side / max(size))

    def _cropped(self, image: Image.Image, labels: np.ndarray) -> Pair:
        """A random crop in which no class has nearly everything, if a few tries find one."""
        height, width = (min(a, b) for a, b in zip(self.crop, labels.shape, strict=True))
        for _ in range(_TRIES):
            top = random.randint(0, labels.shape[0] - height)
            left = random.randint(0, labels.shape[1] - width)
            part = labels[top : top + height, left : left + width]
            counts = np.bincount(part[part >= 0])
            if np.count_nonzero(counts) > 1 and counts.max() < _MOST_AREA * counts.sum():
                break
        return image.crop((left, top, left + width, top + height)), part


_BILINEAR = Image.Resampling.BILINEAR


def _scaled(size: tuple[int, int], factor: float, divisor: int = 1) -> tuple[int, int]:
    """Sides times ``factor``, as near to it as multiples of ``divisor`` are."""
    width, height = (max(1, math.floor(side * factor / divisor + 0.5)) * divisor for side in size)
    return width, height


def _resized(image: Image.Image, labels: np.ndarray, factor: float) -> Pair:
    """Both by ``factor``; a pixel's class is that of the nearest one."""
    width, height = _scaled(image.size, factor)
    rows = (np.arange(height) + 0.5) * labels.shape[0] / height
    columns = (np.arange(width) + 0.5) * labels.shape[1] / width
    nearest = labels[rows.astype(int)[:, None], columns.astype(int)]
    return image.resize((width, height), _BILINEAR), nearest
