"""Clips for training and evaluation: a few frames of a video, changed alike, as one tensor.

A source is one of

* a folder with one folder of video files per class,
* a CSV file in Kinetics' form: a line per video with its path and its label, a class number or
  name; the paths lie in the folder of the CSV, or in ``root``,
* ``moving-digits``, the embedded set (``moving-digits/train``, ``/val``, ``/test``).

A video that cannot be read is named, counted and left out, as images are. One that is shorter than
a clip repeats its last frame.
"""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from vitrim.config import closest, read_text
from vitrim.errors import InputError
from vitrim.tasks.moving_digits import NAME, MovingDigits, is_moving_digits
from vitrim.tasks.sampling import Sampling
from vitrim.tasks.video_files import VIDEO_SUFFIXES, VideoFile, import_av
from vitrim.train.class_folders import (
    IMAGES,
    FileKind,
    Samples,
    class_numbers,
    files_in,
    first_of,
    folder_samples,
    natural,
)
from vitrim.train.data import eval_transform
from vitrim.train.samples import UNLABELLED, FolderReader, ReaderDataset, seeded

VIDEOS = FileKind("video", VIDEO_SUFFIXES)
_LARGEST_CSV = 2**28
"""Bytes."""

Value = TypeVar("Value")
FrameChange = Callable[[Image.Image], Tensor]
"""From a picture to (3, H, W), or to several crops of it (crops, 3, H, W)."""


class Video(Protocol):
    """Numbered pictures."""

    def __len__(self) -> int: ...

    def read(
        self, numbers: Iterable[int], change: Callable[[Image.Image], Value]
    ) -> dict[int, Value]:
        """Frames by their numbers, each changed."""


@dataclass(frozen=True, slots=True)
class ClipReader:
    """From a video to a clip (3, T, H, W) for training, or to all views (views, 3, T, H, W)."""

    sampling: Sampling
    change: FrameChange
    """Random ones must draw from the global generators: they are seeded alike for every frame."""
    training: bool = False

    def __call__(self, video: Video) -> Tensor:
        numbers_VT = self.sampling.numbers(len(video), training=self.training)
        key = random.getrandbits(48) if self.training else 0

        def change(image: Image.Image) -> Tensor:
            if not self.training:
                return self.change(image)
            with seeded(key):
                return self.change(image)

        changed = video.read(sorted(set(numbers_VT.flat)), change)
        clips = [torch.stack([changed[number] for number in row], dim=-3) for row in numbers_VT]
        if self.training:
            return clips[0]
        return torch.stack(clips) if self.sampling.crops == 1 else torch.cat(clips)

    def read_file(self, file: BinaryIO) -> Tensor:
        """The same from an open file."""
        with VideoFile(file) as video:
            return self(video)

    def read_array(self, frames_THWC: np.ndarray) -> Tensor:
        """The same from frames in memory."""
        return self(FramesInMemory(frames_THWC))


@dataclass(frozen=True, slots=True, eq=False)
class FramesInMemory:
    """A :class:`Video` of an array (T, H, W, 3) uint8."""

    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def read(
        self, numbers: Iterable[int], change: Callable[[Image.Image], Value]
    ) -> dict[int, Value]:
        return {number: change(Image.fromarray(self.frames[number])) for number in numbers}


@dataclass(frozen=True, slots=True)
class ThreeCrops:
    """A picture resized to the model's height by its shorter side, and three squares of it: from
    both ends of the longer side and from its middle.
    """

    data_config: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, 3, H, W)."""
        side = self.data_config["input_size"][-1]
        mode = functional.InterpolationMode(self.data_config.get("interpolation", "bicubic"))
        large = functional.resize(image, [side], mode)
        across, down = large.width - side, large.height - side
        boxes = [(down * part // 2, across * part // 2, side, side) for part in range(3)]
        crops = [functional.pil_to_tensor(functional.crop(large, *box)) for box in boxes]
        pixels = torch.stack(crops).float() / 255
        normal: Tensor = functional.normalize(
            pixels, list(self.data_config["mean"]), list(self.data_config["std"])
        )
        return normal


def held_out_reader(data_config: dict[str, Any], sampling: Sampling) -> ClipReader:
    """Views for evaluation, prepared as ``data_config`` says."""
    change = eval_transform(data_config) if sampling.crops == 1 else ThreeCrops(data_config)
    return ClipReader(sampling, change)


def is_clips(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` holds videos and not images: the embedded clips, a CSV, a video file, or a
    folder where a video, and no image, is found first.
    """
    path = Path(source)
    if is_moving_digits(os.fspath(source)):
        return True
    if path.is_dir():
        names = (name for _, _, names in os.walk(path) for name in names)
        suffixes = (PurePath(name).suffix.lower() for name in names)
        known = (*VIDEOS.suffixes, *IMAGES.suffixes)
        first = next((suffix for suffix in suffixes if suffix in known), None)
        if first is not None:
            return first in VIDEOS.suffixes
        return bool(files_in(path, VIDEOS))  # which are behind links
    return path.suffix.lower() in (".csv", *VIDEO_SUFFIXES)


