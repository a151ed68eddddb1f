"""The heads of Cascade Mask R-CNN, on torchvision's parts.

Cai and Vasconcelos, "Cascade R-CNN" (arXiv 1906.09756, section 4). Three box heads, each trained on
what overlaps an object by more than the one before, refine the boxes one after the other; at test
time their scores are averaged, each on the boxes that it was given. Boxes are moved alike for all
classes. As the authors of STViT-R detect, the boxes' loss may be the generalised IoU (weight 10).

What differs from mmdetection's, which they use: one mask head, on the last boxes, not three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import (
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import boxes as box_ops
from torchvision.ops import generalized_box_iou_loss

Target = dict[str, Tensor]

GIOU_WEIGHT = 10.0


class CascadeHeads(nn.Module):
    """Takes the place of torchvision's ``RoIHeads``.

    Args:
        stages: a ``RoIHeads`` per stage, whose predictor moves boxes alike for all classes.
        mask_roi_pool: regions of the maps that masks are drawn from.
        mask_head: its convolutions.
        mask_predictor: a mask for each class.
        box_loss: ``smooth_l1`` or ``giou``.
    """

    STAGES: ClassVar[tuple[tuple[float, tuple[float, float, float, float]], ...]] = (
        (0.5, (10.0, 10.0, 5.0, 5.0)),
        (0.6, (20.0, 20.0, 10.0, 10.0)),
        (0.7, (30.0, 30.0, 15.0, 15.0)),
    )
    """Overlap with an object, and weights of the deltas, of each stage."""
    LOSS_WEIGHTS: ClassVar[tuple[float, ...]] = (1.0, 0.5, 0.25)

    def __init__(
        self,
        stages: Sequence[nn.Module],
        mask_roi_pool: nn.Module,
        mask_head: nn.Module,
        mask_predictor: nn.Module,
        *,
        box_loss: str,
    ) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList(stages)
        self.mask_roi_pool, self.mask_head = mask_roi_pool, mask_head
        self.mask_predictor = mask_predictor
        self.box_loss = box_loss

    def forward(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """What is found in each image, and in training mode the losses.

        Args:
            maps: the pyramid by name.
            proposals: (R, 4) for each image.
            sizes: height and width of each image, without padding.
            targets: ``boxes``, ``labels`` and ``masks`` of each image, in training mode.
        """
        if self.training:
            assert targets is not None
            return [], self._train(maps, proposals, sizes, targets)
        return self._detect(maps, proposals, sizes), {}

    def _train(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.stages, self.LOSS_WEIGHTS, strict=True)):
            sampled, matched, labels, due = stage.select_training_samples(proposals, targets)
            logits, deltas = _seen(stage, maps, sampled, sizes)
            classes, boxes = fastrcnn_loss(logits, _of_each_class(logits, deltas), labels, due)
            if self.box_loss == "giou":
                boxes = _giou_loss(stage, deltas, sampled, matched, labels, targets)
            terms[f"loss_classifier_{number + 1}"] = weight * classes
            terms[f"loss_box_reg_{number + 1}"] = weight * boxes
            proposals = _refined(stage, deltas, sampled, sizes, targets)
        terms["loss_mask"] = self._mask_loss(maps, sampled, matched, labels, sizes, targets)
        return terms

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> Tensor:
        """Of the regions that the last stage holds for objects."""
        found = [of_image > 0 for of_image in labels]
        regions = [boxes[keep] for boxes, keep in zip(proposals, found, strict=True)]
        objects = [index[keep] for index, keep in zip(matched, found, strict=True)]
        logits = self._masks(maps, regions, sizes)
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        loss: Tensor = maskrcnn_loss(logits, regions, masks, classes, objects)
        return loss

    def _masks(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        logits: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, sizes)))
        return logits

    def _detect(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Target]:
        shares = []
        for stage in self.stages:
            logits, deltas = _seen(stage, maps, proposals, sizes)
            shares.append(logits.softmax(-1))
            before, proposals = proposals, _moved(stage, deltas, proposals, sizes)
        # The logarithm of what sums to 1 has it for its softmax, which is taken there.
        mean = torch.stack(shares).mean(0).log()
        boxes, scores, labels = self.stages[-1].postprocess_detections(
            mean, _of_each_class(mean, deltas), before, sizes
        )
        masks = maskrcnn_inference(self._masks(maps, boxes, sizes), labels)
        names = ("boxes", "labels", "scores", "masks")
        return [
            dict(zip(names, found, strict=True))
            for found in zip(boxes, labels, scores, masks, strict=True)
        ]


def _seen(
    stage: Any, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Logits (R, classes) and deltas (R, 4) of the boxes of all images."""
    logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(maps, boxes, sizes)))
    return logits, deltas


def _of_each_class(logits: Tensor, deltas: Tensor) -> Tensor:
    """(R, 4 * classes): the same deltas for every class, as torchvision's functions want them."""
    return deltas.repeat(1, logits.shape[1])


def _moved(
    stage: Any, deltas: Tensor, boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> list[Tensor]:
    """The boxes of each image, moved, and cut off at its edges."""
    moved = stage.box_coder.decode(deltas.detach(), boxes).squeeze(1)
    parts = moved.split([len(of_image) for of_image in boxes])
    return [box_ops.clip_boxes_to_image(*pair) for pair in zip(parts, sizes, strict=True)]


def _refined(
    stage: Any,
    deltas: Tensor,
    boxes: list[Tensor],
    sizes: list[tuple[int, int]],
    targets: list[Target],
) -> list[Tensor]:
    """What the next stage learns from: moved boxes that have an extent, without the objects' own,
    which were added to learn from and are added again.
    """
    refined = []
    moved = _moved(stage, deltas, boxes, sizes)
    for start, end, target in zip(boxes, moved, targets, strict=True):
        given = (start[:, None] == target["boxes"].to(start)[None]).all(-1).any(-1)
        has_extent = (end[:, 2:] - end[:, :2] > 0).all(-1)
        refined.append(end[has_extent & ~given])
    return refined


def _giou_loss(
    stage: Any,
    deltas: Tensor,
    boxes: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
    targets: list[Target],
) -> Tensor:
    """Of the regions that are held for objects, over the number of all regions."""
    found = torch.cat(labels) > 0
    moved = stage.box_coder.decode(deltas, boxes).squeeze(1)[found]
    due = [
        target["boxes"][index[of_image > 0]]
        for target, index, of_image in zip(targets, matched, labels, strict=True)
    ]
    loss: Tensor = generalized_box_iou_loss(moved, torch.cat(due).to(moved), reduction="sum")
    return GIOU_WEIGHT * loss / max(len(found), 1)
