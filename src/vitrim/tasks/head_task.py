"""What the tasks have in common that put a head on the pyramid of a backbone.

The result of a run is ``checkpoint/``, of dense and sparse models alike; a recipe whose
``model.checkpoint`` is that of a dense one goes on from it with a method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vitrim.checkpoint import load_strict
from vitrim.config import require
from vitrim.errors import ConfigError, InputError
from vitrim.families.described import describe_data
from vitrim.methods.base import Method
from vitrim.modes import eval_mode
from vitrim.tasks.base import Share, Task
from vitrim.tasks.model import TaskModel
from vitrim.tasks.opened import from_pretrained
from vitrim.tasks.scenes import SIDE, is_scenes
from vitrim.tools.evaluate import check_weights
from vitrim.train.backbone import create_dense, new_sparse
from vitrim.train.data import digits_data_config
from vitrim.train.recipe import AugmentRecipe, DataRecipe, Recipe
from vitrim.train.samples import seeded


class HeadTask(Task):
    """A model with a head, its losses, and the dense teacher of its pyramid.

    Args:
        model: to be trained.
        config: of the task.
        teacher: a model with a dense backbone, or None; part of no checkpoint.
    """

    model: Any
    augments: ClassVar[Sequence[str]]
    """Fields of a recipe's ``augment`` that the task heeds."""
    data_heeded: ClassVar[Sequence[str]] = (
        *("train", "val", "length", "val_length", "labels", "image_size"),
        *("batch_size", "workers", "max_unreadable"),
    )
    """The same of its ``data``."""

    def __init__(self, model: Any, config: Any, teacher: Any = None) -> None:
        super().__init__()
        self.model, self.config, self.teacher = model, config, teacher
        if teacher is not None:
            teacher.requires_grad_(False)
        self.train()

    @staticmethod
    def new(backbone: nn.Module, config: Any, classes: Sequence[str] = ()) -> Any:
        """The model on ``backbone`` that the task's config describes, with new weights."""
        raise NotImplementedError

    @classmethod
    def create(cls, recipe: Recipe) -> HeadTask:
        cls._check_recipe(recipe)
        config = recipe.task.build()
        model = cls._start(recipe, config)
        teacher = None
        if config.pyramid_weight:
            require(
                model.sparse is not None and recipe.model.teacher,
                "task.pyramid_weight needs a method, and model.teacher = true",
            )
            teacher = cls.new(deepcopy(model.timm_model), config)
        still_unused(model)
        return cls(model, config, teacher)

    @property
    def method(self) -> Method | None:
        sparse = self.model.sparse
        return None if sparse is None else sparse.method

    def train(self, mode: bool = True) -> HeadTask:
        """Training mode for the model; the teacher never leaves evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        check_weights("trained", model)
        assert isinstance(model, TaskModel)
        family, noise = model.family, torch.Generator().manual_seed(0)
        images = torch.randn(1, family.in_channels, *family.image_size, generator=noise)
        with eval_mode(model):
            levels = model.levels(images.to(next(model.parameters()).device))
        if not all(bool(level.isfinite().all()) for level in levels):
            raise InputError("the trained model's maps hold NaN or infinity")

    def save(self, model: nn.Module, folder: Path, recipe: Recipe, metrics: dict[str, Any]) -> None:
        assert isinstance(model, TaskModel)
        start = recipe.model.checkpoint or recipe.model.weights or recipe.model.name
        origin = f"recipe {recipe.name}, from {start}"
        model.save_pretrained(folder / "checkpoint", metrics=metrics, origin=origin)

    def prepare_model(self, recipe: Recipe, share: Share, *, batch_norm: bool) -> None:
        """Tell the model how images are prepared, and have norms over the batch see all processes
        on GPUs.
        """
        self.data_config = self.model.data_config = data_config_of(self.model, recipe)
        if self.model.sparse is not None:
            self.model.sparse.data_config = self.data_config
        if batch_norm and share.pin_memory and share.num_processes > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model.head)  # type: ignore[no-untyped-call]

    @classmethod
    def _check_recipe(cls, recipe: Recipe) -> None:
        """Refuse what a recipe may say of classification alone."""
        augment, plain = recipe.augment, AugmentRecipe()
        others = _changed(augment, plain, ("none", *cls.augments))
        require(
            not others,
            f"augment.{' and augment.'.join(others)} is not for {cls.name}, which heeds "
            f"augment.none, augment.{', augment.'.join(cls.augments)} and what its own table says",
        )
        require(
            recipe.budget.milliseconds is None,
            "budget is for classification; train, and turn the dial of the backbone afterwards",
        )
        require(recipe.data.labels, f"data.labels is false; {cls.name} learns from labels")
        others = _changed(recipe.data, DataRecipe(train=recipe.data.train), cls.data_heeded)
        require(not others, f"data.{' and data.'.join(others)} is not for {cls.name}; leave it out")

    @classmethod
    def _start(cls, recipe: Recipe, config: Any) -> Any:
        """The model that training starts from."""
        if recipe.model.checkpoint is not None:
            return cls._from_checkpoint(recipe, config, recipe.model.checkpoint)
        backbone = create_dense(recipe.model, recipe.run.seed)
        if recipe.method.name is not None:
            backbone = new_sparse(backbone, recipe.method.build(), recipe)
        with seeded(recipe.run.seed, 9):
            return cls.new(backbone, config)

    @classmethod
    def _from_checkpoint(cls, recipe: Recipe, config: Any, folder: str) -> Any:
        method = recipe.method
        started = from_pretrained(folder)
        if started.task != cls.name:
            raise ConfigError(f"{folder} holds a model for {started.task}; task.name is {cls.name}")
        backbone = started.backbone
        if started.sparse is None and method.name is not None:
            backbone = new_sparse(backbone, method.build(), recipe)
        elif started.sparse is not None:
            if method.name not in (None, started.sparse.method.name):
                raise ConfigError(
                    f"{folder} was made by {started.sparse.method.name!r}; method.name is "
                    f"{method.name!r}"
                )
            backbone = from_pretrained(folder, **method.config).backbone
            backbone.calibration = ()  # it held for the weights before training
        model = cls.new(backbone, config, started.classes)
        load_strict(model.head, started.head.state_dict(), f"the head of {folder}")
        return model


def _changed(table: Any, plain: Any, heeded: Sequence[str]) -> list[str]:
    """Names of the fields that are not heeded, and are set to another value than in ``plain``."""
    names = [entry.name for entry in fields(table) if entry.name not in heeded]
    return [name for name in names if getattr(table, name) != getattr(plain, name)]


def still_unused(model: TaskModel) -> None:
    """Have what no map depends on, the backbone's classifier above all, ask for no gradients."""
    family = model.family
    images = torch.zeros(1, family.in_channels, *family.image_size)
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        output = model.train_levels(images)
    parts = [level.sum() for level in model.read_levels(output.levels)] + [*output.losses.values()]
    reached = torch.autograd.grad(torch.stack(parts).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def data_config_of(model: TaskModel, recipe: Recipe) -> dict[str, Any]:
    """How images are prepared: the backbone's own mean and width, or the embedded set's."""
    config = describe_data(model.timm_model) | model.data_config
    side = recipe.data.image_size
    if is_scenes(recipe.data.train):
        return config | digits_data_config(side or SIDE)
    if side is not None:
        config["input_size"] = (config["input_size"][0], side, side)
    return config
