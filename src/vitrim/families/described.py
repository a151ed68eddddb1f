"""A backbone in words: how a file says which timm model it was, and how that is made again.

What a file says of a backbone is checked against a list of what may be said: it reaches neither the
network nor a file.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_args, get_pretrained_cfg
from torch import nn

from vitrim.config import closest, require
from vitrim.errors import CheckpointError
from vitrim.families import FAMILIES
from vitrim.models.plain_vit import ARGUMENTS

_OVERLAY = "pretrained_cfg_overlay"
_LARGEST = 2**16
"""Of the whole numbers that say how a backbone is built."""
_DEEPEST = 1000
_MOST_BUFFERS = 2**30
"""Bytes of buffers that no file holds (masks of windows, above all)."""


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """Timm name and arguments from which ``backbone`` can be made again.

    Raises:
        CheckpointError: timm does not know how the model was made.
    """
    for family in FAMILIES:
        found = family.describe(backbone) if family.accepts(backbone) else None
        if found is not None:
            return {"name": found[0], "kwargs": found[1]}
    config = getattr(backbone, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name:
        raise CheckpointError(
            f"this {type(backbone).__name__} was not made by timm.create_model, so a checkpoint "
            "could not say how to make it again; create it by its timm name"
        )
    kwargs, usual = get_model_args(backbone), get_pretrained_cfg(name)
    size = config.get("input_size")
    if size and usual is not None and tuple(size) != tuple(usual.input_size):
        # Where no argument says for which images the model is (ConvNeXt), its record does.
        kwargs["pretrained_cfg_overlay"] = {"input_size": list(size)}
    return {"name": name, "kwargs": kwargs}


@cache
def backbone_arguments() -> frozenset[str]:
    """What a file may say of how a backbone is made: what the classes of all families take,
    and ``plain_vit``.
    """
    classes = [cls for family in FAMILIES for cls in family.classes]
    taken = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    taken |= {name for family in FAMILIES for name in family.arguments}
    taken -= {"self", "args", "kwargs", "device", "dtype", "cfg"}
    return frozenset(taken | ARGUMENTS | {_OVERLAY})


def check_arguments(kwargs: Any, where: str = "backbone.kwargs") -> None:
    """Raise :class:`ConfigError` unless ``kwargs`` are arguments of an architecture and no more:
    numbers, names and lists of them, nothing that timm would load, fetch or open.
    """
    require(isinstance(kwargs, Mapping), f"{where} is {kwargs!r}; a table was expected")
    for name, value in kwargs.items():
        known = backbone_arguments()
        require(
            name in known,
            f"{where}.{name} is no argument of an architecture{closest(name, known)}; files may "
            f"say: {', '.join(sorted(known))}",
        )
        if name == _OVERLAY:
            require(
                isinstance(value, Mapping)
                and set(value) == {"input_size"}
                and isinstance(value["input_size"], list | tuple)
                and len(value["input_size"]) == 3
                and all(type(side) is int and 0 < side <= _LARGEST for side in value["input_size"]),
                f"{where}.{name} is {value!r}; only an input_size may be given",
            )
        else:
            require(_is_setting(value), f"{where}.{name} is {value!r:.100}; a number was expected")
        if name.startswith("depth"):
            each = value if isinstance(value, list | tuple) else [value]
            numbers = all(type(depth) is int and depth > 0 for depth in each)
            require(
                numbers and 0 < sum(each) <= _DEEPEST,
                f"{where}.{name} is {value!r:.100}; expected {_DEEPEST} blocks at most",
            )


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        whole = not any(isinstance(item, bool) for item in value)
        return whole and len(value) <= 64 and all(map(_is_setting, value))
    if isinstance(value, str):
        return re.fullmatch(r"[\w-]{0,40}", value) is not None
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return value is None


def describe_data(backbone: nn.Module) -> dict[str, Any]:
    """How images are prepared for ``backbone`` (timm's data config), and for one that takes clips,
    how many ``frames`` they have.
    """
    config: dict[str, Any] = resolve_model_data_config(_recorded(backbone))
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is not None:  # timm's answer does not follow create_model(..., img_size=...)
        config["input_size"] = (config["input_size"][0], *size)
    frames = next((f(backbone).clip_frames for f in FAMILIES if f.accepts(backbone)), None)
    return config if frames is None else config | {"frames": frames}


def _recorded(backbone: nn.Module) -> Any:
    """What has timm's record of a backbone: itself, or, where another library made it, its like."""
    if hasattr(backbone, "pretrained_cfg"):
        return backbone
    config: Any = get_pretrained_cfg(describe_backbone(backbone)["name"])
    return SimpleNamespace(pretrained_cfg=config.to_dict())


def create_backbone(description: Mapping[str, Any], num_tensors: int | None = None) -> nn.Module:
    """The (randomly initialised) backbone of :func:`describe_backbone`.

    Args:
        description: its name and arguments.
        num_tensors: that its file holds, of which each block has several; None does not look.

    Raises:
        CheckpointError: timm does not know it, or cannot make it so.
        ConfigError: an argument is none that a file may give.
    """
    name, kwargs = description["name"], description["kwargs"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"the backbone {name!r:.100} is unknown to timm")
    check_arguments(kwargs)
    depth = kwargs.get("depth", kwargs.get("depths", 0))
    blocks = sum(depth) if isinstance(depth, list | tuple) else depth
    if num_tensors is not None and blocks > num_tensors:
        raise CheckpointError(f"{name} is to have {blocks} blocks, and {num_tensors} tensors")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # whatever the arguments make timm stumble over
        raise CheckpointError(f"timm cannot create {name!r} with {kwargs}: {error}") from error
    return model


def check_runs(backbone: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise :class:`CheckpointError` unless ``backbone``, on ``meta``, takes such images."""
    try:
        backbone.eval()(torch.empty(shape, device="meta"))
    except Exception as error:  # whatever its arguments make timm stumble over
        raise CheckpointError(f"timm cannot run what its arguments describe: {error}") from error


def fill_buffers(backbone: nn.Module, description: Mapping[str, Any]) -> None:
    """Make what no file holds of a ``backbone`` that was made without memory (on ``meta``): tables
    of places and masks of windows.

    Raises:
        CheckpointError: they are too large.
    """
    missing = {name: buffer for name, buffer in backbone.named_buffers() if buffer.is_meta}
    if not missing:
        return
    size = sum(buffer.numel() * buffer.element_size() for buffer in missing.values())
    if size > _MOST_BUFFERS:
        raise CheckpointError(
            f"the backbone {description['name']} needs {size / 2**30:.0f} GB for the masks of its "
            f"windows at {description['kwargs']}; at most {_MOST_BUFFERS >> 30} GB are made"
        )
    made = dict(create_backbone(description).named_buffers())
    for name in missing:
        owner, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(owner), last, made[name])
