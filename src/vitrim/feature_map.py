"""The state of a hierarchical backbone (Swin, ConvNeXt) between two blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitrim.tokens import Grid


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A map of features, none of which is ever dropped, and what a method decided about them."""

    x_BHWC: Tensor
    keep_BHW: Tensor | None = None
    """1 where a position gets the full computation and 0 where it gets the cheap one; None gives
    all of them the full one. It may carry straight-through gradients."""

    @property
    def grid(self) -> Grid:
        rows, columns = self.x_BHWC.shape[1:3]
        return rows, columns

    def with_x(self, x_BHWC: Tensor) -> FeatureMap:
        """The same decision on new features."""
        return replace(self, x_BHWC=x_BHWC)
