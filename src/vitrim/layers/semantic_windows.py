"""Semantic tokens in the windows of a map.

A map is cut into whole windows; its last ones may hang over the border. ``side`` x ``side``
semantic tokens stand for each window. They are kept window by window, (B, W, S, C) with S tokens in
each of W windows, or as a map of their own, (B, rows * side, columns * side, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from vitrim.config import require
from vitrim.layers.pooling import bounds
from vitrim.tokens.plain import Grid


@dataclass(frozen=True, slots=True)
class Windows:
    """How a map is cut into windows, and how many semantic tokens stand for each."""

    grid: Grid
    """Rows and columns of the map."""
    size: Grid
    """Rows and columns of a window."""
    side: int
    """Semantic tokens per side of a window."""

    @property
    def shape(self) -> Grid:
        """Rows and columns of windows."""
        return -(-self.grid[0] // self.size[0]), -(-self.grid[1] // self.size[1])

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def whole(self) -> Grid:
        """Rows and columns of the map with what its last windows hang over."""
        return self.shape[0] * self.size[0], self.shape[1] * self.size[1]

    @property
    def padding(self) -> Grid:
        """Rows below and columns right of the map that its last windows hang over."""
        return self.whole[0] - self.grid[0], self.whole[1] - self.grid[1]

    @property
    def is_padded(self) -> bool:
        return self.whole != self.grid

    @property
    def tokens(self) -> Grid:
        """Rows and columns of semantic tokens."""
        return self.shape[0] * self.side, self.shape[1] * self.side

    @property
    def num_tokens(self) -> int:
        return math.prod(self.tokens)

    @property
    def visible_tokens(self) -> Grid:
        """Rows and columns of the semantic tokens that stand for at least one position."""
        rows, columns = (
            sum(token * size // self.side < length for token in range(tokens))
            for length, size, tokens in zip(self.grid, self.size, self.tokens, strict=True)
        )
        return rows, columns

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """The row and the column of a window that each row and column of its semantic tokens stands
        for: the middle of what is pooled, rounded down.
        """
        rows, columns = (
            [(start + end - 1) // 2 for start, end in bounds(length, self.side)]
            for length in self.size
        )
        return rows, columns

    def own_tokens(self, own_B2: Tensor) -> Tensor:
        """(B, 2): rows and columns of the semantic tokens that stand for one at least of an image's
        own positions, of which there are ``own_B2`` rows and columns.
        """
        counts = []
        for axis in (0, 1):
            first = torch.arange(self.tokens[axis], device=own_B2.device) * self.size[axis]
            counts.append((first // self.side < own_B2[:, axis : axis + 1]).sum(1))
        return torch.stack(counts, 1)

    def reach(self, side: int | None, default: float) -> Grid:
        """Rows and columns of a larger window: ``side`` each, or so many times the window's own;
        never more than the whole map.
        """
        rows, columns = (
            min(round(default * size) if side is None else side, whole)
            for size, whole in zip(self.size, self.whole, strict=True)
        )
        return rows, columns

    def hidden_tokens(self, device: torch.device) -> Tensor:
        """(W, S): true for semantic tokens that stand for no position."""
        rows, columns = self.visible_tokens
        hidden = torch.ones(1, *self.tokens, 1, dtype=torch.bool, device=device)
        hidden[:, :rows, :columns] = False
        return self.split_tokens(hidden)[0, :, :, 0]

    def hidden_tokens_of_each(self, own_B2: Tensor) -> Tensor:
        """(B, W, S): the same for each image's own positions, see :meth:`own_tokens`."""
        rows_B1, columns_B1 = self.own_tokens(own_B2).unsqueeze(2).unbind(1)
        row_R, column_C = (torch.arange(count, device=own_B2.device) for count in self.tokens)
        hidden = (row_R >= rows_B1).unsqueeze(2) | (column_C >= columns_B1).unsqueeze(1)
        return self.split_tokens(hidden.unsqueeze(-1)).squeeze(-1)

    def pad(self, x_BHWC: Tensor) -> Tensor:
        """The map with zeros where the last windows hang over it."""
        bottom, right = self.padding
        return F.pad(x_BHWC, (0, 0, 0, right, 0, bottom)) if self.is_padded else x_BHWC

    def split(self, x_BHWC: Tensor) -> Tensor:
        """(B, W, positions, C): the positions of a whole map, window by window."""
        return _split(x_BHWC, self.size)

    def join(self, x_BWNC: Tensor) -> Tensor:
        """The map of :meth:`split`, without what its windows hang over."""
        rows, columns = self.grid
        return _join(x_BWNC, self.size, self.whole)[:, :rows, :columns]

    def split_tokens(self, map_BHWC: Tensor) -> Tensor:
        """(B, W, S, C): a map of semantic tokens, window by window."""
        return _split(map_BHWC, (self.side, self.side))

    def join_tokens(self, tokens_BWSC: Tensor) -> Tensor:
        """The map of :meth:`split_tokens`."""
        return _join(tokens_BWSC, (self.side, self.side), self.tokens)

    def pool(
        self, x_BHWC: Tensor, pooling: Callable[[Tensor, Grid], Tensor], zeros: bool = False
    ) -> Tensor:
        """(B, W, S, C): each window pooled to semantic tokens.

        Beyond the border of the map, pooling sees the border's positions again, so that the largest
        value of a region is that of its positions in the map; or zeros, if asked for.
        """
        map_BCHW = x_BHWC.permute(0, 3, 1, 2)
        if self.is_padded:
            bottom, right = self.padding
            map_BCHW = F.pad(map_BCHW, (0, right, 0, bottom), "constant" if zeros else "replicate")
        pooled_BSC = pooling(map_BCHW, self.tokens)
        return self.split_tokens(pooled_BSC.reshape(-1, *self.tokens, pooled_BSC.shape[-1]))


