"""UperNet: pyramid pooling, a feature pyramid and their fusion, by ``segmentation_models_pytorch``.

Xiao et al. 2018, "Unified perceptual parsing for scene understanding". The decoder is theirs (MIT);
written here: the layer that tells the classes, and the auxiliary head of convolutions on the map of
stride 16 that training uses (Zhao et al. 2017). Nothing else imports that package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrim.errors import MissingExtraError
from vitrim.tasks.model import LevelInfo, check_reductions
from vitrim.tasks.segmentation_config import SegmenterConfig
from vitrim.tasks.simple_pyramid import SimplePyramid

_AUX_REDUCTION = 16


class UperNetHead(nn.Module):
    """From the maps of a pyramid to class scores at the size of the first one.

    Raises:
        MissingExtraError: segmentation_models_pytorch is not installed.
        ConfigError: the maps' reductions are no powers of two.
    """

    def __init__(self, config: SegmenterConfig, info: Sequence[LevelInfo]) -> None:
        super().__init__()
        check_reductions(info)
        self.neck: nn.Module = nn.Identity()
        if len(info) == 1:
            self.neck = pyramid = SimplePyramid(info[0], config.channels)
            info = pyramid.info
        self.decoder = _decoder([level.channels for level in info], config.channels)
        self.classes = _classes(config.channels, config)
        self.aux_level, self.aux = 0, None
        if config.aux_channels:
            reductions = [level.reduction for level in info]
            at_16 = _AUX_REDUCTION in reductions
            self.aux_level = reductions.index(_AUX_REDUCTION) if at_16 else len(info) - 2
            width = config.aux_channels
            self.aux = nn.Sequential(
                nn.Conv2d(info[self.aux_level].channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                *_classes(width, config),
            )
        if config.norm == "group":
            _norm_groups(self)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scores (B, classes, h, w), and in training mode those of the auxiliary head on its map.

        Args:
            levels: (B, C, h, w) each, the largest first.
        """
        maps = list(self.neck(levels))
        scores: Tensor = self.classes(self.decoder([maps[0], maps[0], *maps]))
        if not self.training or self.aux is None:
            return scores, None
        return scores, self.aux(maps[self.aux_level])


def _decoder(channels: Sequence[int], width: int) -> Any:
    """Of maps in order; it takes two maps before them that it does not look at."""
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise MissingExtraError("UperNet", "segmentation-models-pytorch", "dense") from error
    return UPerNetDecoder([0, 0, *channels], len(channels) + 1, width)


def _classes(width: int, config: SegmenterConfig) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(config.dropout), nn.Conv2d(width, config.num_classes, 1))


def _norm_groups(module: nn.Module) -> None:
    """Put norms over groups of channels in the place of those over the batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            setattr(module, name, nn.GroupNorm(_num_groups(channels), channels))
        else:
            _norm_groups(child)


def _num_groups(channels: int) -> int:
    """At most 32, of 8 channels or more: a pooled map has one position, and a norm over one number
    leaves nothing of it.
    """
    most = min(32, max(1, channels // 8))
    return next(count for count in range(most, 0, -1) if channels % count == 0)
