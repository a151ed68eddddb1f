"""Checkpoints of detectors and segmenters: folders like every other, see ``vitrim/checkpoint.py``.

``config.json`` also says which task, how its head is built, and what the classes are called;
``model.safetensors`` holds ``backbone.*`` under timm's names, ``method.*`` where there is a method,
and ``head.*``. A dense backbone's method has the empty name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.config import from_plain, shown, to_plain
from vitrim.errors import CheckpointError, ConfigError
from vitrim.families import described
from vitrim.model import SparseModel
from vitrim.modes import evaluating

Make = Callable[[nn.Module], Any]
"""From a backbone to the model on it, with new weights."""

_MOST_CLASSES = 2**16


def save(
    model: Any, folder: str | os.PathLike[str], metrics: dict[str, Any], origin: str | None
) -> None:
    """Write a checkpoint of a :class:`~vitrim.tasks.model.TaskModel`; its files appear whole or not
    at all.

    Raises:
        CheckpointError: what would be read back is not this model.
    """
    sparse: SparseModel | None = model.sparse
    names = _file_names(model)
    state = model.state_dict()
    weights = checkpoint.plain_weights({names[name]: tensor for name, tensor in state.items()})
    method: dict[str, Any] = {"name": "", "config": {}}
    records: Sequence[Any] = ()
    if sparse is not None:
        method = {"name": sparse.method.name, "config": to_plain(sparse.config)}
        records = sparse.calibration if sparse.calibration and sparse.is_calibrated else ()
    known = {
        "method": method,
        "task": {
            "name": model.task,
            "config": to_plain(model.config),
            "classes": list(model.classes),
        },
        "calibration": [to_plain(record) for record in records],
        "origin": origin,
        "metrics": metrics,
    }
    description = checkpoint.described(model.timm_model, model.data_config, known)
    _check_rebuilt(model, description, weights)
    checkpoint.write(folder, description, weights)


def made(
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
    make: Make,
    options: Mapping[str, Any],
) -> Any:
    """The model of a checkpoint, with its ``weights`` themselves: hardly any memory is taken before
    they are known to fit.

    Args:
        description: its ``config.json``.
        weights: by their names in the file.
        source: what messages call it.
        make: puts the task's head on a backbone.
        options: fields of the method's config to change.
    """
    types = {str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()}
    if len(types) > 1:
        raise CheckpointError(f"{source} has weights of {' and '.join(sorted(types))}; one is due")
    with torch.device("meta"):
        timm_model = described.create_backbone(description["backbone"], len(weights))
        backbone = timm_model
        if description["method"]["name"]:
            config = checkpoint.method_config(description, options)
            backbone = SparseModel(timm_model, config)
        elif options:
            raise ConfigError(
                f"{' and '.join(options)} given, but {source} has a dense backbone, without a "
                "method to set"
            )
        model = make(backbone)
        names, state = _file_names(model), model.state_dict()
        checkpoint.check_fit({names[name]: due for name, due in state.items()}, weights, source)
        family = model.family
        described.check_runs(timm_model, (1, family.in_channels, *family.image_size))
    model.load_state_dict({name: weights[names[name]] for name in state}, assign=True)
    described.fill_buffers(timm_model, description["backbone"])
    return model


def task_of(description: Mapping[str, Any], folder: object) -> dict[str, Any]:
    """The ``task`` table of a ``config.json``: ``name``, ``config`` and ``classes``.

    Raises:
        CheckpointError: it is of a classifier, or damaged.
    """
    if "task" not in description:
        raise CheckpointError(
            f"{folder} is the checkpoint of a classifier; open it by vitrim.from_pretrained"
        )
    task: Any = description["task"]
    kinds = {"name": str, "config": dict, "classes": list}
    for key, kind in kinds.items():
        value = task.get(key) if isinstance(task, dict) else None
        if not isinstance(value, kind):
            raise CheckpointError(f"{folder} is damaged: task.{key} is {shown(value)}")
    names = task["classes"]
    if len(names) > _MOST_CLASSES or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder} is damaged: task.classes are {shown(names)}")
    found: dict[str, Any] = task
    return found


def _file_names(model: Any) -> dict[str, str]:
    """Names in the file by names in the model, where a sparse backbone is one level deeper."""
    names = {}
    for name in model.state_dict():
        parts = name.split(".")
        deeper = model.sparse is not None and parts[0] == "backbone"
        names[name] = ".".join(parts[1:] if deeper else parts)
    return names


def _check_rebuilt(model: Any, description: Any, weights: dict[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` unless a checkpoint would be read back as this model."""

    def make(backbone: nn.Module) -> Any:
        plain = from_plain(type(model.config), to_plain(model.config))
        return type(model)(backbone, plain, model.classes)

    try:
        twin = made(checkpoint.checked(description), weights, "the model", make, {})
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"no checkpoint could hold this model: {error}") from error
    family, parameter = model.family, next(model.parameters())
    noise = torch.Generator().manual_seed(0)
    images = torch.rand((1, family.in_channels, *family.image_size), generator=noise)
    images = images.to(parameter)
    with evaluating(model, twin):
        here, there = model.levels(images), twin.to(images.device).levels(images)
    slack = 64 * torch.finfo(parameter.dtype).eps
    for own, other in zip(here, there, strict=True):
        if not own.isfinite().all():
            raise CheckpointError("the backbone's maps are not finite (NaN or infinite)")
        if not torch.allclose(own, other, slack, slack * float(own.abs().max())):
            raise CheckpointError(
                "read back, this model's backbone would give other maps (a random image was "
                "tried): no file says what was changed in it; undo that before saving"
            )
