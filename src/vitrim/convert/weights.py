"""What the converters share: an authors' weights, checked, and a model that they fill.

The authors' names and shapes say what the model is, and a stranger may have written them: shapes
are asked for by :func:`shape_of`, blocks are counted by :func:`blocks_of`, and whatever is built
from them is built by :func:`rehearsed`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrim.config import shown
from vitrim.errors import CheckpointError, VitrimError

StateDict = dict[str, Tensor]
Made = TypeVar("Made")

_MOST_BLOCKS = 1000


def weights_of(content: Mapping[str, Any]) -> StateDict:
    """The weights of an authors' file: bare, or nested under ``model`` and the like.

    Raises:
        CheckpointError: there is something else among them, or a tensor that has no memory.
    """
    # By item alone: what a file calls a dictionary may have a `get` of its own.
    for key in ("model", "state_dict", "model_ema"):
        if key in content and isinstance(content[key], Mapping):
            content = content[key]
            break
    weights = {key: content[key] for key in content}
    strangers = [
        key
        for key, value in weights.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strangers or not weights:
        raise CheckpointError(
            "this is no state dict: expected tensors by name, or such a dictionary under 'model', "
            "'state_dict' or 'model_ema'; found "
            f"{', '.join(map(shown, strangers[:5])) or 'nothing'}"
        )
    odd = [key for key, tensor in weights.items() if not _is_plain(tensor)]
    if not odd and sum(w.nbytes for w in weights.values()) > 2 * _memory(weights):
        odd = ["tensors that share their memory"]
    if odd:
        raise CheckpointError(
            f"{shown(odd)} are no plain tensors on a CPU; expected ones whose values all lie in "
            "memory"
        )
    return {key.removeprefix("module."): tensor for key, tensor in weights.items()}


def _memory(weights: StateDict) -> int:
    """Bytes that the weights take; what is shared counts once."""
    storages = (weight.untyped_storage() for weight in weights.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is strided and has as much memory as it has values."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    whole = tensor.numel() * tensor.element_size()
    return tensor.device.type == "cpu" and whole <= tensor.untyped_storage().nbytes()


def shape_of(weights: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    """Of one of the weights.

    Raises:
        CheckpointError: it is missing, or has another number of dimensions, or an empty one.
    """
    if key not in weights:
        raise CheckpointError(f"this is another model's state dict: missing {key}")
    shape = tuple(weights[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{key} has shape {shape}; expected {ndim} dimensions, none empty")
    return shape


def blocks_of(weights: StateDict, block: str) -> set[tuple[int, ...]]:
    """The places of blocks: the numbers that the pattern ``block`` finds in the names.

    Raises:
        CheckpointError: there is none, or more than any model has.
    """
    matches = (re.match(block, key) for key in weights)
    places = {tuple(map(int, match.groups())) for match in matches if match}
    if not 0 < len(places) <= _MOST_BLOCKS:
        raise CheckpointError(
            f"the file has {len(places)} blocks ({block}); expected 1 to {_MOST_BLOCKS}"
        )
    return places


def depths_of(weights: StateDict, block: str) -> tuple[int, ...]:
    """Blocks per stage; the pattern finds the numbers of stage and block.

    Raises:
        CheckpointError: as :func:`blocks_of`, or the third stage is missing, where methods act.
    """
    stages = [stage for stage, _ in blocks_of(weights, block)]
    depths = tuple(stages.count(stage) for stage in sorted(set(stages)))
    if len(depths) < 3:
        raise CheckpointError(f"the file has {len(depths)} stages of blocks; expected 3 or more")
    return depths


def classes_of(weights: StateDict) -> int:
    """Outputs of the head; 0 where there is none."""
    return shape_of(weights, "head.weight", 2)[0] if "head.weight" in weights else 0


def rehearsed(make: Callable[[], Made]) -> Made:
    """What ``make`` builds and fills, after a rehearsal on torch's meta device.

    There tensors have shapes and no memory, so that what does not fit the weights is refused before
    it takes any. The model is built anew, not moved: some buffers of timm's (Swin's masks and
    indices) are in no file, and have values only where they were made.

    Raises:
        CheckpointError: of ``make``, or of whatever else goes wrong in the rehearsal: the names and
            shapes of the weights make no model.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied there
            make()
    except VitrimError:
        raise
    except Exception as error:  # of timm or torch, on numbers that no author's model has
        raise CheckpointError(
            f"the names and shapes of the weights make no model: {shown(str(error))}"
        ) from error
    return make()
