"""The map of a plain vision transformer from which tokens leave: every place shows what its token
was last.

Kept tokens are at their places. A dropped one shows the features that it had when it was dropped, a
merged one those of the token that it is in, and so do all places of a merged token that is dropped.
Package tokens have no place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitrim.layers.merging import Moves, rows_of
from vitrim.tokens.packed import AnyTokens, PackedTokens
from vitrim.tokens.plain import Grid


class Canvas:
    """Is told of stages as :class:`vitrim.methods.records.Recorder` is, and paints them.

    Differentiable; under a mask, a place blends what its token is and what it was, so that the
    decision has a gradient.
    """

    reads_scores = False

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._x_BNC: Tensor | None = None
        self._there_BN: Tensor | None = None
        self._group_BN: Tensor | None = None

    @property
    def map_BCHW(self) -> Tensor:
        """What was painted last."""
        assert self._x_BNC is not None
        x_BCN = self._x_BNC.transpose(1, 2)
        return x_BCN.reshape(*x_BCN.shape[:2], *self.grid)

    @property
    def keep_BHW(self) -> Tensor:
        """1 where a place shows a token that was there when the map was painted last."""
        assert self._there_BN is not None
        return self._there_BN.view(-1, *self.grid)

    def add(
        self,
        block: int,
        before: AnyTokens,
        scores: Any,
        after: AnyTokens,
        moves: Moves | None = None,
    ) -> None:
        """Before ``block``, ``after`` goes on of ``before``; ``moves`` says what went into what."""
        self.paint(before)
        if moves is not None:
            self._regroup(*moves)

    def paint(self, tokens: AnyTokens) -> None:
        """Show what the tokens are now."""
        num_patches, patches = math.prod(self.grid), tokens.patches
        keep = None if isinstance(tokens, PackedTokens) else tokens.keep_BN
        keep = patches.new_ones(patches.shape[:-1]) if keep is None else keep.to(patches.dtype)
        x_BNC = tokens.on_grid(patches, num_patches, 0.0)
        there_BN = tokens.on_grid(keep, num_patches, 0.0)
        if self._group_BN is not None:
            x_BNC = rows_of(x_BNC, self._group_BN)
            there_BN = there_BN.gather(1, self._group_BN)
        if self._x_BNC is not None:
            there_BN1 = there_BN.unsqueeze(-1)
            x_BNC = there_BN1 * x_BNC + (1 - there_BN1) * self._x_BNC
        self._x_BNC, self._there_BN = x_BNC, there_BN

    def _regroup(self, source_BD: Tensor, target_BD: Tensor) -> None:
        """Tokens went into others; those that went nowhere (-1) are dropped."""
        num_patches = math.prod(self.grid)
        place_N = torch.arange(num_patches + 1, device=source_BD.device)
        into_BN = place_N.expand(source_BD.shape[0], -1)
        target_BD = target_BD.where(target_BD >= 0, source_BD)
        into_BN = into_BN.scatter(1, source_BD % (num_patches + 1), target_BD)
        if self._group_BN is None:
            self._group_BN = into_BN[:, :num_patches]
        else:
            self._group_BN = into_BN.gather(1, self._group_BN)
