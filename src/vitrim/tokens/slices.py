"""Packed rows in slices that suit a CPU's caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLICE = 1536
"""Rows of a slice at most: measured; anything from 900 to 1800 is as good."""


def in_slices(run: Callable[[Tensor], Tensor], x_TC: Tensor) -> Tensor:
    """``run``, which works row by row, on slices of the packed rows that suit a CPU's caches.

    The hidden rows of an MLP are many times larger than a cache; a slice's are still there when the
    next operation comes for them. A device with memory of its own gets all rows at once, and so
    does a compiled graph, which would be made anew for each number of slices.
    """
    if torch.compiler.is_compiling() or x_TC.device.type != "cpu" or len(x_TC) <= SLICE:
        return run(x_TC)
    return torch.cat([run(part) for part in x_TC.chunk(-(-len(x_TC) // SLICE))])
