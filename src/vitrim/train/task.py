"""What is trained: a model and its losses as one module, so that DDP sees a single forward."""

from __future__ import annotations

from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim.checkpoint import describe_data, load_strict, read_weights
from vitrim.config import closest
from vitrim.errors import CheckpointError, ConfigError
from vitrim.families import family_of
from vitrim.layers import losses
from vitrim.methods.records import DenseOutput
from vitrim.model import SparseModel, from_pretrained
from vitrim.train.data import digits_data_config, is_digits
from vitrim.train.latency import LatencyBudget, start_config
from vitrim.train.recipe import ModelRecipe, Recipe
from vitrim.train.samples import mix_seed, seeded


class SparseTask(nn.Module):
    """A sparse model, and the frozen dense teacher that it learns from.

    Args:
        sparse: the model to train.
        teacher: a dense model for distillation, or None. It stays in evaluation mode without
            gradients, and is part of no checkpoint.
        latency: a budget of milliseconds to train for, or None.
    """

    def __init__(
        self,
        sparse: SparseModel,
        teacher: nn.Module | None = None,
        latency: LatencyBudget | None = None,
    ) -> None:
        super().__init__()
        self.model = sparse
        self.teacher = teacher
        self.latency = latency
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self._teacher_family = family_of(teacher)

    def train(self, mode: bool = True) -> SparseTask:
        """Training mode for the model; the teacher never leaves evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, images: Tensor, target: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Loss terms by name and ``"total"``.

        Args:
            images: (B, channels, H, W).
            target: class numbers (B,) or soft targets (B, classes); None leaves labels out.
            seed: of the method's noise.
        """
        generator = torch.Generator(images.device).manual_seed(seed)
        teacher = self._teach(images)
        if self.latency is None:
            return self.model.losses(images, target, teacher, generator)
        method = self.model.method
        output = method.train_forward(self.model.family, images, generator)
        terms = method.losses(output, target, teacher)
        term = self.latency.term(self.model, output, images)
        if term is None:
            return terms
        return terms | {"latency": term, "total": terms["total"] + self.latency.weight * term}

    def _teach(self, images: Tensor) -> DenseOutput | None:
        if self.teacher is None:
            return None
        return self.model.method.teach(self._teacher_family, images)


class DenseTask(nn.Module):
    """A timm model under cross entropy, or under its own losses where it has some (LV-ViT)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, target: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Loss terms by name and ``"total"``; ``seed`` is of the mixing that LV-ViT does."""
        if target is None:
            raise ConfigError("dense training needs labels; set data.labels = true")
        if hasattr(self.model, "losses"):
            own: Any = self.model
            return own.losses(images, target, generator=torch.Generator().manual_seed(seed))  # type: ignore[no-any-return]
        return {"total": losses.classification_loss(self.model(images), target)}


Task = SparseTask | DenseTask


def create_task(recipe: Recipe) -> Task:
    """The model of ``recipe`` with its weights, made sparse if the recipe says so, and its teacher.

    Raises:
        ConfigError: the model's name, its arguments or the method's fields are wrong.
        CheckpointError: the weights are damaged or do not fit.
    """
    if recipe.model.checkpoint is not None:
        return _task_from_checkpoint(recipe, recipe.model.checkpoint)
    backbone = create_dense(recipe.model, recipe.run.seed)
    if recipe.method.name is None:
        return DenseTask(backbone)
    teacher = deepcopy(backbone) if recipe.model.teacher else None
    config = recipe.method.build()
    if recipe.budget.milliseconds is not None:
        config = start_config(_new_sparse(backbone, config, recipe), recipe.budget)
    sparse = _new_sparse(backbone, config, recipe)
    return SparseTask(sparse, teacher, _latency_of(recipe, sparse))


def _new_sparse(backbone: nn.Module, config: Any, recipe: Recipe) -> SparseModel:
    generator = torch.Generator().manual_seed(mix_seed(recipe.run.seed, 4))
    return SparseModel(backbone, config, generator)


def _latency_of(recipe: Recipe, sparse: SparseModel) -> LatencyBudget | None:
    return None if recipe.budget.milliseconds is None else LatencyBudget(recipe, sparse)


def create_dense(recipe: ModelRecipe, seed: int) -> nn.Module:
    """The dense timm model of ``recipe``, on the CPU; new weights are a function of ``seed``."""
    name = recipe.name or ""
    if not timm.is_model(name):
        near = closest(name.partition(".")[0], timm.list_models())
        raise ConfigError(f"model.name {name!r} is unknown to timm{near}")
    try:
        with seeded(seed, 3):
            model: nn.Module = timm.create_model(
                name, pretrained=recipe.pretrained, **recipe.kwargs
            )
            if recipe.init == "fan_in":
                model.apply(_init_fan_in)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot create {name!r} with {recipe.kwargs}: {error}") from error
    if recipe.weights is not None:
        path = weights_path(recipe.weights)
        load_strict(model, read_weights(path), str(path))
    return model


def _init_fan_in(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def package_file(name: str) -> Path:
    """Where the package keeps the weights called ``name``."""
    return Path(str(resources.files("vitrim") / "assets" / f"{name}.safetensors"))


def weights_path(weights: str) -> Path:
    """The file that ``weights`` means: a path, or ``package:NAME`` for one shipped with vitrim."""
    prefix, _, name = weights.partition("package:")
    if prefix or not name:
        return Path(weights)
    path = package_file(name)
    if not path.is_file():
        raise CheckpointError(f"no weights {weights!r} are shipped with this vitrim ({path})")
    return path


def _task_from_checkpoint(recipe: Recipe, folder: str) -> SparseTask:
    method = recipe.method
    sparse = from_pretrained(folder, **method.config)
    sparse.calibration = ()  # it held for the weights before training
    if method.name not in (None, sparse.method.name):
        raise ConfigError(
            f"{folder} was made by {sparse.method.name!r}; method.name is {method.name!r}"
        )
    latency = _latency_of(recipe, sparse)
    if latency is not None and not sparse.method.keeps_its_cost:
        sparse.method.config = start_config(sparse, recipe.budget)
    if not recipe.model.teacher:
        return SparseTask(sparse, None, latency)
    named = recipe.model.name is not None
    teacher = create_dense(recipe.model, recipe.run.seed) if named else deepcopy(sparse.backbone)
    return SparseTask(sparse, teacher, latency)


def data_config_of(task: Task, recipe: Recipe) -> dict[str, Any]:
    """How images are prepared: the model's own way, with what the recipe's data change."""
    model = task.model
    backbone = model.backbone if isinstance(model, SparseModel) else model
    config = describe_data(backbone) | (getattr(model, "data_config", None) or {})
    side = recipe.data.image_size
    if side is not None:
        config["input_size"] = (config["input_size"][0], side, side)
    if is_digits(recipe.data.train):
        config |= digits_data_config(config["input_size"][-1])
    if recipe.data.crop_pct is not None:
        config["crop_pct"] = recipe.data.crop_pct
    return config
