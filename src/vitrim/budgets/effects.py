"""What fewer patch tokens cost in quality, measured on images without labels.

For one stage at a time, and each action that it may take (``Method.fewer``): so many tokens go on
from a block, everything else is the dense model. Where patches are dropped, the image's best by
class attention go on; merging merges, or drops, as it does at inference. Two signals say what that
does:

* ``agreement``: KL(dense || sparse) of the predictions, mean over the images. A forward from each
  block for each count and action: the dearer and the better one.
* ``attention``: the share of their class attention that the blocks behind the stage lose, because
  what they paid it to is gone; mean over the images, summed over the blocks. One dense forward; of
  dropped tokens alone.

Several stages add up: a stage costs what its drop, from the count before to the count after, costs
by itself at its place. Ours; no paper is behind it.
"""

from __future__ import annotations

import math
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
from vitrim.methods import method_of_config
from vitrim.methods.base import Method
from vitrim.methods.dynamicvit import DynamicViTConfig
from vitrim.methods.records import Action, Plan
from vitrim.tokens.attention import AttentionRecord
from vitrim.tokens.plain import Tokens

Signal = Literal["agreement", "attention"]
LEAST_IMAGES = 8
"""With fewer the signal would follow single images."""
_DROPPING = DynamicViTConfig()
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
    loss: dict[Action, dict[int, tuple[float, ...]]]
    """By action, per block that a stage may stand before: one number per count, falling to 0."""

    @property
    def blocks(self) -> list[int]:
        """Before which a stage may stand."""
        return sorted(next(iter(self.loss.values())))

    def at(self, block: int, count: int, action: Action = "drop") -> float:
        """The loss of leaving ``count`` patches before ``block``; constant below what was measured,
        and between that on a parabola: losses grow about as the square of what is missing, and on
        straight lines a schedule would be drawn to the measured counts.
        """
        losses_at, place = self.loss[action][block], bisect_left(self.counts, count)
        if place == 0 or self.counts[place] == count:
            return losses_at[place]
        low, high = self.counts[place - 1], self.counts[place]
        share = (count - low) / (high - low)
        roots = math.sqrt(losses_at[place - 1]), math.sqrt(losses_at[place])
        return ((1 - share) * roots[0] + share * roots[1]) ** 2

    def stage(self, block: int, before: int, after: int, action: Action = "drop") -> float:
        """The loss of a stage before ``block`` that leaves ``after`` of ``before`` patches."""
        return self.at(block, after, action) - self.at(block, before, action)

    def total(self, plan: Plan) -> float:
        """The loss of a whole schedule."""
        before = (self.counts[-1], *plan.counts)
        drops: list[Action] = ["drop"] * len(plan.stages)
        return sum(map(self.stage, plan.stages, before, plan.counts, plan.actions or drops))


def measured_counts(num_patches: int) -> tuple[int, ...]:
    """Where effects are measured: closer where tokens are few, as much is lost there."""
    return tuple(sorted({max(1, round(share * num_patches)) for share in _SHARES}))


@torch.no_grad()
def measure_effects(
    family: Any,
    batches: Sequence[Tensor],
    signal: Signal = "agreement",
    *,
    config: Any = _DROPPING,
    progress: Callable[[str], None] | None = None,
) -> Effects:
    """The effects of single stages before every block but the first.

    Args:
        family: runs the dense backbone, which is in evaluation mode.
        batches: prepared images of one size, on the backbone's device.
        signal: what to measure by.
        config: of the method that is meant; those that drop patches are all alike.
        progress: told in words how far it is.

    Raises:
        ConfigError: the backbone is no plain transformer, whose patches could be dropped; or the
            signal does not see what the method does.
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
    with torch.device("meta"):  # nothing that it could have learned is asked
        method = method_of_config(config)(family, config)
    require(
        signal == "agreement" or method.actions == ("drop",),
        f"the signal {signal!r} sees dropped tokens alone; measure {method.name} by agreement",
    )
    measure = {"agreement": _disagreement, "attention": _lost_attention}[signal]
    total = torch.zeros(len(method.actions), family.depth - 1, len(counts), dtype=torch.float64)
    for number, batch in enumerate(batches, 1):
        total += measure(family, method, batch, counts).double().cpu() * len(batch)
        if progress is not None:
            progress(f"quality by {signal}: {number} of {len(batches)} batches")
    mean = total / images
    if not bool(mean.isfinite().all()):
        raise InputError(
            "the dense model's predictions hold NaN or infinity; check its weights, and that the "
            "images are finite and normalised"
        )
    # More patches are never worse: what little says otherwise is the sample's noise.
    falling = mean.flip(2).cummax(2).values.flip(2).clamp(min=0)
    loss = {
        action: {block: tuple(row.tolist()) for block, row in enumerate(rows_of_loss, 1)}
        for action, rows_of_loss in zip(method.actions, falling, strict=True)
    }
    return Effects(signal, images, counts, loss)


def _disagreement(family: ViT, method: Method, images: Tensor, counts: Sequence[int]) -> Tensor:
    """(actions, blocks, counts): KL of the dense model's answers and those with one stage."""
    tokens = family.stem(images)
    dense = family.answer(0, tokens)
    found = dense.new_zeros(len(method.actions), family.depth - 1, len(counts))
    for block in range(1, family.depth):
        half, record, tokens = _scored(family, block - 1, tokens)
        for number, action in enumerate(method.actions):
            for place, count in enumerate(counts[:-1]):
                fewer = method.fewer(half, record, count, action)
                logits = family.answer(block, family.mlp_half(block - 1, fewer))
                found[number, block - 1, place] = losses.distillation_loss(logits, dense)
    return found


def _lost_attention(family: ViT, method: Method, images: Tensor, counts: Sequence[int]) -> Tensor:
    """(1, blocks, counts): class attention that goes to dropped patches, summed over the blocks."""
    tokens, shares = family.stem(images), list[Tensor]()
    for block in range(family.depth):
        _, record, tokens = _scored(family, block, tokens)
        score_BN = record.patch_attention().mean(1).float()
        shares.append(score_BN / score_BN.sum(1, keepdim=True))
    last = torch.tensor(counts, device=images.device) - 1
    found = shares[0].new_zeros(family.depth - 1, len(counts))
    for block in range(1, family.depth):
        order_BN = shares[block - 1].argsort(1, descending=True)
        for share_BN in shares[block:]:
            kept = share_BN.gather(1, order_BN).cumsum(1)[:, last]
            found[block - 1] += 1 - kept.mean(0)
    found[:, -1] = 0  # of all patches nothing is lost, but for rounding
    return found.unsqueeze(0)


def _scored(family: ViT, block: int, tokens: Tokens) -> tuple[Tokens, AttentionRecord, Tokens]:
    """The tokens between the halves of a block, what its attention did, and those behind it."""
    records = list[AttentionRecord]()

    def score(record: AttentionRecord) -> Tensor:
        records.append(record)
        return record.patch_attention().mean(1)

    half, _ = family.attention_half(block, tokens, score)
    after = family.mlp_half(block, half)
    assert isinstance(half, Tokens)
    assert isinstance(after, Tokens)
    return half, records[0], after
