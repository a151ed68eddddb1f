"""A Swin block of which only some positions are computed.

The positions of a batch of maps are rows, image after image, and row-major in each image. A block's
linear layers run on the rows that are asked for; its attention runs on whole windows, as timm's
does, and hides the positions that are dropped. One package token per image stands for these: it is
a key in every window, and no block changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from vitrim.costs.macs import linear_macs
from vitrim.tokens.attention import attend
from vitrim.tokens.calls import called, in_features, of_zeros
from vitrim.tokens.graphs import exporting
from vitrim.tokens.plain import Grid
from vitrim.tokens.slices import in_slices


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Where the positions that take part lie in a block's windows; blocks of one shift share it."""

    num_images: int
    windows: int
    """Of one image."""
    whole: Grid
    """Rows and columns of the map with what its last windows hang over."""
    slot_P: Tensor
    """(B * windows * area,): the computed row at each place of the windows; the next number stands
    for a position that is not computed, the one after it for padding."""
    place_T: Tensor
    """(T,): the place of each computed row."""
    hidden_K: Tensor
    """(B, windows, 1, 1, area + 1) bool: keys that nobody sees. Padding is seen, as in timm; the
    package, which is the last, where its image hides anything."""

    @classmethod
    def of(
        cls,
        block: Any,
        grid: Grid,
        row_T: Tensor,
        visible_BN: Tensor,
        real_BN: Tensor | None = None,
    ) -> WindowPlan:
        """The plan for a block.

        Args:
            block: a ``timm.models.swin_transformer.SwinTransformerBlock``.
            grid: rows and columns of the map.
            row_T: the rows that are computed.
            visible_BN: bool, the positions that others see; all of them are computed.
            real_BN: bool, the positions that are no padding of the map, if it has some; then
                windows are padded before they are shifted, see :func:`real_attention`.
        """
        num_images, num_positions = visible_BN.shape
        order_WA = _window_order(block, grid, row_T.device, pad_first=real_BN is not None)
        windows, order_P, whole = len(order_WA), order_WA.flatten(), _whole(block, grid)
        count = torch.ones_like(row_T).cumsum(0)
        absent = row_T.new_full((visible_BN.numel(),), row_T.shape[0])
        slot_BN = absent.scatter(0, row_T, count - 1).view(visible_BN.shape)
        padding_B1 = slot_BN.new_full((num_images, 1), row_T.shape[0] + 1)
        slot_BN = torch.cat([slot_BN, padding_B1], 1)
        # The place of each position among the windows is the inverse of their order.
        place_P = torch.arange(len(order_P), device=row_T.device)
        place_N = place_P.new_empty(num_positions + 1).scatter(0, order_P, place_P)
        place_T = row_T // num_positions * len(order_P)
        place_T = place_T + place_N.index_select(0, row_T % num_positions)
        hidden = F.pad(~visible_BN, (0, 1), value=real_BN is not None).index_select(1, order_P)
        drops_none = visible_BN if real_BN is None else visible_BN | ~real_BN
        package = drops_none.all(1).view(-1, 1, 1).expand(-1, windows, 1)
        hidden = torch.cat([hidden.view(num_images, windows, -1), package], 2)
        if real_BN is not None:
            hidden = ~_or_all(~hidden)
        slot_P = slot_BN.index_select(1, order_P).flatten()
        return cls(num_images, windows, whole, slot_P, place_T, hidden[:, :, None, None])


def _window_order(block: Any, grid: Grid, device: torch.device, pad_first: bool) -> Tensor:
    """(windows, area) int64: the row-major position of a map at each place of the block's windows,
    cyclic shift included; the number of positions stands for padding.
    """
    rows, columns = grid
    position = torch.arange(rows * columns, device=device).view(1, rows, columns, 1)
    shift = (-block.shift_size[0], -block.shift_size[1])
    whole = _whole(block, grid)
    padding = (0, 0, 0, whole[1] - columns, 0, whole[0] - rows)
    if any(shift) and not pad_first:
        position = position.roll(shift, (1, 2))
    position = F.pad(position, padding, value=rows * columns)
    if any(shift) and pad_first:
        position = position.roll(shift, (1, 2))
    return window_partition(position, block.window_size).view(-1, block.window_area)


