"""The simple feature pyramid: maps of four sizes from the one map of a plain vision transformer.

Li et al. 2022, "Exploring plain vision transformer backbones for object detection" (ViTDet),
section 3: strides 4, 8, 16 and 32 from stride 16 by two transposed convolutions, one, none, and a
max-pooling, each followed by a 1 x 1 and a 3 x 3 convolution with norms.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitrim.config import require
from vitrim.tasks.model import LevelInfo


class SimplePyramid(nn.Module):
    """From one map to four, each of ``width`` channels; ``info`` describes them.

    Raises:
        ConfigError: a position of the map is less than 4 pixels wide, or no multiple of 4.
    """

    def __init__(self, level: LevelInfo, width: int) -> None:
        super().__init__()
        channels, reduction = level.channels, level.reduction
        require(
            reduction % 4 == 0,
            f"a position of the map stands for {reduction} pixels a side; a pyramid of it needs a "
            "multiple of 4",
        )
        half, quarter = channels // 2, channels // 4
        scales: list[tuple[int, list[nn.Module]]] = [
            (quarter, [_doubled(channels, half), LayerNorm2d(half), nn.GELU()]),
            (half, [_doubled(channels, half)]),
            (channels, []),
            (channels, [nn.MaxPool2d(2, ceil_mode=True)]),
        ]
        scales[0][1].append(_doubled(half, quarter))
        self.levels = nn.ModuleList(
            [nn.Sequential(*scale, *_smoothed(inside, width)) for inside, scale in scales]
        )
        self.info = [LevelInfo(width, reduction * factor // 4) for factor in (1, 2, 4, 8)]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, width, H, W) of a list with one (B, C, H, W)."""
        (level,) = levels
        return [module(level) for module in self.levels]


def _doubled(channels: int, width: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, width, kernel_size=2, stride=2)


def _smoothed(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    ]
