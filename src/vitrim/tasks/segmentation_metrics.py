"""How well pixels are classified: counts per image and class, which add up over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class PixelCounts:
    """The pixels of a model's answers, image by image."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts: list[Tensor] = []
        self.broken = 0
        """Images with scores that are no numbers; they are not counted."""

    @property
    def counts(self) -> Tensor:
        """(images, 3, classes), see :func:`pixel_counts`."""
        none = torch.zeros(0, 3, self.num_classes, dtype=torch.int64)
        return torch.stack(self._counts) if self._counts else none

    def note(self, scores: Tensor, labels: Sequence[Tensor]) -> None:
        """Count the pixels of scores (B, classes, h, w), enlarged to the labels' sizes."""
        for score, label in zip(scores.float(), labels, strict=True):
            if not bool(score.isfinite().all()):
                self.broken += 1
                continue
            size = (label.shape[0], label.shape[1])
            large = F.interpolate(score.unsqueeze(0), size, mode="bilinear", align_corners=False)
            predicted = large.argmax(1).squeeze(0)
            counts = pixel_counts(predicted, label.to(predicted.device), self.num_classes)
            self._counts.append(counts.cpu())

    def metrics(self) -> dict[str, float]:
        """Of all images, see :func:`segmentation_metrics`."""
        return segmentation_metrics(self.counts.sum(0))


def pixel_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(3, classes) int64 of one image: pixels of each class that are right, that were predicted,
    and that there are; the diagonal of the confusion matrix and its two margins.

    Args:
        predicted: class numbers (H, W).
        labels: class numbers (H, W); pixels of negative ones are looked at by none of the counts.
        num_classes: in all.
    """
    seen = labels >= 0
    predicted, labels = predicted[seen], labels[seen]
    groups = labels[predicted == labels], predicted, labels
    return torch.stack([torch.bincount(group, minlength=num_classes) for group in groups])


def segmentation_metrics(counts: Tensor) -> dict[str, float]:
    """``miou``, ``macc`` (mean accuracy of the classes) and ``pixel_acc`` in percent.

    Args:
        counts: (3, classes), summed over images. A class that is neither predicted nor there enters
            no mean, as in ADE20K's evaluation.
    """
    miou, macc, pixel = _measures(counts.double().unsqueeze(0))
    return {"miou": float(miou), "macc": float(macc), "pixel_acc": float(pixel)}


def bootstrap(
    counts: Tensor, other: Tensor | None = None, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mIoU over images drawn with replacement, in percent.

    Args:
        counts: (images, 3, classes).
        other: those of another model on the same images; the interval is then that of the
            difference, both on the same draws.
        draws: number of them.
        seed: of the draws.
    """
    generator, images = torch.Generator().manual_seed(seed), len(counts)
    chosen = torch.randint(images, (draws, images), generator=generator)
    times = torch.zeros(draws, images, dtype=torch.float64)
    times.scatter_add_(1, chosen, torch.ones_like(times))
    values = _measures(torch.einsum("di,ipc->dpc", times, counts.double()))[0]
    if other is not None:
        values = values - _measures(torch.einsum("di,ipc->dpc", times, other.double()))[0]
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _measures(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mIoU, mean accuracy and pixel accuracy (each (N,)) of counts (N, 3, classes)."""
    right, predicted, there = counts.unbind(1)
    union = predicted + there - right
    iou = 100 * (right / union).nanmean(1)  # 0 / 0 of a class that does not occur
    accuracy = 100 * (right / there).nanmean(1)
    return iou, accuracy, 100 * right.sum(1) / there.sum(1)
