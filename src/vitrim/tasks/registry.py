"""The tasks by name. Each is imported when it is asked for, as some need packages of an extra."""

from __future__ import annotations

from vitrim.errors import ConfigError
from vitrim.tasks.base import Task


def task_class(name: str) -> type[Task]:
    """The task that a recipe calls ``name``."""
    if name == "classification":
        from vitrim.tasks.classification import Classification

        return Classification
    if name == "detection":
        from vitrim.tasks.detection_task import DetectionTask

        return DetectionTask
    if name == "segmentation":
        from vitrim.tasks.segmentation_task import SegmentationTask

        return SegmentationTask
    if name == "video":
        from vitrim.tasks.video_task import VideoTask

        return VideoTask
    raise ConfigError(f"there is no task {name!r}")
