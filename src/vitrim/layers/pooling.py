"""Spatial pooling of a map into a few initial centres, for STViT: a registry by name.

Regions are those of torch's adaptive pooling: they tile the map, and neighbours overlap where their
number does not divide it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.tokens.graphs import exporting


def middles(grid: tuple[int, int], shape: tuple[int, int], device: torch.device) -> Tensor:
    """(rows * columns,): the place in a map of ``grid`` of the middle of each of its regions."""
    rows, columns = (
        (2 * torch.arange(regions, device=device) + 1) * places // (2 * regions)
        for places, regions in zip(grid, shape, strict=True)
    )
    return (rows.unsqueeze(1) * grid[1] + columns).flatten()


class Pooling(nn.Module, ABC):
    """How a map becomes initial centres."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def forward(self, map_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, rows * columns, C)"""

    def macs(self, num_patches: int, num_tokens: Any) -> Any:
        """MACs of one image."""
        return 0

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New values for what is learned, if anything is."""


class MaxPooling(Pooling):
    """The largest value of each channel in a region."""

    def forward(self, map_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        if exporting():  # runtimes know pooling by adaptive means, but no maximum
            return _max_of_regions(map_BCHW, shape)
        return _sequence(F.adaptive_max_pool2d(map_BCHW, shape))


class AvgPooling(Pooling):
    """The mean of a region."""

    def forward(self, map_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        return _sequence(F.adaptive_avg_pool2d(map_BCHW, shape))


class IntraInterPooling(Pooling):
    """Our reading, not verified, of the paper's "intra and inter-window spatial pooling".

    Intra: a learned softmax over the tokens of each region weighs them. Inter: an offset learned
    from the region's mean, at most the region's size, points at a place of the map, half of which
    is added, so that centres may leave their region.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.weigh = nn.Linear(dim, 1)
        self.offset = nn.Linear(dim, 2)

    def forward(self, map_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        mixed = F.gelu(self.norm(_sequence(self.depthwise(map_BCHW))))
        inside_SN, centre_S2, size_S2 = _regions(map_BCHW, shape)
        logits_BSN = self.weigh(mixed).transpose(1, 2).masked_fill(~inside_SN, -math.inf)
        intra = logits_BSN.softmax(-1).to(map_BCHW.dtype) @ _sequence(map_BCHW)
        mean = _sequence(F.adaptive_avg_pool2d(map_BCHW, shape))
        places = centre_S2 + self.offset(mean).tanh() * size_S2
        places = places.unflatten(1, shape).to(map_BCHW.dtype)
        # Places are (column, row); -1 and 1 are the borders of the map.
        seen = F.grid_sample(map_BCHW, places, padding_mode="border", align_corners=False)
        centres: Tensor = intra + _sequence(seen) / 2
        return centres

    def macs(self, num_patches: int, num_tokens: Any) -> Any:
        return self.dim * (num_patches * (9 + 1) + num_tokens * (num_patches + 2))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.trunc_normal_(self.depthwise.weight, std=1 / 3, generator=generator)
        for linear in (self.weigh, self.offset):
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            nn.init.zeros_(linear.bias)


POOLINGS: dict[str, type[Pooling]] = {
    "max": MaxPooling,
    "avg": AvgPooling,
    "intra_inter": IntraInterPooling,
}


def _sequence(map_BCHW: Tensor) -> Tensor:
    """(B, H * W, C)"""
    return map_BCHW.flatten(2).transpose(1, 2)


def _max_of_regions(map_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, rows * columns, C): adaptive maximum pooling in slices, one axis after the other."""
    for axis, parts in zip((2, 3), shape, strict=True):
        length = map_BCHW.shape[axis]
        slices = [
            map_BCHW.narrow(axis, start, end - start).amax(axis)
            for start, end in _bounds(length, parts)
        ]
        map_BCHW = torch.stack(slices, axis)
    return _sequence(map_BCHW)


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Where the regions of adaptive pooling start and end along an axis."""
    return [(part * length // parts, -((part + 1) * length // -parts)) for part in range(parts)]


def _regions(map_BCHW: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The regions of adaptive pooling, row by row: which patches lie in each (S, N); centres and
    sizes (S, 2) as (x, y) in a map that reaches from -1 to 1.
    """
    inside, centres, sizes = [], [], []
    for length, parts in zip(map_BCHW.shape[2:], shape, strict=True):
        bounds = torch.tensor(_bounds(length, parts), device=map_BCHW.device)
        start, end = bounds.unbind(1)
        place = torch.arange(length, device=map_BCHW.device)
        inside.append((place >= start[:, None]) & (place < end[:, None]))
        centres.append((start + end) / length - 1)
        sizes.append(2 * (end - start) / length)
    both = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(2).flatten(0, 1)
    xy = [
        torch.stack(torch.meshgrid(*pair, indexing="ij")[::-1], -1).flatten(0, 1)
        for pair in (centres, sizes)
    ]
    return both, xy[0], xy[1]
