"""What semantic tokens and positions look at: which rows of a memory, and which are hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrim.layers.semantic_attention import Keys
from vitrim.layers.semantic_windows import Windows
from vitrim.tokens.plain import Grid


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
    """What to add to attention logits so that keys are not seen where ``hidden`` is true, unless it
    is of all: then nobody asks what comes of it, but it must be a number.
    """
    hidden = hidden & ~hidden.all(-1, keepdim=True)
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


def position_keys(
    windows: Windows,
    reach: Grid,
    mask: PadMask,
    device: torch.device,
    own_B2: Tensor | None = None,
) -> Keys:
    """The positions of a larger window about each window: rows of a memory of all positions, of
    which each image sees its own.
    """
    row = torch.arange(math.prod(windows.grid), device=device)
    limit = windows.grid if own_B2 is None else own_B2
    return _bordered_keys(windows, windows.size, reach, windows.grid, limit, row, mask)


def token_keys(
    windows: Windows,
    reach: Grid,
    mask: PadMask,
    device: torch.device,
    own_B2: Tensor | None = None,
) -> Keys:
    """The semantic tokens about each window, ``reach`` rows and columns of their map: rows of a
    memory of all semantic tokens, window by window.
    """
    order = token_order(windows, device)
    row = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    limit: Grid | Tensor = windows.visible_tokens if mask == "correct" else windows.tokens
    limit = limit if own_B2 is None else windows.own_tokens(own_B2)
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
    limit: Grid | Tensor,
    row_N: Tensor,
    mask: PadMask,
) -> Keys:
    """The keys of larger windows that may leave a map of ``grid`` places, of which those within
    ``limit``, the same for all images or (B, 2), can be seen; ``row_N`` says in which row of the
    memory each place is.
    """
    rows, columns = window_places(windows.shape, size, reach, False, row_N.device)
    most = limit[:, :, None, None].unbind(1) if isinstance(limit, Tensor) else limit
    seen = (rows >= 0) & (rows < most[0]) & (columns >= 0) & (columns < most[1])
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


@dataclass(frozen=True, slots=True)
class Look:
    """What the blocks of a unit of STViT-R look at, on the windows of a map."""

    windows: Windows
    generation: Keys
    again: Keys
    local: Keys
    everywhere: Keys
    recovery: Keys


def classification_look(windows: Windows, reach: Grid, device: torch.device) -> Look:
    """Larger windows for the first generation block, everywhere for the second and the recovery.

    Args:
        windows: of the map.
        reach: rows and columns of the larger windows.
        device: of the result.
    """
    local, everywhere = _among_tokens(windows, True, device)
    again = everywhere
    if everywhere.bias_WK is not None:
        positions = everywhere.bias_WK.new_zeros(1, math.prod(windows.grid))
        again = Keys(None, torch.cat([everywhere.bias_WK, positions], 1))
    generation = own_and_near(windows, reach, device)
    return Look(windows, generation, again, local, everywhere, everywhere)


def dense_look(
    windows: Windows,
    reaches: Sequence[Grid],
    mask: PadMask,
    device: torch.device,
    own_B2: Tensor | None = None,
) -> Look:
    """Larger windows for the generation blocks and, of semantic tokens, for the recovery.

    Args:
        windows: of the map.
        reaches: rows and columns of these three.
        mask: what is hidden of the padding.
        device: of the result.
        own_B2: rows and columns of each image's own positions, where the map itself has padding;
            then ``mask`` is ``correct``.
    """
    first, second, last = reaches
    local, everywhere = _among_tokens(windows, mask == "correct", device, own_B2)
    return Look(
        windows,
        position_keys(windows, first, mask, device, own_B2),
        position_keys(windows, second, mask, device, own_B2),
        local,
        everywhere,
        token_keys(windows, last, mask, device, own_B2),
    )


def _among_tokens(
    windows: Windows, hide: bool, device: torch.device, own_B2: Tensor | None = None
) -> tuple[Keys, Keys]:
    """The semantic tokens of each window, and all of them; ``hide`` those of padding alone."""
    own, hidden_WS = token_rows(windows, device), windows.hidden_tokens(device)
    if own_B2 is not None:
        hidden_BWS = windows.hidden_tokens_of_each(own_B2)
        all_of_them = hidden_BWS.flatten(1).unsqueeze(1)
        return Keys(own, hiding(hidden_BWS)), Keys(None, hiding(all_of_them))
    if not hide or not windows.is_padded:
        return Keys(own), Keys(None)
    return Keys(own, hiding(hidden_WS)), Keys(None, hiding(hidden_WS.view(1, -1)))
