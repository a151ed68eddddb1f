"""What dropping patch tokens costs in quality, measured on images without labels.

For one stage at a time: the image's best patches by class attention go on from a block, everything
else is the dense model. Two signals say what that does:

* ``agreement``: KL(dense || sparse) of the predictions, mean over the images. A forward from each
  block for each count: the dearer and the better one.
* ``attention``: the share of their class attention that the blocks behind the stage lose, because
  what they paid it to is gone; mean over the images, summed over the blocks. One dense forward.

Several stages add up: a stage costs what its drop, from the count before to the count after, costs
by itself at its place. Ours; no paper is behind it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vitrim.config import require
from vitrim.errors import ConfigError, InputError
from vitrim.families import ViT
from vitrim.layers import losses
from vitrim.tokens.plain import Tokens

Signal = Literal["agreement", "attention"]
LEAST_IMAGES = 8
"""With fewer the signal would follow single images."""
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Effects:
    """Loss of quality when a block and those behind it see fewer patches."""

    signal: str
    """What it was measured by."""
    images: int
    """On how many images."""
    counts: tuple[int, ...]
    """Measured counts, rising; the last is the whole image."""
    loss: dict[int, tuple[float, ...]]
    """Per block that a stage may stand before: one number per count, falling to 0."""

    def at(self, block: int, count: int) -> float:
        """The loss of keeping ``count`` patches before ``block``, linear between what was measured
        and constant below it.
        """
        losses_at, place = self.loss[block], bisect_left(self.counts, count)
        if place == 0 or self.counts[place] == count:
            return losses_at[place]
        low, high = self.counts[place - 1], self.counts[place]
        share = (count - low) / (high - low)
        return (1 - share) * losses_at[place - 1] + share * losses_at[place]

    def drop(self, block: int, before: int, after: int) -> float:
        """The loss of a stage before ``block`` that leaves ``after`` of ``before`` patches."""
        return self.at(block, after) - self.at(block, before)

    def total(self, stages: Sequence[int], counts: Sequence[int]) -> float:
        """The loss of a whole schedule."""
        before = (self.counts[-1], *counts)
        return sum(map(self.drop, stages, before, counts))


def measured_counts(num_patches: int) -> tuple[int, ...]:
    """Where effects are measured: closer where tokens are few, as much is lost there."""
    return tuple(sorted({max(1, round(share * num_patches)) for share in _SHARES}))


@torch.no_grad()
def measure_effects(
    family: Any,
    batches: Sequence[Tensor],
    signal: Signal = "agreement",
    *,
    progress: Callable[[str], None] | None = None,
) -> Effects:
    """The effects of single stages before every block but the first.

    Args:
        family: runs the dense backbone, which is in evaluation mode.
        batches: prepared images of one size, on the backbone's device.
        signal: what to measure by.
        progress: told in words how far it is.

    Raises:
        ConfigError: the backbone is no plain transformer, whose patches could be dropped.
        InputError: there are too few images, or the model's answers are not finite.
    """
    if not isinstance(family, ViT):
        raise ConfigError(
            f"schedules drop patches of plain vision transformers, and the family {family.name!r} "
            "keeps a map; calibrate the methods that serve it with --macs"
        )
    require(family.depth > 1, "the backbone has one block, before which nothing can be dropped")
    images = sum(len(batch) for batch in batches)
    if images < LEAST_IMAGES:
        raise InputError(
            f"there are {images} readable images to measure quality on; give {LEAST_IMAGES} or more"
        )
    height, width = batches[0].shape[-2:]
    rows, columns = family.grid((height, width))
    counts = measured_counts(rows * columns)
    measure = {"agreement": _disagreement, "attention": _lost_attention}[signal]
    total = torch.zeros(family.depth - 1, len(counts), dtype=torch.float64)
    for number, batch in enumerate(batches, 1):
        total += measure(family, batch, counts).double().cpu() * len(batch)
        if progress is not None:
            progress(f"quality by {signal}: {number} of {len(batches)} batches")
    mean = total / images
    if not bool(mean.isfinite().all()):
        raise InputError(
            "the dense model's predictions hold NaN or infinity; check its weights, and that the "
            "images are finite and normalised"
        )
    # More patches are never worse: what little says otherwise is the sample's noise.
    falling = mean.flip(1).cummax(1).values.flip(1).clamp(min=0)
    rows_of_loss = {block + 1: tuple(row.tolist()) for block, row in enumerate(falling)}
    return Effects(signal, images, counts, rows_of_loss)


def _disagreement(family: ViT, images: Tensor, counts: Sequence[int]) -> Tensor:
    """(blocks, counts): KL of the dense model's answers and those with one stage."""
    tokens = family.stem(images)
    dense = family.answer(0, tokens)
    found = dense.new_zeros(family.depth - 1, len(counts))
    for block in range(1, family.depth):
        tokens, score_BN = _scored(family, block - 1, tokens)
        order_BN = score_BN.argsort(1, descending=True)
        for place, count in enumerate(counts[:-1]):
            kept = tokens.gather(order_BN[:, :count])
            logits = family.answer(block, kept)
            found[block - 1, place] = losses.distillation_loss(logits, dense)
    return found


def _lost_attention(family: ViT, images: Tensor, counts: Sequence[int]) -> Tensor:
    """(blocks, counts): class attention that goes to dropped patches, summed over the blocks."""
    tokens, shares = family.stem(images), list[Tensor]()
    for block in range(family.depth):
        tokens, score_BN = _scored(family, block, tokens)
        shares.append(score_BN / score_BN.sum(1, keepdim=True))
    last = torch.tensor(counts, device=images.device) - 1
    found = shares[0].new_zeros(family.depth - 1, len(counts))
    for block in range(1, family.depth):
        order_BN = shares[block - 1].argsort(1, descending=True)
        for share_BN in shares[block:]:
            kept = share_BN.gather(1, order_BN).cumsum(1)[:, last]
            found[block - 1] += 1 - kept.mean(0)
    found[:, -1] = 0  # of all patches nothing is lost, but for rounding
    return found


def _scored(family: ViT, block: int, tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The tokens behind a block, and its class attention to them (B, N)."""
    half, score_BN = family.attention_half(
        block, tokens, lambda record: record.patch_attention().mean(1).float()
    )
    after = family.mlp_half(block, half)
    assert isinstance(after, Tokens)
    assert score_BN is not None
    return after, score_BN
