"""Training and validation batches of labelled images: augmented, mixed, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.transforms_factory import create_transform
from torch import Tensor

from vitrim.errors import ConfigError, InputError
from vitrim.tasks.base import ALONE, Share
from vitrim.train.data import EvalLoader, check_label_space, eval_transform, open_dataset
from vitrim.train.loader import SampleLoader
from vitrim.train.recipe import AugmentRecipe, DataRecipe, Recipe
from vitrim.train.samples import Transform, collate, seeded


def training_transform(recipe: AugmentRecipe, data_config: dict[str, Any]) -> Transform:
    """From a PIL image to a normalised tensor, with the recipe's random changes."""
    if recipe.none:
        return eval_transform(data_config)
    try:
        transform: Transform = create_transform(
            data_config["input_size"],
            is_training=True,
            scale=(recipe.scale[0], recipe.scale[1]),
            ratio=(recipe.ratio[0], recipe.ratio[1]),
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.rand_augment,
            interpolation=recipe.interpolation,
            mean=data_config["mean"],
            std=data_config["std"],
            re_prob=recipe.random_erase,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"timm has no augmentation augment.rand_augment = {recipe.rand_augment!r} ({error}); "
            "an example is 'rand-m9-mstd0.5-inc1'"
        ) from error
    return transform


class Mixer:
    """Mixup, CutMix and label smoothing by timm, for batches of any size.

    It draws from the global generators: call it inside :func:`vitrim.train.samples.seeded`. All
    frames of a clip (C, T, H, W) are mixed alike.
    """

    def __init__(self, recipe: AugmentRecipe, num_classes: int) -> None:
        self.num_classes = num_classes
        self.smoothing = recipe.label_smoothing
        self._mixup = None
        if recipe.mixup or recipe.cutmix:
            self._mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and class numbers or (where mixed or smoothed) soft targets."""
        if self._mixup is None:
            return images, self._smooth(labels) if self.smoothing else labels
        if images.ndim == 5:
            mixed, targets = self(images.flatten(1, 2), labels)
            return mixed.view_as(images), targets
        even = len(images) - len(images) % 2  # timm mixes pairs; an odd last image stays as it is
        mixed, targets = self._mixup(images[:even].clone(), labels[:even])
        if even == len(images):
            return mixed, targets
        mixed = torch.cat([mixed, images[even:]])
        return mixed, torch.cat([targets, self._smooth(labels[even:])])

    def _smooth(self, labels: Tensor) -> Tensor:
        soft: Tensor = mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        return soft


class TrainLoader(SampleLoader):
    """This process's batches ``(images, target)`` of any epoch, from any batch on.

    Args:
        recipe: its data, augmentation and seed are used.
        data_config: how images are prepared (timm's).
        num_classes: outputs of the model.
        share: of this process.
        dataset: of the training samples; None opens the recipe's images.

    Raises:
        InputError: the data cannot be used, or do not fill one global step.
    """

    def __init__(
        self,
        recipe: Recipe,
        data_config: dict[str, Any],
        num_classes: int,
        share: Share = ALONE,
        dataset: Any = None,
    ) -> None:
        data = recipe.data
        dataset = dataset or open_dataset(
            data.train,
            training_transform(recipe.augment, data_config),
            training=True,
            labelled=data.labels,
            split=data.train_split,
            length=data.length,
            seed=recipe.run.seed if is_stream_name(data.train) else 0,
            **dataset_options(data, data_config, num_classes),
        )
        if data.labels:
            check_label_space(dataset, num_classes)
        if data.curriculum_epochs and not hasattr(dataset, "clutter"):
            raise InputError("data.curriculum_epochs is for the embedded set; set it to 0")
        self.labels = data.labels
        self.mixer = Mixer(recipe.augment, num_classes)
        super().__init__(dataset, recipe, share, collate)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of ``epoch`` from number ``first`` on.

        Raises:
            TrainingError: more images than the recipe allows cannot be read, or a whole batch.
        """
        for number, batch in self.batches(epoch, first):
            labels = self._checked(batch.labels)
            with seeded(self.seed, 5, epoch, number, self.rank):
                images, target = self.mixer(batch.images, labels)
            yield images, target if self.labels else None

    def _checked(self, labels: Tensor) -> Tensor:
        if not self.labels:
            return torch.zeros_like(labels)
        if labels.min() < 0 or labels.max() >= self.mixer.num_classes:
            raise InputError(
                f"a batch has labels from {labels.min()} to {labels.max()}; the model has outputs "
                f"0 to {self.mixer.num_classes - 1} (-1 is an image without a label)"
            )
        return labels


def is_stream_name(source: str) -> bool:
    """Whether ``source`` names a streaming reader, whose order depends on its seed."""
    return source.partition("/")[0].lower() in ("hfids", "tfds", "wds")


def dataset_options(
    data: DataRecipe, data_config: dict[str, Any], num_classes: int | None
) -> dict[str, Any]:
    """What the training and validation sources have in common."""
    return {
        "num_classes": num_classes,
        "class_map": data.class_map,
        "root": data.root,
        "image_size": data_config["input_size"][-1],
    }


def validation_loader(
    recipe: Recipe, data_config: dict[str, Any], num_classes: int, share: Share = ALONE
) -> EvalLoader | None:
    """This process's share of the validation images; None where the recipe names none."""
    data = recipe.data
    if data.val is None:
        return None
    dataset = open_dataset(
        data.val,
        eval_transform(data_config),
        split=data.val_split,
        length=data.val_length,
        **dataset_options(data, data_config, num_classes),
    )
    check_label_space(dataset, num_classes)
    return EvalLoader(
        dataset,
        data.batch_size,
        data.workers,
        shard=share.rank,
        num_shards=share.num_processes,
    )
