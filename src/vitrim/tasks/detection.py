"""Detectors on torchvision's parts, with any dense or sparse backbone of a family that is served.

Resizing and padding, proposals, regions, heads, their losses and what is left of overlapping boxes
are torchvision's (BSD-3). Written here: the backbone's own pyramid under them, which is told how
much of each image is padding, and the losses of the method. The cascade is in ``cascade.py``.

    sparse = vitrim.sparsify(timm_model, vitrim.DynamicSpatialConfig(keep_ratio=0.7))
    detector = vitrim.tasks.mask_rcnn(sparse, num_classes=91)

A detector is called as torchvision's are: with images of any size, (3, H, W) from 0 to 1 each, it
gives boxes, labels, scores (and masks) of each; in training mode, with targets too, losses, the
method's among them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from vitrim.config import require
from vitrim.errors import ConfigError, InputError
from vitrim.families.described import describe_data
from vitrim.features import pyramid_loss
from vitrim.tasks.cascade import CascadeHeads
from vitrim.tasks.config import DetectorConfig
from vitrim.tasks.model import LevelInfo, TaskModel, check_maps, check_reductions
from vitrim.tasks.simple_pyramid import SimplePyramid
from vitrim.tokens.plain import Sizes

Target = dict[str, Tensor]
Levels = dict[str, Tensor]

_SMALLEST_OF_RETINANET = 8
"""Reduction of the first map that RetinaNet looks at."""


class Detector(TaskModel):
    """A detector; :func:`mask_rcnn` and its like make it."""

    task: ClassVar[str] = "detection"
    kind: ClassVar[str] = "detector"
    config_class: ClassVar[type] = DetectorConfig
    config: DetectorConfig

    def __init__(
        self, backbone: nn.Module, config: DetectorConfig, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(backbone, config, classes)
        require(
            len(self.classes) in (0, config.num_classes - 1),
            f"{len(self.classes)} classes are named; num_classes is {config.num_classes}, of which "
            "one is the background",
        )
        self.head = _head(config, self.level_info)
        self.data_config = describe_data(self.timm_model)

    @property
    def transform(self) -> GeneralizedRCNNTransform:
        """Normalises, resizes and pads a batch."""
        config, data = self.config, self.data_config
        transform = GeneralizedRCNNTransform(
            config.short_sides,
            config.long_side,
            list(data["mean"]),
            list(data["std"]),
            fixed_size=config.fixed_size[::-1] or None,  # torchvision wants the width first
        )
        return transform.train(self.training)

    def prepared(self, images: Sequence[Tensor]) -> tuple[Tensor, Sizes]:
        batch, _, sizes = self._batch(images)
        return batch.tensors, sizes

    def _batch(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[ImageList, Any, Sizes]:
        """Images and targets as torchvision prepares them, and the images' own sizes in the batch.

        Raises:
            ConfigError: the backbone cannot be given them so.
        """
        self._check_images(images)
        batch, resized = self.transform(list(images), None if targets is None else list(targets))
        sizes = own_sizes(batch)
        self.check_seen(batch.tensors, sizes)
        return batch, resized, sizes

    def check_seen(self, images: Tensor, sizes: Sizes = None) -> None:
        """Raise :class:`ConfigError` unless the backbone takes images as they are when resized and
        padded.
        """
        height, width = self.family.image_size
        cure = f"give the detector fixed_size=({height}, {width}): every image is resized to that"
        try:
            self.family.check_images(images)
        except InputError as error:
            raise ConfigError(f"as the detector resizes them, {error}. Or {cure}") from error
        if sizes is not None and not self.serves_sizes:
            raise ConfigError(
                f"images of unlike sizes are padded to one, and this backbone looks at padding; "
                f"{cure}"
            )

    def read_levels(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        neck: Any = self.head.neck
        return levels if neck.simple is not None else levels[neck.skipped :]

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """What is in the images; in training mode the losses, whose sum is to be made small.

        Args:
            images: (3, H, W) each, from 0 to 1, of any size.
            targets: in training mode, for each image ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels,
                ``labels`` (N,) from 1, and ``masks`` (N, H, W) where there is a head for them.

        Raises:
            InputError: targets are missing, do not fit the images, or have classes that the head
                does not know.
        """
        if not self.training:
            return self._detect(images)
        if targets is None:
            raise InputError("a detector in training mode needs targets; call eval() to detect")
        terms = self.losses(images, targets)
        return {name: term for name, term in terms.items() if name != "total"}

    def _detect(self, images: Sequence[Tensor]) -> list[Target]:
        if len(images) == 0:
            return []
        batch, _, sizes = self._batch(images)
        levels = self.levels(batch.tensors, sizes)
        found, _ = self.head(batch, levels, None)
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        results: list[Target] = self.transform.postprocess(found, batch.image_sizes, originals)
        return results

    def losses(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        teacher: TaskModel | None = None,
        generator: torch.Generator | None = None,
        pyramid_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Loss terms by name, as torchvision calls them, the method's, each times its weight, and
        ``"total"``, their sum.

        Args:
            images: as in :meth:`forward`.
            targets: as in :meth:`forward`.
            teacher: a model with a dense backbone; None leaves the distance of its pyramid out.
            generator: source of the method's noise; None uses torch's global one.
            pyramid_weight: of that distance.
        """
        check_targets(images, targets, self.config)
        batch, resized, sizes = self._batch(images, targets)
        output = self.train_levels(batch.tensors, sizes, generator)
        _, terms = self.head(batch, output.levels, resized)
        terms = terms | self.method_terms(output)
        if teacher is not None:
            with torch.no_grad():
                due = teacher.levels(batch.tensors, sizes)
            terms["pyramid"] = pyramid_weight * pyramid_loss(output, due)
        return {**terms, "total": torch.stack([*terms.values()]).sum()}

    def _check_images(self, images: Sequence[Tensor]) -> None:
        """Raise :class:`InputError` unless torchvision can prepare the images, and detect there."""
        own, channels = next(self.parameters()), len(self.data_config["mean"])
        if own.dtype != torch.float32 and not own.is_cuda:
            raise InputError(
                f"the weights are {own.dtype}, in which torchvision finds no boxes on a "
                f"{own.device.type}; keep them in float32 and use torch.autocast"
            )
        for number, image in enumerate(images):
            shape = tuple(image.shape)
            if len(shape) != 3 or shape[0] != channels or 0 in shape or image.dtype != own.dtype:
                raise InputError(
                    f"image {number} has shape {shape} and is {image.dtype}; expected "
                    f"({channels}, height, width), {own.dtype} from 0 to 1"
                )
            short, long = sorted(shape[1:])
            if not self.config.fixed_size and short * self.config.long_side <= long:
                raise InputError(
                    f"image {number} is {shape[1]} x {shape[2]} pixels; made to fit a long side of "
                    f"{self.config.long_side}, nothing would be left of it. Crop it"
                )


