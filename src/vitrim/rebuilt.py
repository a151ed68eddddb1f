"""Checkpoints read back: the model that is in one, and whether a model could be in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.errors import CheckpointError, ConfigError
from vitrim.families import described
from vitrim.modes import evaluating

Model = TypeVar("Model", bound=nn.Module)


def made(
    make: Callable[[nn.Module, Any], Model],
    description: dict[str, Any],
    weights: dict[str, Tensor],
    source: str,
    options: dict[str, Any],
) -> Model:
    """The model of a checkpoint, with its ``weights`` themselves: nothing is computed, and hardly
    any memory is taken, before they are known to fit.
    """
    config = checkpoint.method_config(description, options)
    types = {str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()}
    if len(types) > 1:
        raise CheckpointError(f"{source} has weights of {' and '.join(sorted(types))}; one is due")
    with torch.device("meta"):
        backbone = described.create_backbone(description["backbone"], len(weights))
        model: Any = make(backbone, config)
        checkpoint.check_fit(model.state_dict(), weights, source)
        described.check_runs(backbone, (1, model.family.in_channels, *model.family.probe_size))
    model.load_state_dict(weights, assign=True)
    described.fill_buffers(model.backbone, description["backbone"])
    found: Model = model
    return found


def check_rebuilt(
    make: Callable[[nn.Module, Any], nn.Module],
    sparse: Any,
    description: dict[str, Any],
    weights: dict[str, Tensor],
) -> None:
    """Raise :class:`CheckpointError` unless a checkpoint would be read back as this model."""
    advice = (
        "what is in a model besides timm's own arguments must be undone or merged before "
        "(reset_classifier for another head, merge for adapters, prune.remove for pruning; for "
        "another image size make it sparse at that size)"
    )
    try:
        twin: Any = made(make, checkpoint.checked(description), weights, "the model", {})
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"no checkpoint could hold this model: {error}\n{advice}") from error
    parameter = next(sparse.backbone.parameters())
    size = (2, sparse.family.in_channels, *sparse.family.probe_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(parameter)
    with evaluating(sparse, twin):
        try:
            here, answer = sparse.trace(images), sparse(images)
        except RuntimeError as error:
            raise CheckpointError(f"the model cannot run on images: {error}") from error
        there = twin.to(images.device).trace(images)
    if not here.logits.isfinite().all():
        raise CheckpointError("the model's answers are not finite (NaN or infinite)")
    pairs = [(here.logits, there.logits), (answer, there.logits)]
    pairs += [(a.scores, b.scores) for a, b in zip(here.stages, there.stages, strict=True)]
    if not all(_alike(a, b, parameter.dtype) for a, b in pairs):
        raise CheckpointError(
            "read back, this model would answer otherwise (random images were tried): no file "
            f"says what was changed in it; {advice}"
        )


def _alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two answers of one model differ by no more than rounding; dropped places are NaN."""
    slack = 64 * torch.finfo(dtype).eps
    scale = float(expected.float().nan_to_num().abs().max()) if expected.numel() else 0.0
    return torch.allclose(found.float(), expected.float(), slack, slack * scale, equal_nan=True)
