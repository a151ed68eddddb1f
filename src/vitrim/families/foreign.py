"""What to do with what is no timm model of a served family, said where it is given as one."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitrim.errors import UnsupportedBackboneError
from vitrim.tokens.calls import bare


def check_bare(model: Any) -> None:
    """Raise :class:`UnsupportedBackboneError` for what is no module, or is one wrapped up."""
    if isinstance(model, str):
        raise UnsupportedBackboneError(
            f"{model!r:.100} is a name; give the model itself: timm.create_model(name, "
            "pretrained=True), or vitrim.from_pretrained(name) for a checkpoint of vitrim's"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedBackboneError(
            f"this {type(model).__name__} is no torch module; give a timm model"
        )
    if bare(model) is not model:
        raise UnsupportedBackboneError(
            "this model is compiled; make the model sparse first, and compile the sparse model"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedBackboneError(
            f"this is a {type(model).__name__} around a {type(model.module).__name__}; make "
            "model.module sparse first, and wrap the sparse model"
        )


def advice(model: nn.Module) -> str | None:
    """How a model of another library, or one with a timm model inside, is made sparse."""
    package = type(model).__module__.partition(".")[0]
    if package == "transformers" and not type(model).__name__.startswith("TimmWrapper"):
        return (
            "vitrim.from_transformers(model, config) converts models of transformers, and "
            "vitrim.sparsify_inside(model, config) makes the vision tower in one sparse"
        )
    if package in ("transformers", "open_clip"):
        return "vitrim.sparsify_inside(model, config) makes the vision tower in it sparse"
    return None