def own_sizes(batch: ImageList) -> list[tuple[int, int]] | None:
    """Height and width of each image in a padded batch; None where nothing was padded."""
    whole = tuple(batch.tensors.shape[-2:])
    sizes = [(int(height), int(width)) for height, width in batch.image_sizes]
    return None if all(size == whole for size in sizes) else sizes


def check_targets(
    images: Sequence[Tensor], targets: Sequence[Target], config: DetectorConfig
) -> None:
    """Raise :class:`InputError` unless the targets can be learned from."""
    if not len(images) or len(images) != len(targets):
        raise InputError(f"there are {len(images)} images and {len(targets)} targets; one each")
    due = ("boxes", "labels", "masks") if config.has_masks else ("boxes", "labels")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = [name for name in due if name not in target]
        if missing:
            raise InputError(f"target {number} has no {' and no '.join(missing)}")
        wrong = [name for name in due if not isinstance(target[name], Tensor)]
        if wrong or target["labels"].dtype != torch.int64:
            raise InputError(
                f"target {number} has {' and '.join(wrong) or 'labels'} of another type; expected "
                "tensors, and labels in int64"
            )
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4) or len(labels) != len(target[due[-1]]):
            raise InputError(
                f"target {number} has {len(labels)} labels and boxes of {tuple(boxes.shape)}; "
                "expected four numbers, and a mask where there are masks, for each"
            )
        if config.has_masks and target["masks"].shape[1:] != image.shape[1:]:
            raise InputError(
                f"target {number} has masks of {tuple(target['masks'].shape[1:])} pixels, and the "
                f"image has {tuple(image.shape[1:])}"
            )
        if bool(((labels < 1) | (labels >= config.num_classes)).any()):
            raise InputError(
                f"target {number} has labels from {int(labels.min())} to {int(labels.max())}; the "
                f"head knows 1 to {config.num_classes - 1} (0 is the background)"
            )
        if not bool((boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)).all()):
            raise InputError(f"target {number} has a box without extent, or that is no number")


