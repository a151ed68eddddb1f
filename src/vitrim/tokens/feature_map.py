"""The state of a hierarchical backbone (Swin, ConvNeXt) between two blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrim.tokens.plain import Grid, Sizes, Tokens

SLICE = 2**20
"""Features of a slice at most: 2,730 positions of 384 channels. Half of it is as good, but the more
slices there are, the more often threads wait for each other."""


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A map of features, all of which stay: what a method decides about them it keeps itself."""

    x_BHWC: Tensor
    real_BHW: Tensor | None = None
    """bool: the positions that lie on the images themselves; the others are padding, hold 0, and
    nobody sees them. None: there is no padding."""

    @classmethod
    def of_padded(cls, x_BHWC: Tensor, image_size: Grid, sizes: Sizes) -> FeatureMap:
        """The first map of images of ``image_size``, of which ``sizes`` are real."""
        if sizes is None:
            return cls(x_BHWC)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        real_BHW = real_places(sizes, image_size, grid, x_BHWC.device)
        return cls(x_BHWC, real_BHW).with_x(x_BHWC)

    def with_x(self, x_BHWC: Tensor) -> FeatureMap:
        """The same map with new features, or a smaller one made of it."""
        real_BHW = self.real_BHW
        if real_BHW is None:
            return FeatureMap(x_BHWC)
        down, right = (a // b for a, b in zip(real_BHW.shape[1:], x_BHWC.shape[1:3], strict=True))
        real_BHW = real_BHW[:, ::down, ::right]
        return FeatureMap(x_BHWC.masked_fill(~real_BHW.unsqueeze(-1), 0), real_BHW)

    @property
    def x_BCHW(self) -> Tensor:
        return self.x_BHWC.permute(0, 3, 1, 2)

    @property
    def real_BN(self) -> Tensor | None:
        """:attr:`real_BHW` in one row per image."""
        return None if self.real_BHW is None else self.real_BHW.flatten(1)

    @property
    def own_B2(self) -> Tensor | None:
        """Rows and columns of each image's own positions; None: all of the map's."""
        if self.real_BHW is None:
            return None
        return torch.stack([self.real_BHW[:, :, 0].sum(1), self.real_BHW[:, 0].sum(1)], 1)

    def bordered(self) -> Tensor:
        """(B, H, W, C): with the positions of each image's border again in place of padding."""
        if self.own_B2 is None:
            return self.x_BHWC
        num_images, rows, columns = self.x_BHWC.shape[:3]
        last = self.own_B2 - 1
        row_BH1 = torch.arange(rows, device=last.device).minimum(last[:, :1]).unsqueeze(2)
        column_B1W = torch.arange(columns, device=last.device).minimum(last[:, 1:]).unsqueeze(1)
        image_B11 = torch.arange(num_images, device=last.device).view(-1, 1, 1)
        return self.x_BHWC[image_B11, row_BH1, column_B1W]

    @property
    def tokens(self) -> Tokens:
        """Every position as a token, padding hidden by the keep mask."""
        tokens = Tokens.of(self.x_BHWC.flatten(1, 2), num_prefix=0)
        return tokens if self.real_BN is None else tokens.with_keep(self.real_BN.to(tokens.x.dtype))

    @property
    def grid(self) -> Grid:
        rows, columns = self.x_BHWC.shape[1:3]
        if torch._C._get_tracing_state():  # what torch.jit.trace records of divisions rounds others
            return int(rows), int(columns)
        return rows, columns


@dataclass(frozen=True, slots=True)
class Partition:
    """The positions of a batch of maps in two groups."""

    first: Tensor
    """Rows of the flattened maps in the first group."""
    second: Tensor
    """The others."""
    places: Tensor
    """(B * N,): where each row of the flattened maps is among both, one behind the other."""

    @classmethod
    def best(cls, score_BN: Tensor, count: int) -> Partition:
        """The ``count`` best positions of each image, and the others."""
        num_images, num_positions = score_BN.shape
        order = score_BN.topk(num_positions).indices
        order = order + torch.arange(num_images, device=order.device).unsqueeze(1) * num_positions
        first, second = order[:, :count].flatten(), order[:, count:].flatten()
        rows = torch.cat([first, second])
        numbers = torch.arange(num_images * num_positions, device=rows.device)
        return cls(first, second, torch.empty_like(rows).scatter(0, rows, numbers))

    @classmethod
    def best_of_each(cls, score_BN: Tensor, count_B1: Tensor) -> Partition:
        """The best positions of each image, as many as ``count_B1`` says, and the others; they are
        as many as the images say, and not the same in each.
        """
        first_BN = among_best(score_BN, count_B1)
        first, second = (of.flatten().nonzero().squeeze(1) for of in (first_BN, ~first_BN))
        rows = torch.cat([first, second])
        numbers = torch.arange(len(rows), device=rows.device)
        return cls(first, second, torch.empty_like(rows).scatter(0, rows, numbers))

    def run(
        self,
        x_BHWC: Tensor,
        first: Callable[[Tensor], Tensor],
        second: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """``first`` and ``second``, which work row by row, each on the positions of its group.

        A gather makes each group contiguous and one puts their results back: on a CPU as fast as
        adding them into the map in place, and nothing is written twice.
        """
        x = x_BHWC.flatten(0, 2)
        parts = [first(x.index_select(0, self.first)), second(x.index_select(0, self.second))]
        out = torch.cat(parts)
        return out.index_select(0, self.places).view(x_BHWC.shape)

    def first_BN(self, num_images: int) -> Tensor:
        """(B, N): whether a position is in the first group."""
        return (self.places < len(self.first)).view(num_images, -1)


def share_of(real_BN: Tensor, ratio: float) -> Tensor:
    """(B, 1): so many positions are that share of each image's own, one at least."""
    return (real_BN.sum(1, keepdim=True).double() * ratio).long().clamp(min=1)


def among_best(score_BN: Tensor, count_B1: Tensor) -> Tensor:
    """(B, N) bool: the positions with each image's best scores, as many as ``count_B1`` says."""
    order_BN = score_BN.argsort(1, descending=True)
    rank_N = torch.arange(score_BN.shape[1], device=score_BN.device)
    best_BN = (rank_N < count_B1).expand_as(order_BN)
    return torch.zeros_like(best_BN).scatter(1, order_BN, best_BN)


def real_places(
    sizes: Sequence[Grid], image_size: Grid, grid: Grid, device: torch.device
) -> Tensor:
    """(B, rows, columns) bool: the places of a grid on padded images of ``image_size`` that lie, in
    part at least, on the images themselves, which are of ``sizes`` and in the upper left corner.
    """
    axes = []
    for axis in (0, 1):
        counts = [-(-size[axis] * grid[axis] // image_size[axis]) for size in sizes]
        place_N = torch.arange(grid[axis], device=device)
        axes.append(place_N < torch.tensor(counts, device=device).unsqueeze(1))
    return axes[0].unsqueeze(2) & axes[1].unsqueeze(1)


def pays_in_slices(x_BHWC: Tensor) -> bool:
    """Whether :func:`add_in_slices` takes less time than the sum at once, and may be used."""
    return (
        not torch.compiler.is_compiling()  # asked first: a graph must not depend on the size
        and x_BHWC.device.type == "cpu"
        and x_BHWC.numel() > SLICE
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def add_in_slices(base_BHWC: Tensor, branch: Callable[[Tensor], Tensor], x_BHWC: Tensor) -> Tensor:
    """``base + branch(x)``, where ``branch`` works row by row, slice by slice.

    The hidden rows of an MLP on a whole map are so large that no cache holds them and that their
    memory is asked from the system anew each time. The numbers are those of the sum at once.
    """
    base, x = base_BHWC.flatten(0, 2), x_BHWC.flatten(0, 2)
    out = torch.empty_like(base)
    step = max(1, SLICE // base.shape[1])
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        torch.add(base[rows], branch(x[rows]), out=out[rows])
    return out.view(base_BHWC.shape)
