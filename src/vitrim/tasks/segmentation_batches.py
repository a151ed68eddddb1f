"""Batches of images and labels for a segmenter, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrim.errors import ConfigError, InputError
from vitrim.tasks.base import ALONE, Share
from vitrim.tasks.scenes import IMAGES, LABELS, SIDE, is_scenes, open_scenes
from vitrim.tasks.segmentation import Segmenter
from vitrim.tasks.segmentation_config import SegmentationConfig
from vitrim.tasks.segmentation_data import (
    LabelForm,
    Preparation,
    SegmentationFolder,
    find_folders,
)
from vitrim.train.loader import HeldOutLoader, SampleLoader
from vitrim.train.recipe import Recipe
from vitrim.train.samples import Unreadable

TrainBatch = tuple[Tensor, Tensor, list[tuple[int, int]] | None]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the workers hand over: readable items, and the names of the others."""

    items: list[tuple[Tensor, ...]]
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(cls, found: Sequence[Any]) -> Samples:
        """Readable items and unreadable ones, told apart."""
        unreadable = [item for item in found if isinstance(item, Unreadable)]
        return cls([item for item in found if not isinstance(item, Unreadable)], unreadable)


def open_pairs(
    source: str,
    form: LabelForm,
    transform: Any,
    *,
    training: bool,
    split: str | None = None,
    count: int = 1000,
    side: int | None = None,
    max_skipped: float = 0.01,
) -> SegmentationFolder:
    """The images and labels that ``source`` names.

    Args:
        source: ``scenes/train``, ``scenes/val``, ``scenes/test``, or a folder, see
            :func:`~vitrim.tasks.segmentation_data.find_folders`.
        form: what the numbers of the labels mean.
        transform: prepares an image and its labels.
        training: chooses the split where the folder has some.
        split: name of the split's folders.
        count: of the embedded scenes, how many.
        side: of the embedded scenes in pixels; None: 128.
        max_skipped: share of the images, and of the labels, that may lack the other.

    Raises:
        InputError: the data cannot be used.
    """
    if is_scenes(source):
        folder = open_scenes(source, count, side or SIDE)
        places = folder / IMAGES, folder / LABELS
    else:
        places = find_folders(source, training=training, split=split)
    return SegmentationFolder(*places, form, transform, max_skipped=max_skipped)


def held_out_pairs(
    model: Segmenter, source: str, *, split: str | None = None, count: int = 1000
) -> SegmentationFolder:
    """The images of ``source`` to evaluate ``model`` on, prepared and labelled as it wants them;
    other arguments and errors are those of :func:`open_pairs`.
    """
    transform = preparation_of(model).evaluation
    side = model.data_config["input_size"][-1]
    return open_pairs(
        source, form_of(model), transform, training=False, split=split, count=count, side=side
    )


def form_of(model: Segmenter) -> LabelForm:
    """What the numbers of labels mean to a segmenter."""
    config = model.config
    return LabelForm(config.num_classes, config.ignore_index, config.reduce_zero_label)


def preparation_of(model: Segmenter, **augment: Any) -> Preparation:
    """How images become tensors for a segmenter; ``augment`` are ``scale``, ``hflip`` and
    ``color_jitter`` of training.

    Raises:
        ConfigError: the backbone takes one size, and images are resized to another.
    """
    data, side = model.data_config, model.config.short_side
    side += -side % model.reduction
    try:
        model.family.check_images(
            torch.empty(1, model.family.in_channels, side, side, device="meta")
        )
    except InputError as error:
        raise ConfigError(
            f"with short_side = {model.config.short_side}, {error}. Square images fit with "
            f"short_side = {model.family.image_size[0]} as well"
        ) from error
    return Preparation(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop=tuple(data["input_size"][1:]),
        short_side=model.config.short_side,
        long_side=model.config.long_side,
        divisor=model.reduction,
        **augment,
    )


class SegmentationTrainLoader(SampleLoader):
    """This process's batches of any epoch, from any batch on."""

    def __init__(
        self,
        recipe: Recipe,
        config: SegmentationConfig,
        preparation: Preparation,
        form: LabelForm,
        share: Share,
    ) -> None:
        data = recipe.data
        folder = open_pairs(
            data.train,
            form,
            preparation.training,
            training=True,
            split=data.train_split,
            count=data.length,
            side=data.image_size,
            max_skipped=config.max_skipped,
        )
        super().__init__(folder, recipe, share, Samples.of)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[TrainBatch]:
        """Images (B, 3, H, W), labels (B, H, W), and the images' own sizes where some are padded
        (with sizes, windows that hang over the border see nothing of it, see
        :meth:`vitrim.model.SparseModel.features`).

        Raises:
            TrainingError: more images than the recipe allows cannot be read, or a whole batch.
        """
        for _, batch in self.batches(epoch, first):
            images, labels, own = map(torch.stack, zip(*batch.items, strict=True))
            sizes = [(int(height), int(width)) for height, width in own]
            padded = any(size != tuple(images.shape[-2:]) for size in sizes)
            yield images, labels, sizes if padded else None


class SegmentationLoader(HeldOutLoader):
    """This process's share of the data, whole images: batches of images of one size (B, 3, h, w),
    and the labels of each in its own size (H, W); see :class:`HeldOutLoader`.
    """

    def __init__(
        self,
        folder: SegmentationFolder,
        batch_size: int,
        workers: int = 0,
        share: Share = ALONE,
        limit: int | None = None,
    ) -> None:
        super().__init__(folder, Samples.of, batch_size, workers, share, limit)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for batch in self.batches():
            by_size: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
            for item in batch.items:
                by_size.setdefault(item[0].shape, []).append(item)
            for items in by_size.values():
                images, labels = zip(*items, strict=True)
                yield torch.stack(images), list(labels)