def _whole(block: Any, grid: Grid) -> Grid:
    """Rows and columns of a map with what its last windows hang over."""
    height, width = block.window_size
    return -(-grid[0] // height) * height, -(-grid[1] // width) * width


def real_attention(block: Any, x_BHWC: Tensor, real_BHW: Tensor) -> Tensor:
    """What a block's window attention gives where some positions are padding, which nobody sees.

    The map is padded to whole windows before it is shifted, as in the original Swin code: then an
    image's windows are the same, however far it was padded.

    Args:
        block: a ``timm.models.swin_transformer.SwinTransformerBlock``.
        x_BHWC: normalised for attention.
        real_BHW: bool, the positions that are no padding.
    """
    (height, width), size = x_BHWC.shape[1:3], block.window_size
    whole = _whole(block, (height, width))
    margin = (0, 0, 0, whole[1] - width, 0, whole[0] - height)
    x_BHWC, real_BHW1 = F.pad(x_BHWC, margin), F.pad(real_BHW.unsqueeze(-1), margin)
    shift = (-block.shift_size[0], -block.shift_size[1])
    x_BHWC, real_BHW1 = (part.roll(shift, (1, 2)) for part in (x_BHWC, real_BHW1))
    windows = window_partition(x_BHWC, size).flatten(1, 2)
    seen = window_partition(real_BHW1, size).flatten(1, 2).transpose(1, 2)
    bias = x_BHWC.new_zeros(seen.shape).masked_fill(~_or_all(seen), -math.inf)
    bias = bias.expand(-1, block.window_area, -1)
    if any(shift):
        bias = bias + _shift_mask(block, whole).to(bias).repeat(len(x_BHWC), 1, 1)
    windows = block.attn(windows, mask=bias).unflatten(1, size)
    out: Tensor = window_reverse(windows, size, *whole).roll(block.shift_size, (1, 2))
    return out[:, :height, :width]


def _or_all(seen: Tensor) -> Tensor:
    """The keys (..., K) that are seen; where that is none, all: nobody asks what comes of it, but
    it must be a number.
    """
    return seen | ~seen.any(-1, keepdim=True)


def _shift_mask(block: Any, whole: Grid) -> Tensor:
    """(windows, area, area): keeps apart what only a block's shift brings together."""
    mask: Tensor = block.attn_mask
    if block.dynamic_mask:  # then timm makes it for each map
        table = block.attn.relative_position_bias_table
        mask = block.get_attn_mask(table.new_empty(1, *whole, 1))
    return mask


def sparse_blocks(
    blocks: Sequence[Any],
    x_TC: Tensor,
    package_BC: Tensor,
    grid: Grid,
    row_T: Tensor,
    visible_BN: Tensor,
    real_BN: Tensor | None = None,
) -> Tensor:
    """Several blocks of a stage, one after the other, on some of its positions.

    Args:
        blocks: of the stage.
        x_TC: features of the positions that are computed.
        package_BC: one package token per image.
        grid: rows and columns of the map.
        row_T: which positions are computed.
        visible_BN: bool, those that others see; all of them are computed.
        real_BN: bool, those that are no padding of the map; None: all.
    """
    plans: dict[Grid, WindowPlan] = {}
    for block in blocks:
        if block.shift_size not in plans:
            plans[block.shift_size] = WindowPlan.of(block, grid, row_T, visible_BN, real_BN)
        x_TC = sparse_block(block, x_TC, package_BC, plans[block.shift_size])
    return x_TC


def sparse_block(block: Any, x_TC: Tensor, package_BC: Tensor, plan: WindowPlan) -> Tensor:
    """A Swin block for some positions: its own norms, projections, biases, shift and MLP.

    Args:
        block: a ``timm.models.swin_transformer.SwinTransformerBlock``.
        x_TC: features of the positions that are computed.
        package_BC: one package token per image.
        plan: where they are.
    """

    def drop(path: nn.Module, out: Tensor) -> Tensor:
        if not path.training:
            return out
        images = out.reshape(plan.num_images, -1, out.shape[1])
        whole: Tensor = path(images)  # it drops whole images
        return whole.flatten(0, 1)

    def run(x_TC: Tensor) -> Tensor:
        out = _attend(block, block.norm1(x_TC), block.norm1(package_BC), plan)
        x_TC = x_TC + drop(block.drop_path1, out)
        out = in_slices(lambda part: block.mlp(block.norm2(part)), x_TC)
        return x_TC + drop(block.drop_path2, out)

    return called(block, run, x_TC)


def sparse_block_macs(block: Any, grid: Grid, num_rows: Any) -> Any:
    """MACs of :func:`sparse_block` for one image, given how many positions are computed."""
    attention, places = block.attn, math.prod(_whole(block, grid))
    keys = 2 * in_features(attention.proj) * places * (int(block.window_area) + 1)
    return linear_macs(block) * num_rows + linear_macs(attention.qkv) + keys


def _attend(block: Any, x_TC: Tensor, package_BC: Tensor, plan: WindowPlan) -> Tensor:
    """(T, C): what the block's window attention adds to the positions that are computed."""
    return called(block.attn, partial(_attention, block, package_BC, plan), x_TC)


def _attention(block: Any, package_BC: Tensor, plan: WindowPlan, x_TC: Tensor) -> Tensor:
    attention, area = block.attn, block.window_area
    qkv, package = attention.qkv(x_TC), attention.qkv(package_BC)
    absent = qkv.new_zeros(1, qkv.shape[1])
    padding = of_zeros(attention.qkv, x_TC).to(qkv.dtype)
    qkv = torch.cat([qkv, absent, padding]).index_select(0, plan.slot_P)
    qkv = qkv.reshape(-1, area, 3, attention.num_heads, qkv.shape[1] // 3 // attention.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    package = package.reshape(plan.num_images, 1, 3, attention.num_heads, 1, q.shape[-1])
    package = package.expand(-1, plan.windows, -1, -1, -1, -1).flatten(0, 1)
    k, v = torch.cat([k, package[:, 1]], 2), torch.cat([v, package[:, 2]], 2)
    context = attend(attention, q, k, v, _bias(block, plan).to(q.dtype)).transpose(1, 2)
    if exporting():  # a runtime's attention may lay its result out otherwise
        context = context.clone(memory_format=torch.contiguous_format)
    context = context.reshape(-1, in_features(attention.proj))
    out: Tensor = attention.proj(context.index_select(0, plan.place_T))
    dropped: Tensor = attention.proj_drop(out)
    return dropped


def _bias(block: Any, plan: WindowPlan) -> Tensor:
    """(B * windows, H, area, area + 1): added to the logits of each key; the package, which has no
    place, has no bias of its own.
    """
    area = block.window_area
    bias = block.attn._get_rel_pos_bias().unsqueeze(1)
    if any(block.shift_size):
        bias = bias + _shift_mask(block, plan.whole).view(1, plan.windows, 1, area, area)
    bias = F.pad(bias, (0, 1))
    return bias.masked_fill(plan.hidden_K, -math.inf).flatten(0, 1)
