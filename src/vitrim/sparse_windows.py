"""A Swin block of which only some positions are computed.

The positions of a batch of maps are rows, image after image, and row-major in each image. A block's
linear layers run on the rows that are asked for; its attention runs on whole windows, as timm's
does, and hides the positions that are dropped. One package token per image stands for these: it is
a key in every window, and no block changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from vitrim.macs import linear_macs
from vitrim.packing import in_slices
from vitrim.tokens import Grid


@dataclass(frozen=True, slots=True)
class Positions:
    """Which positions of a batch of maps take part in a block."""

    row_T: Tensor
    """(T,) int64: the rows that are computed."""
    visible_R: Tensor
    """(B * rows * columns,) bool: the positions that others see; all of them are computed."""
    num_images: int
    grid: Grid

    @property
    def drops_B(self) -> Tensor:
        """(B,) bool: whether any position of an image is hidden."""
        return ~self.visible_R.view(self.num_images, -1).all(1)


def sparse_block(block: Any, x_TC: Tensor, package_BC: Tensor, positions: Positions) -> Tensor:
    """A Swin block for some positions: its own norms, projections, biases, shift and MLP.

    Args:
        block: a ``timm.models.swin_transformer.SwinTransformerBlock``.
        x_TC: features of the positions that are computed.
        package_BC: one package token per image.
        positions: which they are.
    """
    num_images = positions.num_images

    def drop(path: nn.Module, out: Tensor) -> Tensor:
        if not path.training:
            return out
        whole: Tensor = path(out.view(num_images, -1, out.shape[1]))  # it drops whole images
        return whole.flatten(0, 1)

    out = attend(block, block.norm1(x_TC), block.norm1(package_BC), positions)
    x_TC = x_TC + drop(block.drop_path1, out)
    out = in_slices(lambda part: block.mlp(block.norm2(part)), x_TC)
    return x_TC + drop(block.drop_path2, out)


def sparse_block_macs(block: Any, grid: Grid, num_rows: Any) -> Any:
    """MACs of :func:`sparse_block` for one image, given how many positions are computed."""
    attention, area = block.attn, int(block.window_area)
    sides = zip(grid, block.window_size, strict=True)
    places = math.prod(-(-length // window) * window for length, window in sides)
    keys = 2 * int(attention.proj.in_features) * places * (area + 1)
    return linear_macs(block) * num_rows + linear_macs(attention.qkv) + keys


def window_order(block: Any, grid: Grid, device: torch.device) -> Tensor:
    """(windows, area) int64: the row-major position of a map at each place of the block's windows,
    cyclic shift included; the number of positions stands for padding.
    """
    rows, columns = grid
    position = torch.arange(rows * columns, device=device).view(1, rows, columns, 1)
    if any(block.shift_size):
        position = position.roll((-block.shift_size[0], -block.shift_size[1]), (1, 2))
    height, width = block.window_size
    padding = (0, 0, 0, -columns % width, 0, -rows % height)
    position = F.pad(position, padding, value=rows * columns)
    return window_partition(position, block.window_size).view(-1, block.window_area)


def attend(block: Any, x_TC: Tensor, package_BC: Tensor, positions: Positions) -> Tensor:
    """The window attention of a Swin block for some positions.

    A hidden position is no key; padding is one, as in timm. Where an image hides anything, its
    package is a key of all its windows, without a bias for its place, as it has none.

    Args:
        block: whose projections, bias and shift are used.
        x_TC: the positions that are computed, normalised for attention.
        package_BC: one package token per image, likewise.
        positions: which they are.

    Returns:
        (T, C): what the block adds to them.
    """
    attention = block.attn
    num_images, num_places = positions.num_images, math.prod(positions.grid)
    order_WA = window_order(block, positions.grid, x_TC.device)
    windows, area = order_WA.shape
    qkv = attention.qkv(torch.cat([x_TC, package_BC]))
    qkv, package = qkv.split([len(x_TC), num_images])
    qkv = _in_windows(attention, qkv, positions, order_WA)
    q, k, v = qkv.view(len(qkv), area, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    package = package.repeat_interleave(windows, 0, output_size=num_images * windows)
    _, package_k, package_v = package.view(len(package), 3, attention.num_heads, 1, -1).unbind(1)
    k, v = torch.cat([k, package_k], 2), torch.cat([v, package_v], 2)
    dropout = attention.attn_drop.p if attention.training else 0.0
    bias = _bias(block, positions, order_WA).to(q.dtype)
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=attention.scale
    )
    context = context.transpose(1, 2).flatten(2).flatten(0, 1)
    # The place of each position among the windows is the inverse of their order.
    place = torch.arange(windows * area, device=x_TC.device)
    place = place.new_empty(num_places + 1).scatter(0, order_WA.flatten(), place)
    image_T, position_T = positions.row_T // num_places, positions.row_T % num_places
    place_T = image_T * (windows * area) + place.index_select(0, position_T)
    out: Tensor = attention.proj_drop(attention.proj(context.index_select(0, place_T)))
    return out


def _in_windows(attention: Any, qkv: Tensor, positions: Positions, order_WA: Tensor) -> Tensor:
    """(B * windows, area, 3 C): projections of every place; zero where a position is not computed,
    the projection of zero where there is none.
    """
    count, num_places = len(qkv), math.prod(positions.grid)
    absent, bias = qkv.new_zeros(1, qkv.shape[1]), attention.qkv.bias
    padding = absent if bias is None else bias.to(qkv.dtype).unsqueeze(0)
    rows = torch.arange(count, device=qkv.device)
    slot = rows.new_full((len(positions.visible_R),), count).scatter(0, positions.row_T, rows)
    slot_BR = F.pad(slot.view(positions.num_images, num_places), (0, 1), value=count + 1)
    slots = slot_BR.index_select(1, order_WA.flatten()).flatten()
    windows = torch.cat([qkv, absent, padding]).index_select(0, slots)
    return windows.view(-1, order_WA.shape[1], qkv.shape[1])


def _bias(block: Any, positions: Positions, order_WA: Tensor) -> Tensor:
    """(B * windows, H, area, area + 1): added to the logits of each key, of which the package is
    the last.
    """
    num_images, (windows, area) = positions.num_images, order_WA.shape
    bias = block.attn._get_rel_pos_bias().unsqueeze(1)
    if any(block.shift_size):
        mask = block.attn_mask
        if block.dynamic_mask:
            sides = zip(positions.grid, block.window_size, strict=True)
            shape = [-(-length // window) * window for length, window in sides]
            mask = block.get_attn_mask(bias.new_empty(1, *shape, 1))
        bias = bias + mask.view(1, windows, 1, area, area)
    visible = F.pad(positions.visible_R.view(num_images, -1), (0, 1), value=True)
    visible = visible.index_select(1, order_WA.flatten()).view(num_images, windows, 1, 1, area)
    bias = bias.expand(num_images, windows, *bias.shape[2:]).masked_fill(~visible, -math.inf)
    no_package = ~positions.drops_B.view(-1, 1, 1, 1, 1)
    package = bias.new_zeros(num_images, *bias.shape[1:4], 1).masked_fill(no_package, -math.inf)
    return torch.cat([bias, package], -1).flatten(0, 1)
