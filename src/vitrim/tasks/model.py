"""A head on the pyramid of a backbone, dense or sparse: what detectors and segmenters share.

The backbone stays what it is. A sparse one can be traced, turned to a budget and calibrated where
it stands (``model.backbone``), and a trained model is made sparse by making its backbone so::

    model.backbone = vitrim.sparsify(model.backbone, vitrim.DynamicSpatialConfig(keep_ratio=0.7))
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.config import require, shown
from vitrim.families import Family, family_of
from vitrim.methods.records import FeatureOutput
from vitrim.model import SparseModel
from vitrim.modes import eval_mode
from vitrim.tasks import saved
from vitrim.tokens.plain import Grid, Sizes


@dataclass(frozen=True, slots=True)
class LevelInfo:
    """A map of the pyramid."""

    channels: int
    reduction: int
    """Pixels per side that a position stands for."""


class TaskModel(nn.Module):
    """A backbone and what a task put on it.

    Args:
        backbone: a timm model of a family that is served, or one that :func:`vitrim.sparsify` made
            of it.
        config: how the head is built: a dataclass that a checkpoint holds.
        classes: names by label; a detector's begin at label 1. Empty: they are not known yet.

    Raises:
        UnsupportedBackboneError: the backbone cannot be run piece by piece.
        ConfigError: it, or the method on it, gives no maps.
    """

    task: ClassVar[str]
    """Its name in checkpoints and recipes."""
    kind: ClassVar[str]
    """What messages call the model."""
    config_class: ClassVar[type]
    """What ``config`` is."""
    backbone: Any
    head: nn.Module

    def __init__(self, backbone: nn.Module, config: Any, classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone, self.config, self.classes = backbone, config, tuple(classes)
        require(
            all(isinstance(name, str) for name in self.classes),
            f"classes are {shown(self.classes)}; expected names",
        )
        self.data_config: dict[str, Any] = {}
        self.origin: str | None = None
        self.level_info = level_info(backbone)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another backbone must give the maps that the head was made for."""
        if name == "backbone" and "level_info" in self.__dict__:
            due, found = self.level_info, level_info(value)
            require(found == due, f"the backbone's maps are {found}; the head was made for {due}")
        super().__setattr__(name, value)

    @property
    def timm_model(self) -> Any:
        """The timm model itself."""
        return self.backbone.backbone if isinstance(self.backbone, SparseModel) else self.backbone

    @property
    def sparse(self) -> SparseModel | None:
        """The sparse backbone; None where it is dense."""
        return self.backbone if isinstance(self.backbone, SparseModel) else None

    @property
    def family(self) -> Family:
        """What runs the backbone piece by piece."""
        return family_in(self.backbone)

    @property
    def serves_sizes(self) -> bool:
        """Whether the backbone leaves the padding of images out."""
        chosen = self.sparse is None or self.sparse.method.serves_sizes
        return chosen and self.family.keeps_map

    def prepared(self, images: Any) -> tuple[Tensor, Sizes]:
        """What the backbone sees of images as the model itself takes them: normalised and padded
        to one size, and the own height and width of each; None where nothing is padded.
        """
        raise NotImplementedError

    def levels(self, images: Tensor, sizes: Sequence[Grid] | None = None) -> list[Tensor]:
        """The maps of the pyramid, (B, C, H, W) each, computed as inference does.

        Args:
            images: (B, channels, H, W), normalised.
            sizes: own height and width of each image, where they were padded to one size.
        """
        if self.sparse is not None:
            return self.sparse.features(images, sizes)
        return self.family.pyramid(images, sizes=sizes)[0]

    def train_levels(
        self,
        images: Tensor,
        sizes: Sequence[Grid] | None = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        """The same by the differentiable forward, with the method's noise and its losses."""
        if self.sparse is not None:
            return self.sparse.train_features(images, sizes, generator=generator)
        maps = self.family.pyramid(images, sizes=sizes)[0]
        return FeatureOutput(maps, {}, [None] * len(maps))

    def read_levels(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of the maps that the head looks at."""
        return levels

    def method_terms(self, output: FeatureOutput) -> dict[str, Tensor]:
        """The method's losses by name, each times its weight."""
        if self.sparse is None:
            return {}
        config = self.sparse.config
        return {
            name: getattr(config, f"{name}_weight") * term for name, term in output.losses.items()
        }

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        metrics: dict[str, Any] | None = None,
        origin: str | None = None,
    ) -> None:
        """Write a checkpoint folder, as ``SparseModel.save_pretrained`` does; it is read by
        :func:`vitrim.tasks.from_pretrained`.
        """
        saved.save(self, folder, metrics or {}, origin or self.origin)


def family_in(backbone: nn.Module) -> Family:
    """What runs a dense or sparse backbone piece by piece."""
    return backbone.family if isinstance(backbone, SparseModel) else family_of(backbone)


def level_info(backbone: nn.Module) -> list[LevelInfo]:
    """The maps of a backbone's pyramid, dense or sparse, in order.

    Raises:
        UnsupportedBackboneError, ConfigError: it has none.
    """
    family = family_in(backbone)
    described: Sequence[Mapping[str, Any]] = family.backbone.feature_info
    return [
        LevelInfo(int(described[i]["num_chs"]), int(described[i]["reduction"]))
        for i in family.level_indices
    ]


def check_maps(backbone: nn.Module) -> None:
    """Raise :class:`ConfigError` unless the method on a backbone gives maps; a dense one does."""
    if isinstance(backbone, SparseModel):
        family, parameter = backbone.family, next(backbone.parameters())
        with eval_mode(backbone), torch.no_grad():
            backbone.features(parameter.new_zeros(1, family.in_channels, *family.image_size))


def check_reductions(info: Sequence[LevelInfo]) -> None:
    """Raise :class:`ConfigError` unless every reduction is a power of two, which the heads need to
    find a region on a map.
    """
    reductions = [level.reduction for level in info]
    require(
        all(reduction & (reduction - 1) == 0 for reduction in reductions),
        f"the backbone's maps have reductions of {reductions} pixels; detectors and segmenters "
        "take powers of two, so use a backbone with patches of 8 or 16",
    )
