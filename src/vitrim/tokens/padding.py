"""Per-image token counts in one graph, for runtimes that take several images per call.

A graph knows no rows of unequal images (``packed.py``), so each image's kept tokens stand at
the front of as many slots as the fullest image of the batch needs, and a mask hides the rest. How
many that is depends on the images: it is the one size that is found at run time, as the number of
non-zero elements of "some image fills this slot", which every runtime can count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrim.tokens.plain import Tokens, index_like


@dataclass(frozen=True, slots=True)
class PaddedTokens(Tokens):
    """Tokens of which some are padding: hidden by the keep mask, at a place beyond the grid."""

    def on_grid(self, values: Tensor, num_patches: int, fill: float) -> Tensor:
        """(B, num_patches, ...): ``values`` (B, N, ...) on the grid, ``fill`` elsewhere."""
        grid = values.new_full((self.num_images, num_patches + 1, *values.shape[2:]), fill)
        return grid.scatter(1, index_like(self.index_BN, values), values)[:, :num_patches]


def select_padded(tokens: Tokens, keep_BN: Tensor, packages_BPC: Tensor | None) -> Tokens:
    """What :func:`vitrim.tokens.packed.select` does, without a step that a graph cannot express."""
    num_images, num_places = keep_BN.shape
    beyond_B1 = keep_BN.new_zeros(num_images, 1)
    alive_BK = torch.cat([keep_BN, beyond_B1], 1).gather(1, tokens.index_BN)
    if tokens.keep_BN is not None:
        alive_BK = alive_BK & (tokens.keep_BN > 0.5)
    counts_B1 = alive_BK.sum(1, keepdim=True)
    present = tokens.num_patches
    slot_K = torch.arange(present, device=keep_BN.device)
    slot_S = (slot_K < counts_B1).any(0).nonzero().squeeze(1)

    # Kept tokens move up to the slot of their rank; the others share one that is cut off.
    target_BK = (alive_BK.long().cumsum(1) - 1).where(alive_BK, present)
    source_BK = slot_K.new_zeros(num_images, present + 1)
    source_BK = source_BK.scatter(1, target_BK, slot_K.expand(num_images, present))
    kept = tokens.gather(source_BK.index_select(1, slot_S))
    visible_BS = slot_S < counts_B1
    index_BS = kept.index_BN.where(visible_BS, num_places)
    keep_BS = visible_BS.to(kept.x.dtype)
    padded = PaddedTokens(kept.x, kept.num_prefix, index_BS, keep_BS, rotary=kept.rotary)
    padded = padded.sized(kept.size_BN)
    if packages_BPC is None:
        return padded
    return padded.with_prefix(torch.cat([kept.prefix_BPC, packages_BPC], 1))
