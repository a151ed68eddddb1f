"""Classification of videos: any classifier of ``classification.py``, trained on clips.

A model of clips takes them whole. A model of images, dense or sparse, is trained on their frames,
each with the clip's label, and judged by the mean of its answers to them. The result of a run is
that of classification: ``checkpoint/``, or ``backbone.safetensors`` with ``backbone.json``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.methods.base import Method
from vitrim.model import SparseModel
from vitrim.tasks.base import Score, Share, Task
from vitrim.tasks.classification import (
    DenseTask,
    SparseTask,
    create_task,
    data_config_of,
    input_shape,
    top1,
)
from vitrim.tasks.clips import ClipReader, held_out_reader, open_clips
from vitrim.tasks.config import VideoConfig
from vitrim.tasks.labelled import TrainLoader, training_transform
from vitrim.tasks.moving_digits import is_moving_digits
from vitrim.tasks.video import FRAMES_OF_IMAGES, Views, folded, on_clips, takes_clips
from vitrim.train.data import EvalLoader, check_label_space, digits_data_config
from vitrim.train.recipe import Recipe

logger = logging.getLogger(__name__)


class VideoTask(Task):
    """A classifier on clips.

    Args:
        inner: the model and its losses.
        config: of the task.
    """

    name: ClassVar[str] = "video"

    def __init__(self, inner: SparseTask | DenseTask, config: VideoConfig) -> None:
        super().__init__()
        self.inner, self.model, self.config = inner, inner.model, config
        self.takes_clips = takes_clips(inner.model)

    @classmethod
    def create(cls, recipe: Recipe) -> VideoTask:
        require(
            recipe.budget.milliseconds is None,
            "budget is for images; train, and turn the dial of the model afterwards",
        )
        splits = recipe.data.train_split, recipe.data.val_split
        require(splits == (None, None), "data.train_split and val_split are not for videos")
        _check_flips(recipe)
        return cls(create_task(recipe), recipe.task.build())

    @property
    def method(self) -> Method | None:
        return self.inner.method

    def open_data(self, recipe: Recipe, share: Share) -> tuple[TrainLoader, EvalLoader | None]:
        self.data_config = self.inner.data_config = self._prepared(recipe)
        model, data = self.model, recipe.data
        if isinstance(model, SparseModel):
            model.data_config = self.data_config
            model.family.check_images(torch.empty(1, *input_shape(self.data_config), device="meta"))
        num_classes = self.inner.backbone.num_classes
        options = {
            "num_classes": num_classes,
            "class_map": data.class_map,
            "root": data.root,
            "image_size": self.data_config["input_size"][-1],
        }
        sampling = self.config.sampling(self.frames)
        reader = ClipReader(
            sampling, training_transform(recipe.augment, self.data_config), training=True
        )
        clips = open_clips(data.train, reader, labelled=data.labels, length=data.length, **options)
        _warn_of_flips(recipe, getattr(clips, "classes", None))
        loader = TrainLoader(recipe, self.data_config, num_classes, share, clips)
        if data.val is None:
            return loader, None
        reader = held_out_reader(self.data_config, sampling)
        videos = open_clips(data.val, reader, length=data.val_length, **options)
        check_label_space(videos, num_classes)
        places = {"shard": share.rank, "num_shards": share.num_processes}
        return loader, EvalLoader(videos, data.batch_size, data.workers, **places)

    @property
    def frames(self) -> int:
        """Of a clip."""
        frames: int = self.config.frames or self.data_config.get("frames", FRAMES_OF_IMAGES)
        return frames

    def _prepared(self, recipe: Recipe) -> dict[str, Any]:
        """How frames are prepared, and, of a model of clips, how many and how far apart."""
        config = data_config_of(self.inner, recipe)
        if is_moving_digits(recipe.data.train):
            config |= digits_data_config(config["input_size"][-1])
        if self.takes_clips:
            config["frames"] = self.config.frames or config["frames"]
            config["stride"] = self.config.stride
        return config

    def forward(
        self, clips: Tensor, target: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Loss terms by name and ``"total"``, of clips (B, 3, T, H, W)."""
        if not self.takes_clips:
            frames, clips = clips.shape[2], folded(clips)
            target = None if target is None else target.repeat_interleave(frames, 0)
        terms: dict[str, Tensor] = self.inner(clips, target, seed)
        return terms

    def evaluate(self, model: nn.Module, validation: EvalLoader, accelerator: Any) -> Score:
        """Top-1 by the mean over the views; of the backbone alone too, where the method is meant to
        leave a good one.
        """
        top, videos = top1(accelerator, self._judged(model), validation)
        found = {"val_top1": top}
        if isinstance(model, SparseModel) and model.method.serves_dense:
            found["val_dense_top1"] = top1(accelerator, self._judged(model.backbone), validation)[0]
        views = self.config.clips * self.config.crops
        return Score(top, found, videos, {"val_views": views})

    def _judged(self, model: nn.Module) -> Views:
        return Views(on_clips(model, self.frames))

    def check(self, model: nn.Module) -> None:
        self.inner.check(model)

    def save(self, model: nn.Module, folder: Path, recipe: Recipe, metrics: dict[str, Any]) -> None:
        self.inner.save(model, folder, recipe, metrics)


def _check_flips(recipe: Recipe) -> None:
    """Refuse mirror images of clips whose label is a direction."""
    mirrored = recipe.augment.hflip > 0 and not recipe.augment.none
    require(
        not (mirrored and is_moving_digits(recipe.data.train)),
        f"augment.hflip is {recipe.augment.hflip:g}, and moving digits are told apart by their "
        "direction, which a mirror turns round; set augment.hflip = 0",
    )


def _warn_of_flips(recipe: Recipe, classes: Any) -> None:
    if not recipe.augment.hflip or recipe.augment.none:
        return
    sided = [name for name in classes or () if {"left", "right"} & set(name.lower().split())]
    if sided:
        logger.warning(
            "classes such as %r depend on the direction, and augment.hflip = %g mirrors clips",
            sided[0],
            recipe.augment.hflip,
        )
