"""How a segmenter is built, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from vitrim.config import check_weights, from_plain, normalise, require, to_plain

_MOST_SIDE = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """How a segmenter is built; the defaults are UperNet's on Swin (Liu et al. 2021)."""

    num_classes: int
    """Classes of pixels."""
    channels: int = 512
    """Width of the decoder."""
    aux_channels: int = 256
    """Width of the auxiliary head on the map of stride 16, for training alone; 0: there is none."""
    norm: Literal["batch", "group"] = "batch"
    """Of both heads: over the batch (of all processes, on GPUs), or over groups of channels of each
    image, which suits small batches, and gives one process's numbers on several."""
    dropout: float = 0.1
    """Share of the channels that training drops before the classes."""
    short_side: int = 512
    """Pixels of an image's shorter side, in evaluation, and in training before the random scale."""
    long_side: int = 2048
    """Most pixels of its longer side."""
    ignore_index: int = 255
    """Number of pixels without a class in the PNG labels."""
    reduce_zero_label: bool = False
    """0 is no class either, and 1 is the first class, as in ADE20K."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        for name, least in (("num_classes", 2), ("channels", 2), ("aux_channels", 0)):
            value = getattr(self, name)
            require(least <= value <= 2**16, f"{name} is {value}; expected {least} to {2**16}")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected a share below 1")
        sides = (self.short_side, self.long_side)
        require(
            16 <= sides[0] <= sides[1] <= _MOST_SIDE,
            f"short_side and long_side are {sides}; expected 16 to {_MOST_SIDE} pixels, the longer "
            "one last",
        )
        index = self.ignore_index
        require(0 <= index < 2**16, f"ignore_index is {index}; expected 0 to {2**16 - 1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationConfig(SegmenterConfig):
    """How a segmenter is trained: on folders of images and of PNG labels, see
    ``tasks/segmentation_data.py``. Training crops have the size of the model's images
    (``data.image_size``).
    """

    scale: tuple[float, ...] = (0.5, 2.0)
    """Smallest and largest random scale of training images."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty: they have none."""
    max_skipped: float = 0.01
    """Share of the images, and of the labels, that may lack the other before nothing is read."""
    aux_weight: float = 0.4
    """Of the auxiliary head's cross entropy."""
    pyramid_weight: float = 0.0
    """Of the distance from a dense teacher's pyramid, at the positions that are kept."""

    def __post_init__(self) -> None:
        SegmenterConfig.__post_init__(self)
        check_weights(self, "aux", "pyramid")
        scale, names = self.scale, self.class_names
        require(
            len(scale) == 2 and 0.01 <= scale[0] <= scale[1] <= 100,
            f"scale is {scale}; expected two numbers from 0.01 to 100, the smaller first",
        )
        require(
            len(names) in (0, self.num_classes),
            f"{len(names)} class_names for {self.num_classes} classes; give one each, or none",
        )
        require(
            0 <= self.max_skipped <= 1,
            f"max_skipped is {self.max_skipped}; expected a share from 0 to 1",
        )

    def segmenter(self) -> SegmenterConfig:
        """What of it is the segmenter's own."""
        own = {entry.name for entry in fields(SegmenterConfig)}
        return from_plain(
            SegmenterConfig, {name: value for name, value in to_plain(self).items() if name in own}
        )
