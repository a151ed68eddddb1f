"""Semantic tokens in the windows of a map, and attention between windows of different sizes.

A map is cut into whole windows; its last ones may hang over the border. ``side`` x ``side``
semantic tokens stand for each window. They are kept window by window, (B, W, S, C) with S tokens in
each of W windows, or as a map of their own, (B, rows * side, columns * side, C).

Keys and values are projected once per row of a memory, then gathered for each window: windows
overlap, and a projection per window would repeat the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from vitrim.config import require
from vitrim.macs import linear_macs
from vitrim.tokens import Grid


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


@dataclass(frozen=True, slots=True)
class Keys:
    """Which rows of a memory the queries of each window look at."""

    index_WK: Tensor | None
    """None: one window, which looks at all rows."""
    bias_WK: Tensor | None = None
    """Added to the attention logits: -inf hides a key; None hides none."""


def window_places(
    shape: Grid, size: Grid, reach: Grid, inside: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows and columns (W, K) of the places in a larger window about each window.

    Args:
        shape: rows and columns of windows.
        size: of a window.
        reach: of the larger windows; centred on the small ones, half a place up and left.
        inside: move the larger windows so that none leaves the map.
        device: of the result.
    """
    axes = []
    for count, window, wide in zip(shape, size, reach, strict=True):
        start = torch.arange(count, device=device) * window - (wide - window) // 2
        if inside:
            start = start.clamp(0, max(0, count * window - wide))
        axes.append(start[:, None] + torch.arange(wide, device=device))
    rows, columns = axes
    row = rows[:, None, :, None].expand(-1, shape[1], -1, reach[1])
    column = columns[None, :, None, :].expand(shape[0], -1, reach[0], -1)
    return row.flatten(2).flatten(0, 1), column.flatten(2).flatten(0, 1)


def hiding(hidden: Tensor) -> Tensor:
    """What to add to attention logits so that keys are not seen where ``hidden`` is true."""
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -math.inf)


def token_rows(windows: Windows, device: torch.device) -> Tensor:
    """(W, S): the rows of each window's semantic tokens, if a memory begins with them."""
    return torch.arange(windows.num_tokens, device=device).view(windows.count, -1)


def own_and_near(windows: Windows, reach: Grid, device: torch.device) -> Keys:
    """Each window's own semantic tokens, and the positions of a larger window that is moved into
    the map: rows of a memory of all semantic tokens, then all positions. Padding is not seen.
    """
    own = token_rows(windows, device)
    rows, columns = window_places(windows.shape, windows.size, reach, True, device)
    height, width = windows.grid
    beyond = (rows >= height) | (columns >= width)
    near = own.numel() + rows.clamp(max=height - 1) * width + columns.clamp(max=width - 1)
    hidden = torch.cat([windows.hidden_tokens(device), beyond], 1)
    bias = hiding(hidden) if windows.is_padded else None
    return Keys(torch.cat([own, near], 1), bias)


PadMask = Literal["correct", "official", "off"]
"""What is hidden of the padding where windows hang over the border: all of it, what the authors'
masks of STViT-R hide of it, or nothing. In the last two, the memory ends with a row for padding."""
_HARDLY_SEEN = -1000.0
"""What the authors add to the logits of what their masks hide."""


def position_keys(windows: Windows, reach: Grid, mask: PadMask, device: torch.device) -> Keys:
    """The positions of a larger window about each window: rows of a memory of all positions."""
    row = torch.arange(math.prod(windows.grid), device=device)
    limit = windows.grid
    return _bordered_keys(windows, windows.size, reach, windows.grid, limit, row, mask)


def token_keys(windows: Windows, reach: Grid, mask: PadMask, device: torch.device) -> Keys:
    """The semantic tokens about each window, ``reach`` rows and columns of their map: rows of a
    memory of all semantic tokens, window by window.
    """
    order = token_order(windows, device)
    row = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    limit = windows.visible_tokens if mask == "correct" else windows.tokens
    size = (windows.side, windows.side)
    return _bordered_keys(windows, size, reach, windows.tokens, limit, row, mask)


def token_order(windows: Windows, device: torch.device) -> Tensor:
    """(S,): where each semantic token, window by window, lies on their map, row by row."""
    places = torch.arange(windows.num_tokens, device=device)
    return windows.split_tokens(places.view(1, *windows.tokens, 1)).flatten()


