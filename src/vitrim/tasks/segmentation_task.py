"""Segmentation as a task of the engine: folders of images and labels in, mean IoU out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.errors import ConfigError, InputError, TrainingError
from vitrim.modes import eval_mode
from vitrim.tasks.base import Score, Share
from vitrim.tasks.head_task import HeadTask
from vitrim.tasks.scenes import LABEL_NAMES, is_scenes
from vitrim.tasks.segmentation import Own, Segmenter
from vitrim.tasks.segmentation_batches import (
    SegmentationLoader,
    SegmentationTrainLoader,
    form_of,
    open_pairs,
    preparation_of,
)
from vitrim.tasks.segmentation_config import SegmentationConfig
from vitrim.tasks.segmentation_metrics import PixelCounts, segmentation_metrics
from vitrim.train.recipe import Recipe


class SegmentationTask(HeadTask):
    """A segmenter, its losses, and the dense teacher of its pyramid."""

    name: ClassVar[str] = "segmentation"
    augments: ClassVar[Sequence[str]] = ("hflip", "color_jitter")
    data_heeded: ClassVar[Sequence[str]] = (*HeadTask.data_heeded, "train_split", "val_split")
    config: SegmentationConfig

    @staticmethod
    def new(
        backbone: nn.Module, config: SegmentationConfig, classes: Sequence[str] = ()
    ) -> Segmenter:
        return Segmenter(backbone, config.segmenter(), classes)

    def open_data(
        self, recipe: Recipe, share: Share
    ) -> tuple[SegmentationTrainLoader, SegmentationLoader | None]:
        config, data, model = self.config, recipe.data, self.model
        batch_norm = config.norm == "batch"
        require(
            not batch_norm or data.batch_size > 1,
            "task.norm is 'batch', over the images of a batch, and data.batch_size is 1; set "
            "task.norm = 'group'",
        )
        self.prepare_model(recipe, share, batch_norm=batch_norm)
        model.classes = _class_names(recipe, config) or model.classes
        augment: dict[str, Any] = {"scale": (1.0, 1.0), "hflip": 0.0}
        if not recipe.augment.none:
            augment = {"scale": config.scale, "hflip": recipe.augment.hflip}
            augment["color_jitter"] = recipe.augment.color_jitter
        self._check_padding(augment["scale"][0])
        preparation, form = preparation_of(model, **augment), form_of(model)
        loader = SegmentationTrainLoader(recipe, config, preparation, form, share)
        if data.val is None:
            return loader, None
        held_out = open_pairs(
            data.val,
            form,
            preparation.evaluation,
            training=False,
            split=data.val_split,
            count=data.val_length,
            side=data.image_size,
            max_skipped=config.max_skipped,
        )
        return loader, SegmentationLoader(held_out, data.batch_size, data.workers, share)

    @torch.no_grad()
    def _check_padding(self, smallest: float) -> None:
        """Refuse a random scale that leaves padding which the backbone would look at."""
        channels, *crop = self.data_config["input_size"]
        due = max(crop) / self.config.short_side
        if smallest >= due:
            return
        try:
            with eval_mode(self.model):
                self.model.levels(torch.zeros(1, channels, *crop), [tuple(crop)])
        except ConfigError as error:
            raise ConfigError(
                f"images scaled by {smallest:g} are smaller than the crop, and {error}. Here: set "
                f"task.scale to {due:.3g} or more"
            ) from error

    def forward(
        self, images: Tensor, labels: Tensor, sizes: Own = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Loss terms by name and ``"total"``; arguments as of :meth:`Segmenter.losses`, and the
        seed of the method's noise.
        """
        terms: dict[str, Tensor] = self.model.losses(
            images,
            labels,
            sizes,
            self.teacher,
            torch.Generator(images.device).manual_seed(seed),
            aux_weight=self.config.aux_weight,
            pyramid_weight=self.config.pyramid_weight,
        )
        return terms

    @torch.no_grad()
    def evaluate(self, model: nn.Module, validation: SegmentationLoader, accelerator: Any) -> Score:
        """Mean IoU, which decides, mean accuracy of the classes, and accuracy of the pixels."""
        pixels = PixelCounts(self.config.num_classes)
        with eval_mode(model):
            for images, labels in validation:
                with accelerator.autocast():
                    scores = model(images.to(accelerator.device))
                pixels.note(scores, labels)
        own = torch.tensor([len(pixels.counts), pixels.broken])
        sums = torch.cat([own, pixels.counts.sum(0).flatten()]).to(accelerator.device)
        count, broken, *totals = accelerator.reduce(sums, "sum").tolist()
        if broken:
            raise TrainingError(
                f"the scores of {broken} of {count + broken} validation images hold NaN or "
                "infinity; the last saved state and result are kept"
            )
        if not count:
            raise InputError("no validation image can be read; check data.val")
        metrics = segmentation_metrics(torch.tensor(totals).view(3, -1))
        named = {f"val_{name}": value for name, value in metrics.items()}
        return Score(metrics["miou"], named, count)


def _class_names(recipe: Recipe, config: SegmentationConfig) -> tuple[str, ...]:
    if not is_scenes(recipe.data.train):
        return config.class_names
    require(
        config.num_classes == len(LABEL_NAMES),
        f"task.num_classes is {config.num_classes}; the embedded scenes have {len(LABEL_NAMES)}",
    )
    return LABEL_NAMES