def _head(config: DetectorConfig, info: Sequence[LevelInfo]) -> nn.Module:
    return RetinaHead(config, info) if config.head == "retinanet" else RCNNHead(config, info)


class Neck(nn.Module):
    """Maps of one width: a feature pyramid network on several maps, or the simple feature pyramid
    on the one of a plain vision transformer.

    Args:
        info: the backbone's maps.
        width: channels of the result.
        extra: makes further maps of the last.
        smallest: reduction of the first map that is used.
    """

    def __init__(
        self, info: Sequence[LevelInfo], width: int, extra: ExtraFPNBlock, smallest: int = 1
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.simple = SimplePyramid(info[0], width) if len(info) == 1 else None
        whole = info if self.simple is None else self.simple.info
        check_reductions(whole)
        self.info = [level for level in whole if level.reduction >= smallest]
        self.skipped = len(whole) - len(self.info)
        self.extra = extra
        self.fpn: nn.Module | None = None
        if self.simple is None:
            channels = [level.channels for level in self.info]
            self.fpn = FeaturePyramidNetwork(channels, width)

    def forward(self, levels: Sequence[Tensor]) -> Levels:
        """The levels by name: ``"0"``, ``"1"`` ... and those that are made of the last."""
        maps = list(levels if self.simple is None else self.simple(levels))[self.skipped :]
        names, results = [str(place) for place in range(len(maps))], maps
        if self.fpn is not None:
            named = self.fpn(OrderedDict(zip(names, maps, strict=True)))
            results = list(named.values())
        results, names = self.extra(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


class RCNNHead(nn.Module):
    """Proposals, and what is seen in them: Faster, Mask and Cascade Mask R-CNN."""

    def __init__(self, config: DetectorConfig, info: Sequence[LevelInfo]) -> None:
        super().__init__()
        self.neck = Neck(info, config.channels, LastLevelMaxPool())
        strides = [level.reduction for level in self.neck.info]
        anchors = _anchors(config, [*strides, 2 * strides[-1]], (1.0,))
        counts = {"training": 2 * config.proposals, "testing": config.proposals}
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(config.channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=config.proposal_samples,
            positive_fraction=0.5,
            pre_nms_top_n=counts,
            post_nms_top_n=counts,
            nms_thresh=0.7,
        )
        names = [str(place) for place in range(len(strides))]
        if config.head == "cascade_mask_rcnn":
            stages = [_box_heads(config, names, *each) for each in CascadeHeads.STAGES]
            for stage in stages:
                stage.box_predictor.bbox_pred = nn.Linear(config.box_width, 4)
            self.roi_heads: nn.Module = CascadeHeads(
                stages, *_mask_parts(config, names), box_loss=config.box_loss
            )
            return
        self.roi_heads = _box_heads(config, names, 0.5, (10.0, 10.0, 5.0, 5.0))
        if config.has_masks:
            heads = self.roi_heads
            heads.mask_roi_pool, heads.mask_head, heads.mask_predictor = _mask_parts(config, names)

    def forward(
        self, images: ImageList, levels: Sequence[Tensor], targets: list[Target] | None
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """What is found, in pixels of the padded images, and in training mode the losses."""
        maps = self.neck(levels)
        proposals, terms = self.rpn(images, maps, targets)
        found, more = self.roi_heads(maps, proposals, images.image_sizes, targets)
        return found, {**more, **terms}


class RetinaHead(RetinaNet):  # type: ignore[misc]
    """Torchvision's RetinaNet behind its backbone, on the maps from a reduction of 8 on."""

    @property
    def neck(self) -> Neck:
        """What makes the maps."""
        found: Neck = self.backbone
        return found

    def __init__(self, config: DetectorConfig, info: Sequence[LevelInfo]) -> None:
        width = config.channels
        neck = Neck(info, width, LastLevelP6P7(width, width), _SMALLEST_OF_RETINANET)
        strides = [level.reduction for level in neck.info]
        octave = [config.anchor_scale / 2 * 2 ** (third / 3) for third in range(3)]
        anchors = _anchors(config, [*strides, 2 * strides[-1], 4 * strides[-1]], octave)
        super().__init__(
            neck,
            config.num_classes,
            anchor_generator=anchors,
            head=RetinaNetHead(width, anchors.num_anchors_per_location()[0], config.num_classes),
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.detections,
        )

    def forward(
        self, images: ImageList, levels: Sequence[Tensor], targets: list[Target] | None
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """What is found, in pixels of the padded images, and in training mode the losses."""
        maps = list(self.backbone(levels).values())
        answers, anchors = self.head(maps), self.anchor_generator(images, maps)
        if self.training:
            return [], self.compute_loss(targets, answers, anchors)
        per_place = self.anchor_generator.num_anchors_per_location()[0]
        counts = [level.shape[2] * level.shape[3] * per_place for level in maps]
        split = {name: list(answer.split(counts, 1)) for name, answer in answers.items()}
        boxes = [list(of_image.split(counts)) for of_image in anchors]
        return self.postprocess_detections(split, boxes, images.image_sizes), {}


def _anchors(
    config: DetectorConfig, strides: Sequence[int], scales: Sequence[float]
) -> AnchorGenerator:
    """One set per level; of tensors with values even where modules are made without (``meta``)."""
    scales = [config.anchor_scale] if scales == (1.0,) else scales
    sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
    with torch.device("cpu"):
        return AnchorGenerator(sizes, (config.aspect_ratios,) * len(sizes))


def _box_heads(
    config: DetectorConfig,
    names: Sequence[str],
    iou: float,
    weights: tuple[float, float, float, float],
) -> Any:
    """Torchvision's heads of boxes that overlap an object by ``iou``, on the maps ``names``."""
    pool = MultiScaleRoIAlign(list(names), output_size=7, sampling_ratio=2)
    width, channels = config.box_width, config.channels
    if config.box_head == "4conv1fc":
        norm = nn.BatchNorm2d if config.batch_norm else None
        head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [width], norm_layer=norm)
    else:
        head = TwoMLPHead(channels * 7 * 7, width)
    return RoIHeads(
        pool,
        head,
        FastRCNNPredictor(width, config.num_classes),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=config.box_samples,
        positive_fraction=0.25,
        bbox_reg_weights=weights,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections,
    )


def _mask_parts(config: DetectorConfig, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Where masks are drawn from, by what convolutions, and for which classes."""
    width = config.mask_width
    return (
        MultiScaleRoIAlign(list(names), output_size=14, sampling_ratio=2),
        MaskRCNNHeads(config.channels, [width] * config.mask_convolutions, 1),
        MaskRCNNPredictor(width, width, config.num_classes),
    )


def detector(backbone: nn.Module, num_classes: int, head: str, **settings: Any) -> Detector:
    """A new detector; see :class:`~vitrim.tasks.config.DetectorConfig` for its settings.

    Args:
        backbone: a timm model, or a sparse one that :func:`vitrim.sparsify` made of it.
        num_classes: the background (0) among them.
        head: ``mask_rcnn``, ``faster_rcnn``, ``cascade_mask_rcnn`` or ``retinanet``.
        settings: fields of the config, and ``classes``, the names from label 1 on.

    Raises:
        UnsupportedBackboneError: the backbone is of no family that is served.
        ConfigError: it, or the method on it, gives no maps; a setting is not valid.
    """
    classes = settings.pop("classes", ())
    check_maps(backbone)
    config = DetectorConfig(head=head, num_classes=num_classes, **settings)  # type: ignore[arg-type]
    return Detector(backbone, config, classes)


def mask_rcnn(backbone: nn.Module, num_classes: int, **settings: Any) -> Detector:
    """Mask R-CNN; arguments are those of :func:`detector`."""
    return detector(backbone, num_classes, "mask_rcnn", **settings)


def faster_rcnn(backbone: nn.Module, num_classes: int, **settings: Any) -> Detector:
    """Faster R-CNN; arguments are those of :func:`detector`."""
    return detector(backbone, num_classes, "faster_rcnn", **settings)


def cascade_mask_rcnn(backbone: nn.Module, num_classes: int, **settings: Any) -> Detector:
    """Cascade Mask R-CNN; arguments are those of :func:`detector`."""
    return detector(backbone, num_classes, "cascade_mask_rcnn", **settings)


def retinanet(backbone: nn.Module, num_classes: int, **settings: Any) -> Detector:
    """RetinaNet; arguments are those of :func:`detector`."""
    return detector(backbone, num_classes, "retinanet", **settings)
