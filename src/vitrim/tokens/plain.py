"""The state of a plain vision transformer between two blocks.

Shape legend, used in the whole library:
    B images   N patch tokens   P prefix tokens   C channels   H heads   D head dim   K kept
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.tokens.graphs import exporting
from vitrim.tokens.rotary import Rotary

Grid = tuple[int, int]
"""Rows and columns of a grid of positions."""
Sizes = Sequence[tuple[int, int]] | None
"""Own height and width in pixels of each image, in the upper left corner, where images were padded
to one size; None: they were not."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prefix and patch tokens of a batch, and where each patch token came from."""

    x: Tensor
    """(B, P + N, C): prefix tokens first."""

    num_prefix: int
    """P: class, distillation and register tokens, which are never dropped."""

    index_BN: Tensor
    """(B, N) int64: place of each patch token in the original row-major patch grid."""

    keep_BN: Tensor | None = None
    """(B, N) float: 1 keeps a patch token and 0 masks it out; None keeps all. It may carry
    straight-through gradients."""

    size_BN: Tensor | None = None
    """(B, N): how many patches each patch token stands for, see :meth:`sized`; None: one each."""

    log_size: Tensor | None = None
    """(B, 1, 1, P + N): what makes attention see each token as the patches that it stands for,
    added to the logits of keys; None: nothing."""

    rotary: Rotary | None = None
    """What turns queries and keys by the places of their tokens; None: nothing."""

    def __post_init__(self) -> None:
        assert (self.size_BN is None) == (self.log_size is None), "set sizes by Tokens.sized"

    @classmethod
    def of(cls, x: Tensor, num_prefix: int, rotary: Rotary | None = None) -> Tokens:
        """Tokens of an undisturbed grid: patch ``i`` is at place ``i``."""
        num_patches = x.shape[1] - num_prefix
        index = torch.arange(num_patches, device=x.device).expand(x.shape[0], num_patches)
        return cls(x, num_prefix, index, rotary=rotary)

    @property
    def num_patches(self) -> int:
        return self.x.shape[1] - self.num_prefix

    @property
    def num_images(self) -> int:
        return self.x.shape[0]

    @property
    def counts_B(self) -> Tensor:
        """(B,): patch tokens of each image; under a mask the kept ones, with its gradients."""
        if self.keep_BN is not None:
            return self.keep_BN.sum(1)
        return torch.full((self.num_images,), self.num_patches, device=self.x.device)

    @property
    def patches(self) -> Tensor:
        """(B, N, C)"""
        return self.x[:, self.num_prefix :]

    @property
    def prefix_BPC(self) -> Tensor:
        return self.x[:, : self.num_prefix]

    @property
    def keep_all(self) -> Tensor:
        """(B, P + N): the keep mask with ones for the prefix tokens; needs a mask."""
        assert self.keep_BN is not None
        ones = self.keep_BN.new_ones(self.keep_BN.shape[0], self.num_prefix)
        return torch.cat([ones, self.keep_BN], dim=1)

    @property
    def angles(self) -> Tensor | None:
        """(B, H, P + N, 2 D), H may be 1: what :attr:`rotary` says of these tokens."""
        if self.rotary is None:
            return None
        return self.rotary.of_images(self.index_BN, self.num_prefix)

    @property
    def bias(self) -> Tensor | None:
        """The same, with -inf where a mask hides a token."""
        if self.keep_BN is None:
            return self.log_size
        hidden = (self.keep_all < 0.5)[:, None, None, :]
        bias = self.x.new_zeros(hidden.shape) if self.log_size is None else self.log_size
        return bias.masked_fill(hidden, -math.inf)

    def keep_on_grid(self, num_patches: int) -> Tensor:
        """(B, num_patches): the keep mask on the original grid, 0 where a patch was removed."""
        keep = self.keep_BN
        if keep is None:
            keep = self.x.new_ones(self.index_BN.shape)
        return self.on_grid(keep, num_patches, 0.0)

    def sum_per_image(self, values: Tensor) -> Tensor:
        """(B, ...): sum over each image's patch tokens of ``values`` (B, N, ...)."""
        if self.keep_BN is not None:
            shape = (*self.keep_BN.shape, *[1] * (values.ndim - 2))
            values = values * self.keep_BN.view(shape).to(values.dtype)
        return values.sum(1)

    def max_per_image(self, values: Tensor) -> Tensor:
        """(B, ...): largest of each image's patch tokens of ``values``; -inf of none."""
        if not exporting() and self.num_patches == 0:
            return values.new_full((self.num_images, *values.shape[2:]), -math.inf)
        if self.keep_BN is not None:
            shape = (*self.keep_BN.shape, *[1] * (values.ndim - 2))
            values = values.masked_fill(self.keep_BN.view(shape) < 0.5, -math.inf)
        return values.amax(1)

    def spread(self, per_image: Tensor) -> Tensor:
        """(B, N, ...): each image's value of ``per_image`` (B, ...) for all its patch tokens."""
        return per_image.unsqueeze(1).expand(-1, self.num_patches, *per_image.shape[1:])

    def on_grid(self, values: Tensor, num_patches: int, fill: float) -> Tensor:
        """(B, num_patches, ...): ``values`` (B, N, ...) on the grid, ``fill`` elsewhere."""
        grid = values.new_full((self.num_images, num_patches, *values.shape[2:]), fill)
        return grid.scatter(1, index_like(self.index_BN, values), values)

    def places(self) -> list[Tensor]:
        """Per image: the original places of its patch tokens, sorted; of the kept under a mask."""
        if self.keep_BN is None:
            return [places.sort().values for places in self.index_BN]
        kept = zip(self.index_BN, self.keep_BN > 0.5, strict=True)
        return [places[keep].sort().values for places, keep in kept]

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with new features."""
        return replace(self, x=x)

    def sized(self, size_BN: Tensor | None) -> Self:
        """The same tokens, each of which stands for so many patches; None: for one each."""
        if size_BN is None:
            return replace(self, size_BN=None, log_size=None)
        log_size = F.pad(size_BN.log(), (self.num_prefix, 0))[:, None, None, :]
        return replace(self, size_BN=size_BN, log_size=log_size)

    def with_prefix(self, prefix_BPC: Tensor) -> Tokens:
        """The same patch tokens behind other prefix tokens, in any number."""
        x = torch.cat([prefix_BPC, self.patches], 1)
        return replace(self, x=x, num_prefix=prefix_BPC.shape[1]).sized(self.size_BN)

    def with_keep(self, keep_BN: Tensor) -> Tokens:
        """The same tokens under a mask: all stay in memory, dropped ones are not attended to."""
        return replace(self, keep_BN=keep_BN)

    def gather(self, position_BK: Tensor) -> Tokens:
        """Only the patch tokens at ``position_BK``, in that order, and every prefix token.

        Args:
            position_BK: (B, K) int64, positions among the present patch tokens (not the grid).
        """
        num_images, num_tokens, num_channels = self.x.shape
        prefix = torch.arange(self.num_prefix, device=self.x.device)
        rows = torch.cat(
            [prefix.expand(num_images, self.num_prefix), position_BK + self.num_prefix], dim=1
        )
        if isinstance(num_images, int) and num_images == 1:  # a graph for one image does with less
            x = self.x.index_select(1, rows[0])
        else:
            # One index_select over whole rows copies contiguous memory: the fastest gather that
            # torch has, on CPU and CUDA.
            start = torch.arange(num_images, device=self.x.device).unsqueeze(1) * num_tokens
            flat = self.x.reshape(num_images * num_tokens, num_channels)
            x = flat.index_select(0, (rows + start).flatten())
            x = x.view(num_images, rows.shape[1], num_channels)
        size_BN = None if self.size_BN is None else self.size_BN.gather(1, position_BK)
        index_BK = self.index_BN.gather(1, position_BK)
        return Tokens(x, self.num_prefix, index_BK, rotary=self.rotary).sized(size_BN)


def index_like(index_BN: Tensor, values: Tensor) -> Tensor:
    """(B, N, ...): the same index for all that ``values`` hold of a token."""
    return index_BN.view(*index_BN.shape, *[1] * (values.ndim - 2)).expand_as(values)
