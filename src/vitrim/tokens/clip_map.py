"""The state of a hierarchical backbone of clips (Video Swin) between two blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Volume = Any
"""Frames, rows and columns: what takes the place of a ``Grid`` where images are clips."""


@dataclass(frozen=True, slots=True)
class ClipMap:
    """A map of features for each frame of a clip."""

    x_BTHWC: Tensor

    def with_x(self, x_BTHWC: Tensor) -> ClipMap:
        """Another map in its place."""
        return ClipMap(x_BTHWC)

    @property
    def grid(self) -> Volume:
        """Frames, rows and columns."""
        return tuple(int(length) for length in self.x_BTHWC.shape[1:4])
