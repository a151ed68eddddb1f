"""Detection as a task of the engine: COCO's form of data in, average precision out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import InputError, TrainingError
from vitrim.modes import eval_mode
from vitrim.tasks.base import Score, Share
from vitrim.tasks.coco_metrics import Result, coco_metrics, coco_results
from vitrim.tasks.config import DetectionConfig
from vitrim.tasks.detection import Detector
from vitrim.tasks.detection_data import DetectionLoader, DetectionTrainLoader, open_coco
from vitrim.tasks.head_task import HeadTask
from vitrim.train.recipe import Recipe


class DetectionTask(HeadTask):
    """A detector, its losses, and the dense teacher of its pyramid."""

    name: ClassVar[str] = "detection"
    augments: ClassVar[Sequence[str]] = ("hflip",)
    config: DetectionConfig

    @staticmethod
    def new(backbone: nn.Module, config: DetectionConfig, classes: Sequence[str] = ()) -> Detector:
        return Detector(backbone, config.detector(), classes)

    def open_data(
        self, recipe: Recipe, share: Share
    ) -> tuple[DetectionTrainLoader, DetectionLoader | None]:
        model, data, config = self.model, recipe.data, self.config
        for side in config.short_sides:
            height, width = config.fixed_size or [min(side, config.long_side)] * 2
            channels = model.family.in_channels
            model.check_seen(torch.empty(1, channels, height, width, device="meta"))
        common: dict[str, Any] = {
            "masks": config.has_masks,
            "side": data.image_size,
            "max_skipped": config.max_skipped,
        }
        found = open_coco(
            data.train,
            config.train_annotations,
            classes=model.classes,
            crowd=False,
            count=data.length,
            **common,
        )
        names = tuple(found.categories.values())
        if len(names) != config.num_classes - 1:
            raise InputError(
                f"{found.file} has {len(names)} categories, and the head {config.num_classes - 1} "
                f"beside the background; set task.num_classes = {len(names) + 1}"
            )
        model.classes = names
        self.prepare_model(recipe, share, batch_norm=config.batch_norm)
        loader = DetectionTrainLoader(found, recipe, config, share)
        if data.val is None:
            return loader, None
        held_out = open_coco(
            data.val,
            config.val_annotations,
            classes=names,
            count=data.val_length,
            **common,
        )
        return loader, DetectionLoader(held_out, data.batch_size, data.workers, share)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]], seed: int = 0
    ) -> dict[str, Tensor]:
        """Loss terms by name and ``"total"``.

        Args:
            images: (3, H, W) each, from 0 to 1.
            targets: ``boxes``, ``labels`` and ``masks`` of each.
            seed: of the method's noise.
        """
        generator = torch.Generator(images[0].device).manual_seed(seed)
        weight = self.config.pyramid_weight
        terms: dict[str, Tensor] = self.model.losses(
            images, targets, self.teacher, generator, pyramid_weight=weight
        )
        return terms

    def evaluate(self, model: nn.Module, validation: DetectionLoader, accelerator: Any) -> Score:
        """COCO's AP of boxes, which decides, and of masks."""
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        found, ids = list[Result](), list[int]()
        with eval_mode(model), torch.no_grad():
            for images, targets in validation:
                on_device = [image.to(accelerator.device) for image in images]
                with accelerator.autocast():
                    outputs = model(on_device)
                for target, output in zip(targets, outputs, strict=True):
                    ids.append(target["image_id"])
                    found += coco_results(validation.folder, target["image_id"], output)
        found, ids = gather_object(found), gather_object(ids)
        if not ids:
            raise InputError("no validation image can be read; check data.val")
        try:
            metrics = coco_metrics(validation.folder, found, kinds(model), ids)
        except InputError as error:
            raise TrainingError(f"{error}; the last saved state and result are kept") from error
        named = {
            f"val_{NAMES[kind]}_{name.lower()}": value
            for kind, values in metrics.items()
            for name, value in values.items()
            if value is not None
        }
        return Score(metrics["bbox"]["AP"] or 0.0, named, len(ids))


NAMES = {"bbox": "box", "segm": "mask"}
"""What COCO's kinds of measures are called in logs."""


def kinds(model: Any) -> tuple[str, ...]:
    """COCO's measures of what a detector gives."""
    return ("bbox", "segm") if model.config.has_masks else ("bbox",)
