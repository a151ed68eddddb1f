"""Images for training and evaluation: folders, timm's other readers, and the embedded set.

A source is one of

* a folder with one folder of images per class, or a ``.tar`` of the same,
* the name of a timm reader with its prefix: ``hfds/...``, ``wds/...``, ``tfds/...``, ``torch/...``,
* ``digits``, the embedded set (``digits/train``, ``digits/val``, ``digits/test``).

An image that cannot be read is named, counted and left out; it is never replaced by another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from vitrim.config import closest
from vitrim.errors import InputError
from vitrim.runtime import open_image
from vitrim.train.class_folders import (
    IMAGE_SUFFIXES,
    IMAGES,
    class_numbers,
    first_of,
    folder_samples,
    label_order,
    natural,
)
from vitrim.train.digits import MEAN, SMALLEST_SIDE, STD, ClutteredDigits
from vitrim.train.samples import (
    FolderReader,
    ReaderDataset,
    SkipUnreadable,
    TarReader,
    Transform,
    Unreadable,
    collate,
    is_hidden,
)

READERS = ("hfds", "hfids", "tfds", "torch", "wds")


def open_dataset(
    source: str | os.PathLike[str],
    transform: Transform | None = None,
    *,
    training: bool = False,
    labelled: bool = True,
    num_classes: int | None = None,
    class_map: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    length: int | None = None,
    image_size: int = 64,
    seed: int = 0,
) -> Any:
    """Open a source of images (see the module's text).

    Args:
        source: folder, tar file, reader name, or ``digits``.
        transform: applied to each PIL image; None keeps the PIL image.
        training: chooses the split where the source has several, and shuffling in streams.
        labelled: False gives label -1 to all, and takes a folder of any layout.
        num_classes: outputs of the model. At 1000, folders named by ImageNet ids take their
            ImageNet-1k labels, whether all thousand are present or not.
        class_map: text file with the class folders' names in label order, one per line.
        root: where the data of a prefixed reader lie.
        split: of a prefixed reader; None takes ``train`` or ``validation``.
        length: number of samples of the embedded set; None takes 20,000 (training) or 2,000.
        image_size: side of the embedded set's pictures in pixels; smaller ones than the set has are
            left to ``transform``.
        seed: of the embedded set and of shuffling streams.

    Returns:
        A dataset of ``(transform(image), label)`` with ``classes`` (names in label order, or None).
        It is map-style, except for streaming readers (``wds/``, ``tfds/``, ``hfids/``).

    Raises:
        InputError: absent, empty, without class folders, or a class folder without images.
    """
    name = os.fspath(source)
    prefix, _, rest = name.partition("/")
    if is_digits(name):
        default_split = "train" if training else "val"
        return ClutteredDigits(
            rest or default_split,  # type: ignore[arg-type]  # the class checks it
            length or (20_000 if training else 2_000),
            image_size=max(image_size, SMALLEST_SIDE),
            seed=seed,
            transform=transform,
        )
    if prefix.lower() in READERS:
        split = split or ("train" if training else "validation")
        return _open_reader(name, transform, training, root, split, class_map, seed)
    path = Path(name)
    if path.is_file() and path.suffix == ".tar":
        return _open_tar(path, transform, labelled, num_classes, class_map)
    if not path.is_dir():
        kinds = [f"{reader}/..." for reader in READERS]
        raise InputError(
            f"the data folder {name} does not exist{closest(prefix, (*READERS, 'digits'))}; give a "
            f"folder with one folder of images per class, a .tar of it, 'digits', or a reader name "
            f"({', '.join(kinds)})"
        )
    samples, classes = folder_samples(path, IMAGES, labelled, num_classes, class_map)
    return ReaderDataset(FolderReader(samples), transform, classes)


def is_digits(source: str) -> bool:
    """Whether ``source`` names the embedded set, and no folder of that name."""
    return source.partition("/")[0] == "digits" and not Path(source).exists()


def _open_reader(
    name: str,
    transform: Transform | None,
    training: bool,
    root: str | os.PathLike[str] | None,
    split: str,
    class_map: str | os.PathLike[str] | None,
    seed: int,
) -> Any:
    for text in (name, os.fspath(root or ""), split):
        if "pipe:" in text or "://" in text or "::" in text:
            raise InputError(
                f"{text!r} is no path: data are read from files alone, not from pipes and addresses"
            )
    try:
        dataset: Any = create_dataset(
            name,
            root=None if root is None else os.fspath(root),
            split=split,
            search_split=False,
            class_map=class_numbers(class_map) if class_map else None,  # type: ignore[arg-type]
            is_training=training,
            seed=seed,
        )
    except Exception as error:  # readers of many libraries
        raise InputError(
            f"timm cannot open the data {name or root} (split {split!r}, root {root}): "
            f"{error or repr(error)}"
        ) from error
    if type(dataset) is ImageFolder:
        return _without_hidden(dataset, transform)
    if hasattr(dataset, "loader"):  # torchvision's
        dataset.loader = open_image
    if isinstance(dataset, ImageDataset):
        # timm's own dataset puts the next image in the place of a damaged one.
        numbers = getattr(dataset.reader, "class_to_idx", None)
        classes = sorted(numbers, key=numbers.__getitem__) if numbers else None
        return ReaderDataset(dataset.reader, transform, classes)
    dataset.transform = transform
    return dataset


def _without_hidden(dataset: ImageFolder, transform: Transform | None) -> ReaderDataset:
    """Torchvision's folder of class folders, which takes hidden folders for classes, in its order
    and by the opener of all images.
    """
    root = Path(dataset.root)
    classes = [name for name in dataset.classes if not is_hidden(name)]
    number = {dataset.class_to_idx[name]: label for label, name in enumerate(classes)}
    samples = [
        (Path(path), number[label])
        for path, label in dataset.samples
        if not is_hidden(str(Path(path).relative_to(root)))
    ]
    return ReaderDataset(FolderReader(samples), transform, classes)


def _open_tar(
    path: Path,
    transform: Transform | None,
    labelled: bool,
    num_classes: int | None,
    class_map: str | os.PathLike[str] | None,
) -> ReaderDataset:
    reader = TarReader(path, IMAGE_SUFFIXES)
    if not len(reader):
        raise InputError(f"the archive {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    if not labelled:
        return ReaderDataset(reader, transform, None)
    folders = sorted({reader.folder(index) for index in range(len(reader))}, key=natural)
    classes = label_order(folders, num_classes, class_map)
    number = {name: label for label, name in enumerate(classes)}
    reader.labels = [number[reader.folder(index)] for index in range(len(reader))]
    return ReaderDataset(reader, transform, classes)


def check_label_space(dataset: Any, num_classes: int) -> None:
    """Check that the labels of ``dataset`` are those of a head with ``num_classes`` outputs.

    Raises:
        InputError: the numbers of classes differ.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None or len(classes) == num_classes:
        return
    raise InputError(
        f"the data have {len(classes)} classes ({first_of(list(map(str, classes)), 3)}) and the "
        f"model has {num_classes} outputs; use data of the model's classes, give class_map= (a "
        "text file with all class folders in label order) if they are a subset, or a model whose "
        "num_classes fits"
    )


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """The evaluation transform of a timm data config (resize, crop, normalise)."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform: Transform = create_transform(
        **{key: data_config[key] for key in keys if key in data_config}, is_training=False
    )
    return transform


def digits_data_config(image_size: int) -> dict[str, Any]:
    """How the embedded set is prepared: its own mean and width, nothing cropped."""
    return {
        "input_size": (3, image_size, image_size),
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


class EvalLoader:
    """Batches ``(images, labels)`` in a fixed order, once per iteration.

    ``unreadable`` names the images that the latest iteration left out. With ``num_shards`` each
    process gets every ``num_shards``-th image, and none twice.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        workers: int = 0,
        *,
        limit: int | None = None,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        self.dataset = dataset
        self.unreadable: list[Unreadable] = []
        self._streams = isinstance(dataset, IterableDataset)
        self._limit = limit if self._streams else None
        if self._streams:
            # Streaming readers share the data out among processes themselves.
            self._loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate)
            return
        total = len(dataset)
        count = total if limit is None else min(limit, total)
        # Evenly spread: the first images of a folder data set are all of one class.
        indices = [position * total // count for position in range(count)]
        self._loader = DataLoader(
            SkipUnreadable(dataset),
            batch_size,
            sampler=indices[shard::num_shards],
            num_workers=workers,
            collate_fn=collate,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable = []
        left = self._limit
        for batch in self._loader:
            self.unreadable += batch.unreadable
            images, labels = batch.images[:left], batch.labels[:left]
            if len(labels):
                yield images, labels
            if left is not None:
                left -= len(labels)
                if left <= 0:
                    return


def eval_loader(
    source: str | os.PathLike[str] | Dataset[Any],
    data_config: dict[str, Any],
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    **options: Any,
) -> EvalLoader:
    """Batches ``(images, labels)`` prepared by the evaluation transform of ``data_config``.

    Args:
        source: as in :func:`open_dataset`, or a dataset that gives prepared ``(image, label)``.
        data_config: timm's (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``).
        batch_size: images per batch.
        workers: processes that read images; 0 reads in this one.
        limit: use this many images, spread evenly over the source; None uses all.
        options: handed to :func:`open_dataset` (``num_classes``, ``class_map``, ``split`` ...).

    Raises:
        InputError: as :func:`open_dataset`.
    """
    if not isinstance(source, Dataset):
        options.setdefault("image_size", data_config["input_size"][-1])
        source = open_dataset(source, eval_transform(data_config), **options)
    return EvalLoader(source, batch_size, workers, limit=limit)