def _bordered_keys(
    windows: Windows,
    size: Grid,
    reach: Grid,
    grid: Grid,
    limit: Grid,
    row_N: Tensor,
    mask: PadMask,
) -> Keys:
    """The keys of larger windows that may leave a map of ``grid`` places, of which those within
    ``limit`` can be seen; ``row_N`` says in which row of the memory each place is.
    """
    rows, columns = window_places(windows.shape, size, reach, False, row_N.device)
    seen = (rows >= 0) & (rows < limit[0]) & (columns >= 0) & (columns < limit[1])
    place = rows.clamp(0, grid[0] - 1) * grid[1] + columns.clamp(0, grid[1] - 1)
    index = row_N[place]
    if mask == "correct":
        return Keys(index, hiding(~seen))
    index = index.masked_fill(~seen, len(row_N))
    if mask == "off":
        return Keys(index)
    # The authors hide what is beyond the whole windows and, within them, the lower right corner
    # that is padding; if nothing is padded below (or right), every row (or column) belongs to it.
    # They count the padding in positions, on the map of semantic tokens too.
    whole = windows.shape[0] * size[0], windows.shape[1] * size[1]
    hidden = (rows < 0) | (rows >= whole[0]) | (columns < 0) | (columns >= whole[1])
    below, right = (
        axis >= (length - padding if padding else 0)
        for axis, length, padding in zip((rows, columns), whole, windows.padding, strict=True)
    )
    bias = torch.zeros_like(hidden, dtype=torch.float32)
    return Keys(index, bias.masked_fill(hidden | (below & right), _HARDLY_SEEN))


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


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """What went on in one layer of attention between windows."""

    q_BWHQD: Tensor
    k_BWHKD: Tensor
    mask: Tensor | None
    """Added to the logits."""
    keys: Keys

    def weights(self) -> Tensor:
        """(B, W, H, Q, K)"""
        q = self.q_BWHQD * self.q_BWHQD.shape[-1] ** -0.5
        logits = q @ self.k_BWHKD.transpose(-2, -1)
        if self.mask is not None:
            logits = logits + self.mask
        weights: Tensor = logits.softmax(-1)
        return weights

    def looks(self, windows: Windows, first_row: int) -> Tensor:
        """(B, S, N): how much each visible semantic token, in the order of their map, looks at each
        position, the mean over heads; the positions begin at ``first_row`` of the memory.
        """
        weights_BWQK = self.weights().float().mean(2)
        last_row = first_row + math.prod(windows.grid)
        looks = weights_BWQK
        if self.keys.index_WK is not None:
            index = self.keys.index_WK[None, :, None, :].expand_as(weights_BWQK)
            num_rows = max(last_row, int(self.keys.index_WK.max()) + 1)
            looks = weights_BWQK.new_zeros(*index.shape[:3], num_rows)
            looks = looks.scatter_add(3, index, weights_BWQK)
        looks_BWSN = looks[..., first_row:last_row]
        looks_BWSN = looks_BWSN.reshape(len(looks), windows.count, -1, last_row - first_row)
        rows, columns = windows.visible_tokens
        return windows.join_tokens(looks_BWSN)[:, :rows, :columns].flatten(1, 2)


def window_cross_attention(
    attention: WindowAttention,
    query_BWQC: Tensor,
    memory_BMC: Tensor,
    keys: Keys,
    bias_HQK: Tensor | None = None,
    project_once: bool = True,
) -> tuple[Tensor, WindowRecord]:
    """A Swin attention layer used between windows: its projections, split by rows, and no shift.

    Args:
        attention: its position biases are not used.
        query_BWQC: what asks, window by window, normalised for attention.
        memory_BMC: what is looked at, likewise; it gives keys and values.
        keys: which rows of the memory each window looks at.
        bias_HQK: added to the logits of every window.
        project_once: project each row of the memory once; else again for each window that looks at
            it, which gives the same numbers.

    Returns:
        the layer's output (B, W, Q, C), and its inner values.
    """
    batch, windows, queries, _ = query_BWQC.shape
    width, heads = attention.proj.in_features, attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(query_BWQC, weight[:width], bias_q)
    kv = F.linear(memory_BMC, weight[width:], bias_kv) if project_once else memory_BMC
    if keys.index_WK is None:
        kv = kv.unsqueeze(1)
    else:
        gathered = kv.index_select(1, keys.index_WK.flatten())
        kv = gathered.view(batch, *keys.index_WK.shape, -1)
    if not project_once:
        kv = F.linear(kv, weight[width:], bias_kv)
    q = q.view(batch, windows, queries, heads, -1).transpose(2, 3)
    k, v = kv.view(*kv.shape[:3], 2, heads, -1).permute(3, 0, 1, 4, 2, 5).unbind(0)
    mask = _mask(keys, bias_HQK, q.dtype)
    spread = mask
    if mask is not None and len(mask) > 1:
        spread = mask.expand(batch, *mask.shape).flatten(0, 1)
    context = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        attn_mask=None if spread is None else spread.expand(-1, -1, queries, -1),
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )
    out = context.transpose(1, 2).reshape(batch, windows, queries, width)
    out = attention.proj_drop(attention.proj(out))
    return out, WindowRecord(q, k, mask, keys)


def _mask(keys: Keys, bias_HQK: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the logits (W, H, Q, K), some of these 1; None: nothing."""
    mask = None if keys.bias_WK is None else keys.bias_WK[:, None, None, :]
    if bias_HQK is not None:
        mask = bias_HQK[None] if mask is None else mask + bias_HQK
    return None if mask is None else mask.to(dtype)


def window_cross_attention_macs(
    attention: WindowAttention, num_queries: Any, num_rows: Any, num_keys: Any
) -> Any:
    """MACs of :func:`window_cross_attention`.

    Args:
        attention: the layer.
        num_queries: of all windows together.
        num_rows: rows that are projected to keys and values: those of the memory, or those of all
            windows if each projects its own.
        num_keys: that each query looks at.
    """
    per_row = 2 * attention.qkv.weight.numel() // 3
    per_query = linear_macs(attention) - per_row
    attending = 2 * attention.proj.in_features * num_queries * num_keys
    return per_query * num_queries + per_row * num_rows + attending
