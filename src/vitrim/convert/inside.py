"""Models that hold a vision tower: transformers' with a text tower, or around a timm model, and
open_clip's. The tower is found, and made sparse in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vitrim.convert.open_clip import is_open_clip_tower, open_clip_twin
from vitrim.convert.processor import data_of_open_clip, data_of_processor
from vitrim.convert.towers import Size
from vitrim.convert.transformers import converted, is_tower
from vitrim.errors import MissingExtraError, UnsupportedBackboneError
from vitrim.families import FAMILIES
from vitrim.families.foreign import check_bare
from vitrim.model import SparseModel, sparsify
from vitrim.tokens.calls import kind


def sparsify_inside(
    model: nn.Module,
    config: Any,
    *,
    path: str | None = None,
    processor: Any = None,
    image_size: int | Size | None = None,
    generator: torch.Generator | None = None,
) -> SparseModel:
    """Make the vision tower in ``model`` sparse, in its place.

    What holds it goes on as before: a timm model in open_clip (``visual.trunk``) or in
    transformers' ``TimmWrapper...`` becomes the sparse model; open_clip's own vision transformer
    and the towers of transformers (CLIP, SigLIP, DINOv2, ViT, DeiT) are converted first.

    Args:
        model: with one vision tower that vitrim serves. It is changed.
        config: a method's config, as for :func:`vitrim.sparsify`.
        path: the tower's name in the model; None looks for it.
        processor: see :func:`vitrim.from_transformers`.
        image_size: the same.
        generator: source of the new parameters' values; None uses torch's global one.

    Returns:
        the sparse model that is inside now: it is turned to a budget, calibrated and saved.

    Raises:
        UnsupportedBackboneError: there is no tower, or more than one, or it cannot be made sparse.
        ConfigError: the config does not fit the tower.
    """
    check_bare(model)
    place = _only_tower(model) if path is None else path
    parent, _, name = place.rpartition(".")
    try:
        holder, tower = model.get_submodule(parent), model.get_submodule(place)
    except AttributeError as error:
        raise UnsupportedBackboneError(
            f"this {type(model).__name__} has no module {path!r}; leave the path out to look for it"
        ) from error
    if is_tower(tower):
        sparse = converted(tower, config, processor, image_size, generator)
        setattr(holder, name, as_transformers(sparse, pooler=getattr(tower, "pooler", None)))
        return sparse
    backbone = open_clip_twin(tower) if is_open_clip_tower(tower) else tower
    sparse = sparsify(backbone, config, generator=generator)
    prepared = getattr(tower, "preprocess_cfg", getattr(holder, "preprocess_cfg", None))
    if processor is not None:
        sparse.data_config = data_of_processor(processor)
    elif prepared:
        sparse.data_config = data_of_open_clip(prepared)
    if is_open_clip_tower(tower):  # which is asked for these
        for known in ("image_size", "preprocess_cfg"):
            setattr(sparse, known, getattr(tower, known, None))
    setattr(holder, name, sparse)
    return sparse


def _only_tower(model: nn.Module) -> str:
    """The name of the one vision tower in ``model``.

    Raises:
        UnsupportedBackboneError: there is none, or there are several, or the model is one.
    """
    found, name = list(_towers(model)), type(model).__name__
    if found == [""]:
        how = "vitrim.from_transformers converts it" if is_tower(model) else "see vitrim.sparsify"
        raise UnsupportedBackboneError(f"this {name} is a vision tower itself: {how}")
    if not found:
        raise UnsupportedBackboneError(
            f"in this {name} there is no vision tower that vitrim serves; give its timm model to "
            "vitrim.sparsify, which says why not"
        )
    if len(found) > 1:
        listed = ", ".join(found)
        raise UnsupportedBackboneError(
            f"in this {name} there are {len(found)} vision towers: {listed}; give one as path"
        )
    return found[0]


def _towers(model: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the vision towers in ``model``; what is inside of one is not looked at."""
    served = {cls for family in FAMILIES for cls in family.classes}
    if isinstance(model, SparseModel) or kind(model) in served or _is_converted(model):
        yield path
        return
    for name, child in model.named_children():
        yield from _towers(child, f"{path}.{name}" if path else name)


def _is_converted(module: nn.Module) -> bool:
    return is_tower(module) or is_open_clip_tower(module)


def as_transformers(
    sparse: SparseModel, *, pooler: nn.Module | None = None, logits_only: bool = False
) -> Any:
    """``sparse`` as a ``PreTrainedModel`` of transformers, with the same weights.

    Called with ``pixel_values``, it gives ``logits``, ``pooler_output`` and ``last_hidden_state``
    of full length, in which a dropped patch is as it was when it was dropped.

    Args:
        sparse: on a plain vision transformer.
        pooler: makes ``pooler_output`` of the last hidden state, where the original model had one;
            None: it is what the classifier reads.
        logits_only: whether to leave out all but the logits, which costs less and is there for
            every method and backbone.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError("a model of transformers", "transformers", "hf")
    if not isinstance(sparse, SparseModel):
        raise UnsupportedBackboneError(
            f"this {type(sparse).__name__} is no sparse model; make it one by vitrim.sparsify"
        )
    from vitrim.convert.as_transformers import SparseForImageClassification

    return SparseForImageClassification(sparse, pooler, logits_only)
