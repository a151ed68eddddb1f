"""Detection as a task of the engine: COCO's form of data in, average precision out.

The result of a run is ``checkpoint/``, of dense and sparse detectors alike; a recipe whose
``model.checkpoint`` is that of a dense detector goes on from it with the method of its own.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.checkpoint import load_strict
from vitrim.config import require
from vitrim.errors import ConfigError, InputError, TrainingError
from vitrim.families.described import describe_data
from vitrim.methods.base import Method
from vitrim.model import eval_mode
from vitrim.tasks.base import Score, Share, Task
from vitrim.tasks.coco_metrics import Result, coco_metrics, coco_results
from vitrim.tasks.config import DetectionConfig
from vitrim.tasks.detection import Detector
from vitrim.tasks.detection_data import (
    SCENE_SIDE,
    DetectionLoader,
    DetectionTrainLoader,
    open_coco,
)
from vitrim.tasks.registry import from_pretrained
from vitrim.tasks.scenes import is_scenes
from vitrim.tools.evaluate import check_weights
from vitrim.train.backbone import create_dense, new_sparse
from vitrim.train.data import digits_data_config
from vitrim.train.recipe import AugmentRecipe, Recipe
from vitrim.train.samples import seeded


class DetectionTask(Task):
    """A detector, its losses, and the dense teacher of its pyramid.

    Args:
        detector: the model to train.
        config: of the task.
        teacher: a detector with a dense backbone, or None; part of no checkpoint.
    """

    name: ClassVar[str] = "detection"

    def __init__(
        self, detector: Detector, config: DetectionConfig, teacher: Detector | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.teacher = detector, config, teacher
        if teacher is not None:
            teacher.requires_grad_(False)
        self.train()

    @classmethod
    def create(cls, recipe: Recipe) -> DetectionTask:
        _check(recipe)
        config: DetectionConfig = recipe.task.build()
        detector = _start(recipe, config)
        teacher = None
        if config.pyramid_weight:
            require(
                detector.sparse is not None and recipe.model.teacher,
                "task.pyramid_weight needs a method, and model.teacher = true",
            )
            teacher = Detector(deepcopy(detector.timm_model), config.detector())
        still_unused(detector)
        return cls(detector, config, teacher)

    @property
    def method(self) -> Method | None:
        sparse = self.model.sparse
        return None if sparse is None else sparse.method

    def train(self, mode: bool = True) -> DetectionTask:
        """Training mode for the model; the teacher never leaves evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def open_data(
        self, recipe: Recipe, share: Share
    ) -> tuple[DetectionTrainLoader, DetectionLoader | None]:
        model, data, config = self.model, recipe.data, self.config
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
        self.data_config = _data_config(model, recipe)
        model.data_config = self.data_config
        if model.sparse is not None:
            model.sparse.data_config = self.data_config
        if config.batch_norm and share.pin_memory and share.num_processes > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model.head)  # type: ignore[no-untyped-call]
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

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        check_weights("trained", model)
        assert isinstance(model, Detector)
        family, noise = model.family, torch.Generator().manual_seed(0)
        images = torch.randn(1, family.in_channels, *family.image_size, generator=noise)
        with eval_mode(model):
            levels = model.levels(images.to(next(model.parameters()).device))
        if not all(bool(level.isfinite().all()) for level in levels):
            raise InputError("the trained model's maps hold NaN or infinity")

    def save(self, model: nn.Module, folder: Path, recipe: Recipe, metrics: dict[str, Any]) -> None:
        assert isinstance(model, Detector)
        start = recipe.model.checkpoint or recipe.model.weights or recipe.model.name
        origin = f"recipe {recipe.name}, from {start}"
        model.save_pretrained(folder / "checkpoint", metrics=metrics, origin=origin)


NAMES = {"bbox": "box", "segm": "mask"}
"""What COCO's kinds of measures are called in logs."""


def kinds(model: Any) -> tuple[str, ...]:
    """COCO's measures of what a detector gives."""
    return ("bbox", "segm") if model.config.has_masks else ("bbox",)


def still_unused(detector: Detector) -> None:
    """Have what no map depends on, the backbone's classifier above all, ask for no gradients."""
    family = detector.family
    images = torch.zeros(1, family.in_channels, *family.image_size)
    parameters = [p for p in detector.backbone.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        output = detector.train_levels(images)
    parts = [level.sum() for level in output.levels] + [*output.losses.values()]
    reached = torch.autograd.grad(torch.stack(parts).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def _check(recipe: Recipe) -> None:
    """Refuse what a recipe may say of classification alone."""
    augment, plain = recipe.augment, AugmentRecipe()
    others = [
        entry.name
        for entry in fields(AugmentRecipe)
        if entry.name not in ("none", "hflip")
        and getattr(augment, entry.name) != getattr(plain, entry.name)
    ]
    require(
        not others,
        f"augment.{' and augment.'.join(others)} is for classification; detectors take "
        "augment.hflip, augment.none, task.short_sides and task.crop_short_sides",
    )
    require(
        recipe.budget.milliseconds is None,
        "budget is for classification; train, and turn the dial of detector.backbone afterwards",
    )
    require(recipe.data.labels, "data.labels is false; a detector learns from objects")


def _start(recipe: Recipe, config: DetectionConfig) -> Detector:
    """The detector that training starts from."""
    if recipe.model.checkpoint is not None:
        return _from_checkpoint(recipe, config, recipe.model.checkpoint)
    backbone = create_dense(recipe.model, recipe.run.seed)
    if recipe.method.name is not None:
        backbone = new_sparse(backbone, recipe.method.build(), recipe)
    with seeded(recipe.run.seed, 9):
        return Detector(backbone, config.detector())


def _from_checkpoint(recipe: Recipe, config: DetectionConfig, folder: str) -> Detector:
    method = recipe.method
    dense = from_pretrained(folder)
    if dense.task != "detection":
        raise ConfigError(f"{folder} holds a model for {dense.task}; task.name is 'detection'")
    started, backbone = dense, dense.backbone
    if dense.sparse is None and method.name is not None:
        backbone = new_sparse(backbone, method.build(), recipe)
    elif dense.sparse is not None:
        if method.name not in (None, dense.sparse.method.name):
            raise ConfigError(
                f"{folder} was made by {dense.sparse.method.name!r}; method.name is {method.name!r}"
            )
        started = from_pretrained(folder, **method.config)
        backbone = started.backbone
        backbone.calibration = ()  # it held for the weights before training
    detector = Detector(backbone, config.detector(), started.classes)
    load_strict(detector.head, started.head.state_dict(), f"the head of {folder}")
    return detector


def _data_config(model: Detector, recipe: Recipe) -> dict[str, Any]:
    """How images are prepared: the backbone's own mean and width, or the embedded set's."""
    config = describe_data(model.timm_model) | model.data_config
    if is_scenes(recipe.data.train):
        side = recipe.data.image_size or SCENE_SIDE
        config |= digits_data_config(side)
    return config
