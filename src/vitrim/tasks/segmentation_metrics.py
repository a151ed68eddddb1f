"""How well pixels are classified: counts per image and class, which add up over processes."""

from __future__ import annotations

import torch
from torch import Tensor


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
