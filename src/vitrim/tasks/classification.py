"""Classification: one class per image; what a timm model is made for.

The result of a run is ``checkpoint/`` for a sparse model, ``backbone.safetensors`` with
``backbone.json`` for a dense one.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.config import to_plain
from vitrim.errors import ConfigError, InputError, TrainingError
from vitrim.families import family_of
from vitrim.families.described import describe_backbone, describe_data
from vitrim.layers import losses
from vitrim.methods.records import DenseOutput
from vitrim.model import SparseModel, from_pretrained
from vitrim.modes import eval_mode
from vitrim.tasks.base import Score, Share, Task
from vitrim.tasks.labelled import TrainLoader, validation_loader
from vitrim.tools.evaluate import check_logits, check_scores, check_weights
from vitrim.train.backbone import create_dense, new_sparse
from vitrim.train.data import EvalLoader, digits_data_config, is_digits
from vitrim.train.latency import LatencyBudget, start_config
from vitrim.train.recipe import Recipe


class Classification(Task):
    """What dense and sparse models have in common."""

    name: ClassVar[str] = "classification"

    @classmethod
    def create(cls, recipe: Recipe) -> Classification:
        return create_task(recipe)

    @property
    def backbone(self) -> Any:
        """The timm model."""
        return self.model.backbone if isinstance(self.model, SparseModel) else self.model

    def open_data(self, recipe: Recipe, share: Share) -> tuple[TrainLoader, EvalLoader | None]:
        self.data_config = data_config_of(self, recipe)
        num_classes = self.backbone.num_classes
        loader = TrainLoader(recipe, self.data_config, num_classes, share)
        if isinstance(self.model, SparseModel):
            self.model.data_config = self.data_config
            shape = (1, *self.data_config["input_size"])
            self.model.family.check_images(torch.empty(shape, device="meta"))
        return loader, validation_loader(recipe, self.data_config, num_classes, share)

    def evaluate(self, model: nn.Module, validation: EvalLoader, accelerator: Any) -> Score:
        """Top-1; of the backbone alone too, where the method is meant to leave a good one."""
        top, images = top1(accelerator, model, validation)
        found = {"val_top1": top}
        if isinstance(model, SparseModel) and model.method.serves_dense:
            found["val_dense_top1"] = top1(accelerator, model.backbone, validation)[0]
        return Score(top, found, images)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        check_weights("trained", model)
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(2, *input_shape(self.data_config), generator=noise)
        images = images.to(next(model.parameters()).device)
        if isinstance(model, SparseModel):
            trace = model.trace(images)
            check_logits("trained", trace.logits)
            check_scores(trace)
            return
        with eval_mode(model):
            check_logits("trained", model(images))

    def save(self, model: nn.Module, folder: Path, recipe: Recipe, metrics: dict[str, Any]) -> None:
        if isinstance(model, SparseModel):
            start = recipe.model.checkpoint or recipe.model.weights or recipe.model.name
            origin = f"recipe {recipe.name}, from {start}"
            model.save_pretrained(folder / "checkpoint", metrics=metrics, origin=origin)
            return
        description = {
            "backbone": describe_backbone(model),
            "data": self.data_config,
            "metrics": metrics,
            "recipe": to_plain(recipe),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        text = json.dumps(description, indent=2) + "\n"
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        content = safetensors.torch.save(weights, {"format": "pt"})
        checkpoint.write_atomic(folder / "backbone.safetensors", content)
        checkpoint.write_atomic(folder / "backbone.json", text.encode())


class SparseTask(Classification):
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
            terms: dict[str, Tensor] = self.model.losses(images, target, teacher, generator)
            return terms
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
        said: DenseOutput = self.model.method.teach(self._teacher_family, images)
        return said


class DenseTask(Classification):
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


def create_task(recipe: Recipe) -> SparseTask | DenseTask:
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
        config = start_config(new_sparse(backbone, config, recipe), recipe.budget)
    sparse = new_sparse(backbone, config, recipe)
    return SparseTask(sparse, teacher, _latency_of(recipe, sparse))


def _latency_of(recipe: Recipe, sparse: SparseModel) -> LatencyBudget | None:
    return None if recipe.budget.milliseconds is None else LatencyBudget(recipe, sparse)


def _task_from_checkpoint(recipe: Recipe, folder: str) -> SparseTask:
    method = recipe.method
    sparse = from_pretrained(Path(folder), **method.config)  # a recipe reaches no hub
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


def data_config_of(task: Classification, recipe: Recipe) -> dict[str, Any]:
    """How images are prepared: the model's own way, with what the recipe's data change."""
    config = describe_data(task.backbone) | (getattr(task.model, "data_config", None) or {})
    side = recipe.data.image_size
    if side is not None:
        config["input_size"] = (config["input_size"][0], side, side)
    if is_digits(recipe.data.train):
        config |= digits_data_config(config["input_size"][-1])
    if recipe.data.crop_pct is not None:
        config["crop_pct"] = recipe.data.crop_pct
    return config


def input_shape(data_config: dict[str, Any]) -> tuple[int, ...]:
    """(channels, H, W) of an image, or (channels, T, H, W) of a clip."""
    channels, height, width = data_config["input_size"]
    frames = data_config.get("frames")
    return (channels, height, width) if frames is None else (channels, frames, height, width)


@torch.no_grad()
def top1(accelerator: Any, model: nn.Module, loader: EvalLoader) -> tuple[float, int]:
    """Top-1 in percent over all processes, and on how many images, by the inference forward.

    Every process brings its own share of the images, none of them twice, so sums are exact.

    Raises:
        TrainingError: an answer is not finite.
        InputError: there is no image.
    """
    hits = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    with eval_mode(model):
        for images, labels in loader:
            with accelerator.autocast():
                logits = model(images.to(accelerator.device))
            right = (logits.argmax(-1) == labels.to(accelerator.device)).sum()
            broken = (~logits.isfinite().all(-1)).sum()
            hits += torch.stack([right, torch.full_like(right, len(labels)), broken])
    right, count, broken = accelerator.reduce(hits, "sum").tolist()
    if broken:
        raise TrainingError(
            f"the logits of {int(broken)} of {int(count)} validation images hold NaN or infinity; "
            "the last saved state and result are kept"
        )
    if count == 0:
        raise InputError("no validation image can be read; check data.val")
    return 100 * right / count, int(count)
