"""What a model is for, and the heads that detect and segment. The engine in ``train/`` trains them.

``vitrim.tasks.mask_rcnn(sparse, num_classes=91)`` makes a detector of a backbone,
``vitrim.tasks.upernet(sparse, num_classes=150)`` a segmenter, and
``vitrim.tasks.from_pretrained(folder)`` opens one that was saved.
"""

from vitrim.tasks.config import DetectorConfig
from vitrim.tasks.detection import (
    Detector,
    cascade_mask_rcnn,
    faster_rcnn,
    mask_rcnn,
    retinanet,
)
from vitrim.tasks.opened import from_pretrained
from vitrim.tasks.segmentation import Segmenter, upernet
from vitrim.tasks.segmentation_config import SegmenterConfig

__all__ = [
    "Detector",
    "DetectorConfig",
    "Segmenter",
    "SegmenterConfig",
    "cascade_mask_rcnn",
    "faster_rcnn",
    "from_pretrained",
    "mask_rcnn",
    "retinanet",
    "upernet",
]
