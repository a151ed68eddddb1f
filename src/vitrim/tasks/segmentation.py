"""Segmenters: a class for every pixel, by UperNet on any dense or sparse backbone that is served.

    sparse = vitrim.sparsify(timm_model, vitrim.DynamicSpatialConfig(keep_ratio=0.7))
    segmenter = vitrim.tasks.upernet(sparse, num_classes=150)

A segmenter is called as timm's models are, with normalised images (B, 3, H, W), and gives scores
(B, classes, H, W) in either mode; :meth:`Segmenter.losses` has what training makes small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.config import require
from vitrim.errors import InputError
from vitrim.families.described import describe_data
from vitrim.features import pyramid_loss
from vitrim.tasks.model import TaskModel, check_maps
from vitrim.tasks.segmentation_config import SegmenterConfig
from vitrim.tasks.segmentation_data import IGNORED
from vitrim.tasks.upernet import UperNetHead
from vitrim.tokens.plain import Grid

Own = Sequence[Grid] | None
"""Height and width that each image takes of its batch, from the top left corner; the rest is
padding, which the backbone does not look at. None: all of it."""


class Segmenter(TaskModel):
    """A segmenter; :func:`upernet` makes it."""

    task: ClassVar[str] = "segmentation"
    kind: ClassVar[str] = "segmenter"
    config_class: ClassVar[type] = SegmenterConfig
    config: SegmenterConfig

    def __init__(
        self, backbone: nn.Module, config: SegmenterConfig, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(backbone, config, classes)
        require(
            len(self.classes) in (0, config.num_classes),
            f"{len(self.classes)} classes are named; num_classes is {config.num_classes}",
        )
        self.head = UperNetHead(config, self.level_info)
        self.data_config = describe_data(self.timm_model)

    @property
    def reduction(self) -> int:
        """Sides of images are padded to multiples of this."""
        return self.level_info[-1].reduction

    def prepared(self, images: Tensor) -> tuple[Tensor, Own]:
        return self.padded(images, None)

    def forward(self, images: Tensor, sizes: Own = None) -> Tensor:
        """Scores (B, classes, H, W) of normalised images (B, channels, H, W)."""
        if len(images) == 0:
            return images.new_zeros(0, self.config.num_classes, *images.shape[2:])
        padded, own = self.padded(images, sizes)
        maps = self.train_levels(padded, own).levels if self.training else self.levels(padded, own)
        return _enlarged(self.head(maps)[0], padded, images)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        sizes: Own = None,
        teacher: TaskModel | None = None,
        generator: torch.Generator | None = None,
        *,
        aux_weight: float = 0.4,
        pyramid_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Loss terms by name, each times its weight, and ``"total"``, their sum.

        Args:
            images: (B, channels, H, W), normalised.
            labels: (B, H, W) class numbers; a negative one is no class, and costs nothing.
            sizes: as in :meth:`forward`.
            teacher: a model with a dense backbone; None leaves the distance of its pyramid out.
            generator: source of the method's noise; None uses torch's global one.
            aux_weight: of the auxiliary head's cross entropy.
            pyramid_weight: of the distance from the teacher's pyramid.
        """
        self._check_labels(images, labels)
        labels = labels.long()
        padded, own = self.padded(images, sizes)
        output = self.train_levels(padded, own, generator)
        scores, aux = self.head(output.levels)
        terms = {"segmentation": _cross_entropy(_enlarged(scores, padded, images), labels)}
        if aux is not None:
            entropy = _cross_entropy(_enlarged(aux, padded, images), labels)
            terms["auxiliary"] = aux_weight * entropy
        terms |= self.method_terms(output)
        if teacher is not None:
            with torch.no_grad():
                due = teacher.levels(padded, own)
            terms["pyramid"] = pyramid_weight * pyramid_loss(output, due)
        return terms | {"total": torch.stack([*terms.values()]).sum()}

    def padded(self, images: Tensor, sizes: Own) -> tuple[Tensor, Own]:
        """Images whose sides are multiples of :attr:`reduction`, and their own sizes."""
        height, width = images.shape[-2:]
        missing = -height % self.reduction, -width % self.reduction
        if not any(missing):
            return images, sizes
        padded = F.pad(images, (0, missing[1], 0, missing[0]))
        return padded, sizes or [(height, width)] * len(images)

    def _check_labels(self, images: Tensor, labels: Tensor) -> None:
        if labels.shape != (len(images), *images.shape[-2:]):
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, and images {tuple(images.shape)}; "
                "expected one class number per pixel"
            )
        if not len(images) or labels.is_floating_point():
            raise InputError(
                f"there are {len(images)} images, and labels of {labels.dtype}; expected one image "
                "or more, and whole numbers"
            )
        if int(labels.max()) >= self.config.num_classes:
            raise InputError(
                f"labels go up to {int(labels.max())}; the segmenter knows "
                f"{self.config.num_classes} classes, from 0"
            )


def upernet(backbone: nn.Module, num_classes: int, **settings: Any) -> Segmenter:
    """A new segmenter; see :class:`~vitrim.tasks.segmentation_config.SegmenterConfig`.

    Args:
        backbone: a timm model, or a sparse one that :func:`vitrim.sparsify` made of it.
        num_classes: of pixels.
        settings: fields of the config, and ``classes``, their names.

    Raises:
        UnsupportedBackboneError: the backbone is of no family that is served.
        ConfigError: it, or the method on it, gives no maps; a setting is not valid.
        MissingExtraError: segmentation_models_pytorch is not installed.
    """
    classes = settings.pop("classes", ())
    check_maps(backbone)
    return Segmenter(backbone, SegmenterConfig(num_classes=num_classes, **settings), classes)


def _enlarged(scores: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """Scores at the size of the padded images, without the padding."""
    height, width = images.shape[-2:]
    size = (padded.shape[-2], padded.shape[-1])
    large = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return large[..., :height, :width]


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over all pixels, of which those without a class cost nothing: so the mean over several
    processes is the mean over all of their pixels (and so did the authors of Swin).
    """
    due = labels.masked_fill(labels < 0, IGNORED)
    return F.cross_entropy(scores, due, ignore_index=IGNORED, reduction="none").mean()
