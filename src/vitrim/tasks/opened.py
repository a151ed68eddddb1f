"""Checkpoints of detectors and segmenters, opened."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from vitrim import checkpoint
from vitrim.config import from_plain
from vitrim.errors import CheckpointError
from vitrim.tasks import saved


def _model_class(name: str) -> Any:
    """What a checkpoint of the task holds."""
    if name == "detection":
        from vitrim.tasks.detection import Detector

        return Detector
    if name == "segmentation":
        from vitrim.tasks.segmentation import Segmenter

        return Segmenter
    raise CheckpointError(f"the checkpoint is of the task {name!r:.100}, which vitrim lacks")


def from_pretrained(folder: str | os.PathLike[str], **method_options: Any) -> Any:
    """Load the checkpoint folder of a detector or segmenter; the model is in evaluation mode, on
    the CPU.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        method_options: fields of the method's config to change, such as ``keep_ratio=0.5``.

    Raises:
        CheckpointError: damaged, foreign, of another version, of another architecture, or of a
            classifier.
        ConfigError: the method's fields, or the head's, are not valid.
    """
    description, weights = checkpoint.read(folder)
    task = saved.task_of(description, folder)
    model_class = _model_class(task["name"])
    config = from_plain(model_class.config_class, task["config"], "task.config")

    def make(backbone: nn.Module) -> Any:
        return model_class(backbone, config, task["classes"])

    source = f"{folder}/{checkpoint.WEIGHTS_FILE}"
    model = saved.made(description, weights, source, make, method_options)
    model.origin, model.data_config = description.get("origin"), description["data"]
    if model.sparse is not None:
        model.sparse.data_config = description["data"]
        if not method_options:  # other settings, other costs
            model.sparse.calibration = checkpoint.read_calibration(description)
    return model.eval()