def open_clips(
    source: str | os.PathLike[str],
    reader: ClipReader,
    *,
    labelled: bool = True,
    num_classes: int | None = None,
    class_map: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    length: int | None = None,
    image_size: int = 64,
) -> Any:
    """A dataset ``(reader(video), label)`` of a source, see the module's text, with ``classes``.

    Args:
        source: folder, CSV file, video file (without a label), or ``moving-digits``.
        reader: makes clips.
        labelled: False gives label -1 to all, and takes a folder of any layout.
        num_classes: outputs of the model.
        class_map: text file with the classes' names in label order, one per line.
        root: where the paths of a CSV file begin; None is its own folder.
        length: number of clips of the embedded set; None takes 20,000 (training) or 2,000.
        image_size: side of the embedded set's frames in pixels.

    Raises:
        InputError: absent, empty, without class folders, of images, or a CSV that cannot be used.
        MissingExtraError: PyAV is not installed.
    """
    name, path = os.fspath(source), Path(source)
    if is_moving_digits(name):
        split: Any = name.partition("/")[2] or ("train" if reader.training else "val")
        count = length or (20_000 if reader.training else 2_000)
        return MovingDigits(split, count, image_size=image_size, transform=reader.read_array)
    import_av()
    classes: list[str] | None = None
    if path.is_dir():
        _refuse_images(path)
        samples, classes = folder_samples(path, VIDEOS, labelled, num_classes, class_map)
    elif path.suffix.lower() == ".csv" and path.is_file():
        samples, classes = read_csv(path, Path(root or path.parent), labelled, class_map)
    elif path.is_file():
        samples = [(path, UNLABELLED)]
    else:
        raise InputError(
            f"the videos {name} do not exist{closest(name, (NAME,))}; give a folder with one "
            f"folder of videos per class, a .csv file of paths and labels, or {NAME!r}"
        )
    return ReaderDataset(FolderReader(samples), None, classes, reader.read_file, "a video")


def _refuse_images(path: Path) -> None:
    if not files_in(path, VIDEOS) and (images := files_in(path, IMAGES)):
        raise InputError(
            f"{path} holds {len(images)} images, such as {images[0].name}, and no video "
            f"({VIDEOS.named}); clips are made of videos"
        )


def read_csv(
    path: Path, root: Path, labelled: bool, class_map: str | os.PathLike[str] | None
) -> tuple[Samples, list[str] | None]:
    """Videos and labels of a CSV file, and the classes by label where they have names.

    A line is ``path,label`` or ``path label``; a first line ``path,label`` is a heading. Labels are
    all numbers, or all names, which ``class_map`` or else their natural order numbers.

    Raises:
        InputError: it cannot be read, is empty, has a line of another form, a path out of ``root``,
            or a class that ``class_map`` lacks.
    """
    text = read_text(path, InputError, _LARGEST_CSV)
    rows = [_row(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line]
    if rows and rows[0] == ("path", "label"):
        del rows[0]
    if not rows:
        raise InputError(f"{path} names no video; expected lines such as videos/1.mp4,3")
    for name, _ in rows:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(
                f"{path} names {name!r:.200}, which may lie outside of {root}; give paths inside "
                "of it, and another folder by data.root"
            )
    files = [root / name for name, _ in rows]
    if not labelled:
        return [(file, UNLABELLED) for file in files], None
    labels = [label for _, label in rows]
    if all(label.isdecimal() and len(label) < 10 for label in labels):
        return list(zip(files, map(int, labels), strict=True)), None
    numbers = _numbers_of(path, labels, class_map)
    classes = sorted(numbers, key=numbers.__getitem__)
    return [(file, numbers[label]) for file, label in zip(files, labels, strict=True)], classes


def _row(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        cells = next(csv.reader(io.StringIO(line), strict=True))
    except csv.Error as error:
        raise InputError(f"line {number} of {path} is damaged: {error}") from error
    if len(cells) == 1:
        cells = line.rsplit(maxsplit=1)
    cells = [cell.strip() for cell in cells]
    if len(cells) != 2 or not all(cells):
        raise InputError(f"line {number} of {path} is {line!r:.200}; expected a path and a label")
    return cells[0], cells[1]


def _numbers_of(
    path: Path, labels: Sequence[str], class_map: str | os.PathLike[str] | None
) -> dict[str, int]:
    names = sorted(set(labels), key=natural)
    if class_map is None:
        return {name: label for label, name in enumerate(names)}
    known = class_numbers(class_map)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"{class_map} lacks {len(unknown)} class(es) of {path}: {first_of(unknown)}"
        )
    return known
