"""The simple feature pyramid as a neck: for a head that is given the one map of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitrim.config import require
from vitrim.features import MapsOfOne
from vitrim.tasks.model import LevelInfo


class SimplePyramid(nn.Module):
    """From a list with one map to four of ``width`` channels, which ``info`` describes.

    Raises:
        ConfigError: the map's position stands for less than 4 pixels a side, or no multiple of 4.
    """

    def __init__(self, level: LevelInfo, width: int) -> None:
        super().__init__()
        reduction = level.reduction
        require(
            reduction % 4 == 0,
            f"a position of the map stands for {reduction} pixels a side; a pyramid of it needs a "
            "multiple of 4",
        )
        self.maps = MapsOfOne(level.channels, width)
        self.info = [LevelInfo(width, reduction * factor // 4) for factor in (1, 2, 4, 8)]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, width, H, W), the largest first."""
        (level,) = levels
        maps: list[Tensor] = self.maps(level)
        return maps