def _split(x_BHWC: Tensor, size: Grid) -> Tensor:
    windows = window_partition(x_BHWC, size)
    return windows.reshape(x_BHWC.shape[0], -1, math.prod(size), x_BHWC.shape[-1])


def _join(x_BWNC: Tensor, size: Grid, whole: Grid) -> Tensor:
    windows = x_BWNC.reshape(-1, *size, x_BWNC.shape[-1])
    joined: Tensor = window_reverse(windows, size, *whole)
    return joined


def global_centres(
    tokens: Grid, dim: int, generator: torch.Generator | None = None
) -> nn.Parameter:
    """New global centres (S, C) of a map of semantic tokens."""
    centres = torch.empty(math.prod(tokens), dim)
    return nn.Parameter(nn.init.trunc_normal_(centres, std=0.02, generator=generator))


def resized_centres(centres_SC: Tensor, made_for: Grid, tokens: Grid) -> Tensor:
    """(1, rows, columns, C): global centres on a map of semantic tokens, interpolated if it is not
    the one that they were made for.
    """
    map_1HWC = centres_SC.view(1, *made_for, -1)
    if made_for == tokens:
        return map_1HWC
    resized = F.interpolate(map_1HWC.permute(0, 3, 1, 2), tokens, mode="bilinear")
    return resized.permute(0, 2, 3, 1)


def tokens_side(window_tokens: int) -> int:
    """The side of a square number of semantic tokens."""
    side = math.isqrt(max(window_tokens, 0))
    require(
        window_tokens >= 1 and side * side == window_tokens,
        f"window_tokens is {window_tokens}; expected a square number, such as 4, 9 or 16",
    )
    return side


def windows_of(map_grid: Grid, window: Grid, window_tokens: int) -> Windows:
    """The windows of a map, if ``window_tokens`` semantic tokens fit into each."""
    side = tokens_side(window_tokens)
    require(
        side <= min(window),
        f"window_tokens is {window_tokens}; the windows of this backbone have "
        f"{window[0]} x {window[1]} positions",
    )
    return Windows(map_grid, window, side)
