"""What the ``[task]`` table of a recipe may say, by task."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vitrim.config import closest, from_plain, normalise, require, to_plain
from vitrim.errors import ConfigError
from vitrim.tasks.sampling import Sampling
from vitrim.tasks.segmentation_config import SegmentationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Images with one class each: there is nothing to set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    """How a detector is built; the defaults are torchvision's, which are those of the papers."""

    head: Literal["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "retinanet"] = "mask_rcnn"
    """Which detector."""
    num_classes: int
    """Classes, the background (0) among them, as torchvision counts."""
    short_sides: tuple[int, ...] = (800,)
    """Lengths in pixels that the shorter side of an image is resized to: training draws one for
    each image, inference takes the last."""
    long_side: int = 1333
    """Most pixels of the longer side."""
    fixed_size: tuple[int, ...] = ()
    """Height and width that every image is resized to instead, for a backbone of one size."""
    channels: int = 256
    """Of the levels of the pyramid that the heads read."""
    anchor_scale: float = 8.0
    """Side of the anchors in positions of their level; RetinaNet's are half of it, and 2 ** (1/3)
    and 2 ** (2/3) times that."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    proposals: int = 1000
    """Regions per image that the boxes of an R-CNN are looked for in."""
    proposal_samples: int = 256
    """Anchors per image that the proposals learn from."""
    box_samples: int = 512
    """Regions per image that a box head learns from."""
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    """Layers of a box head."""
    box_width: int = 1024
    """Width of its linear layers."""
    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    """Of the cascade's boxes; ``giou`` is the authors' of STViT-R, of weight 10."""
    batch_norm: bool = False
    """Normalise behind the convolutions of a box head over the batch (of all processes)."""
    mask_width: int = 256
    """Channels of the mask head's convolutions."""
    mask_convolutions: int = 4
    """How many of them there are."""
    score_threshold: float = 0.05
    """Boxes that are less sure than this are not given."""
    nms_threshold: float = 0.5
    """Boxes of a class that overlap a surer one by more than this (IoU) are not given."""
    detections: int = 100
    """Most boxes of an image."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        least = {"num_classes": 2} | dict.fromkeys(
            ("channels", "proposals", "proposal_samples", "box_samples", "box_width"), 1
        )
        least |= {"mask_width": 1, "mask_convolutions": 1, "detections": 1}
        for name, low in least.items():
            value = getattr(self, name)
            require(low <= value <= 2**16, f"{name} is {value}; expected {low} to {2**16}")
        sides = (*self.short_sides, self.long_side, *self.fixed_size)
        good = bool(self.short_sides) and all(16 <= side <= 2**15 for side in sides)
        require(good, f"the sides of images are {sides}; expected 16 to {2**15} pixels each")
        require(
            len(self.fixed_size) in (0, 2),
            f"fixed_size is {self.fixed_size}; expected a height and a width",
        )
        ratios = self.aspect_ratios
        require(
            0 < len(ratios) <= 16 and all(ratio > 0 for ratio in ratios),
            f"aspect_ratios are {ratios}; expected 1 to 16 numbers of more than 0",
        )
        require(self.anchor_scale > 0, f"anchor_scale is {self.anchor_scale}; expected more than 0")
        for name in ("score_threshold", "nms_threshold"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}; expected a share from 0 to 1")

    @property
    def has_masks(self) -> bool:
        """Whether the detector draws masks."""
        return "mask" in self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionConfig(DetectorConfig):
    """How a detector is trained, on data in COCO's form: ``data.train`` and ``data.val`` are
    folders with ``images/`` and ``instances.json`` in them, unless fields below name the files.
    """

    train_annotations: str | None = None
    """The json file of the training images, which then lie in ``data.train`` itself."""
    val_annotations: str | None = None
    """The same of the validation images."""
    max_skipped: float = 0.01
    """Share of the images, and of the annotations, that may be of no use before nothing is read."""
    crop_short_sides: tuple[int, ...] = ()
    """Every second training image is first resized to one of these, then cropped, as DETR's
    authors do (400, 500, 600); empty: none is."""
    crop_sides: tuple[int, ...] = (384, 600)
    """Shortest and longest side of such a crop in pixels."""
    pyramid_weight: float = 0.0
    """Of the distance from a dense teacher's pyramid, at the positions that are kept."""

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        require(
            0 <= self.max_skipped <= 1,
            f"max_skipped is {self.max_skipped}; expected a share from 0 to 1",
        )
        sides = self.crop_sides
        good = len(sides) == 2 and 1 <= sides[0] <= sides[1] and all(self.crop_short_sides)
        require(good, f"crop_sides are {sides}; expected two numbers, the smaller first")
        weight = self.pyramid_weight
        require(weight >= 0, f"pyramid_weight is {weight}; expected 0 or more")

    def detector(self) -> DetectorConfig:
        """What of it is the detector's own."""
        own = {entry.name for entry in fields(DetectorConfig)}
        return from_plain(
            DetectorConfig, {name: value for name, value in to_plain(self).items() if name in own}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Videos with one class each. A model of images is trained on single frames, and judged by the
    mean over a clip's.
    """

    frames: int | None = None
    """Of a clip; None takes the model's, of an image model 8."""
    stride: int = 2
    """Frames of the video from one of a clip to the next; 0 spreads a clip's frames evenly over
    all of the video."""
    clips: int = 1
    """Per video at validation, spread evenly over it."""
    crops: int = 1
    """Of each of these along its longer side: 1, in the middle, or 3. The papers take 4 clips and 3
    crops for a model's final number."""

    def __post_init__(self) -> None:
        self.sampling(1 if self.frames is None else self.frames)

    def sampling(self, frames: int) -> Sampling:
        """Which frames make a clip of ``frames``."""
        return Sampling(frames, self.stride, self.clips, self.crops)


CONFIGS: dict[str, type] = {
    "classification": ClassificationConfig,
    "detection": DetectionConfig,
    "segmentation": SegmentationConfig,
    "video": VideoConfig,
}
"""Config class by name of the task."""


def task_config(name: str, values: dict[str, Any]) -> Any:
    """The config of the task called ``name``.

    Raises:
        ConfigError: there is no such task, or a field is unknown or not valid.
    """
    if name not in CONFIGS:
        raise ConfigError(
            f"task.name is {name!r}{closest(name, CONFIGS)}; use one of {', '.join(CONFIGS)}"
        )
    return from_plain(CONFIGS[name], values, "task")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecipe:
    """What a model is trained for. In TOML the task's own fields stand beside ``name``."""

    name: str = "classification"
    """Name of the task."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the task's config."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Any:
        """The task's config object."""
        return task_config(self.name, self.config)
