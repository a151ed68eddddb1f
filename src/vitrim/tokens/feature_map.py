"""The state of a hierarchical backbone (Swin, ConvNeXt) between two blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrim.tokens.plain import Grid

SLICE = 2**20
"""Features of a slice at most: 2,730 positions of 384 channels. Half of it is as good, but the more
slices there are, the more often threads wait for each other."""


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A map of features, all of which stay: what a method decides about them it keeps itself."""

    x_BHWC: Tensor

    @property
    def grid(self) -> Grid:
        rows, columns = self.x_BHWC.shape[1:3]
        if torch._C._get_tracing_state():  # what torch.jit.trace records of divisions rounds others
            return int(rows), int(columns)
        return rows, columns


@dataclass(frozen=True, slots=True)
class Partition:
    """The positions of a batch of maps in two groups, whose sizes are the same in each image."""

    first: Tensor
    """(B * count,): rows of the flattened maps in the first group."""
    second: Tensor
    """(B * (N - count),): the others."""
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
