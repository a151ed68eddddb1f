"""The DynamicViT authors' Swin and ConvNeXt checkpoints as vitrim models.

Their files keep the names of the backbones' first release; timm renames some and downsamples at the
start of the next stage. The predictors of Swin lie inside its third stage, those of ConvNeXt at the
top, as 1 x 1 convolutions.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from vitrim.checkpoint import load_strict
from vitrim.config import from_plain
from vitrim.convert.weights import StateDict, classes_of, depths_of, shape_of
from vitrim.errors import CheckpointError
from vitrim.families.described import create_backbone
from vitrim.methods.dynamic_spatial import DynamicSpatialConfig
from vitrim.model import SparseModel

_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (96, (3, 3, 9, 3)): "convnext_tiny",
    (96, (3, 3, 27, 3)): "convnext_small",
    (128, (3, 3, 27, 3)): "convnext_base",
}
_PREDICTOR = r"method.predictors.\1"
_SWIN = [
    (r"layers\.2\.score_predictor\.(\d+)\.in_conv", _PREDICTOR + ".embed"),
    (r"layers\.2\.score_predictor\.(\d+)\.out_conv", _PREDICTOR + ".classify"),
    (r"layers\.2\.blocks\.(\d+)\.fastmlp\.fc1\.0", r"method.fast_paths.\1.norm"),
    (r"layers\.2\.blocks\.(\d+)\.fastmlp\.fc1\.1", r"method.fast_paths.\1.linear"),
    (r"head\.", "backbone.head.fc."),
]
_CONVNEXT = [
    (r"score_predictor\.(\d+)\.in_conv", _PREDICTOR + ".embed"),
    (r"score_predictor\.(\d+)\.out_conv", _PREDICTOR + ".classify"),
    (r"stages\.2\.(\d+)\.fast_path\.0", r"method.fast_paths.\1.norm"),
    (r"stages\.2\.(\d+)\.fast_path\.1", r"method.fast_paths.\1.linear"),
    (r"stages\.2\.(\d+)\.fast_path_gamma", r"method.fast_paths.\1.scale"),
    (r"downsample_layers\.0\.", "backbone.stem."),
    (r"downsample_layers\.(\d+)\.", r"backbone.stages.\1.downsample."),
    (r"stages\.(\d+)\.(\d+)\.dwconv", r"backbone.stages.\1.blocks.\2.conv_dw"),
    (r"stages\.(\d+)\.(\d+)\.pwconv(\d)", r"backbone.stages.\1.blocks.\2.mlp.fc\3"),
    (r"stages\.(\d+)\.(\d+)\.", r"backbone.stages.\1.blocks.\2."),
    (r"norm\.", "backbone.head.norm."),
    (r"head\.", "backbone.head.fc."),
]


def is_spatial(weights: StateDict) -> bool:
    """Whether the file is of a hierarchical backbone."""
    return any(key.startswith(("layers.", "downsample_layers.")) for key in weights)


def load_spatial(
    weights: StateDict, architecture: str | None, options: dict[str, Any]
) -> SparseModel:
    """Dynamic spatial sparsification with the authors' weights; see ``convert.load_official``."""
    swin = "patch_embed.proj.weight" in weights
    backbone = (_swin if swin else _convnext)(weights, architecture)
    renames = _SWIN if swin else _CONVNEXT
    renamed = {}
    for key, tensor in weights.items():
        if key.endswith((".relative_position_index", ".attn_mask")):
            continue  # timm makes them anew
        name = _renamed(key, renames)
        is_linear = name.startswith("method.predictors.") and tensor.ndim == 4
        renamed[name] = tensor.flatten(1) if is_linear else tensor
    paths = {int(m[1]) for name in renamed if (m := re.match(r"method\.fast_paths\.(\d+)", name))}
    found = {int(m[1]) for name in renamed if (m := re.match(r"method\.predictors\.(\d+)", name))}
    if not paths or not found:
        raise CheckpointError(
            "this is no state dict of dynamic spatial sparsification: it has no score_predictor.* "
            "or no fast path"
        )
    model = SparseModel(backbone, from_plain(DynamicSpatialConfig, options))
    stages, first = model.method.stages, min(paths)
    if (stages[0], len(stages)) != (first, len(found)):
        raise CheckpointError(
            f"the file has {len(found)} predictors and fast paths from block {first} on, the "
            f"config's stages are {stages}; pass stages=({first}, ...) with {len(found)} blocks"
        )
    load_strict(model, _counted_from(first, renamed), "the authors' DynamicViT file")
    model.origin = "converted from the authors' DynamicViT checkpoint"
    return model


def merging_name(key: str) -> str | None:
    """Our name of a weight of Swin's patch merging, which the first release has at the end of a
    stage, and timm at the start of the next one; None for another weight.
    """
    match = re.match(r"layers\.(\d+)\.downsample\.", key)
    return match and f"backbone.layers.{int(match[1]) + 1}.downsample.{key[match.end() :]}"


def _renamed(key: str, renames: list[tuple[str, str]]) -> str:
    if name := merging_name(key):
        return name
    for old, new in renames:
        name, count = re.subn("^" + old, new, key)
        if count:
            return name
    return f"backbone.{key}"


def _counted_from(first: int, weights: StateDict) -> StateDict:
    """The fast paths' numbers, which are those of blocks, counted from the first."""
    pattern = re.compile(r"method\.fast_paths\.(\d+)\.")
    return {
        pattern.sub(lambda match: f"method.fast_paths.{int(match[1]) - first}.", name): tensor
        for name, tensor in weights.items()
    }


def _swin(weights: StateDict, architecture: str | None) -> nn.Module:
    """The Swin whose shapes ``weights`` has."""
    dim, _, patch, _ = shape_of(weights, "patch_embed.proj.weight", 4)
    depths = depths_of(weights, r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight")
    tables = [
        shape_of(weights, f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(len(depths))
    ]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    kwargs: dict[str, Any] = {}
    if architecture is None and ((dim, depths) not in _SIZES or (patch, window) != (4, 7)):
        heads = tuple(table[1] for table in tables)
        sizes = {"embed_dim": dim, "depths": depths, "num_heads": heads}
        kwargs = sizes | {"patch_size": patch, "window_size": window}
    mask = "layers.0.blocks.1.attn_mask"
    if mask in weights:  # one mask per window tells the image's size
        windows, places, _ = shape_of(weights, mask, 3)
        if places != window**2:
            raise CheckpointError(f"{mask} is for {places} places, a window has {window**2}")
        kwargs["img_size"] = patch * window * math.isqrt(windows)
    name = architecture or _SIZES.get((dim, depths), "swin_tiny_patch4_window7_224")
    return _create(name, kwargs, weights)


def _convnext(weights: StateDict, architecture: str | None) -> nn.Module:
    """The ConvNeXt whose shapes ``weights`` has."""
    dim, _, patch, _ = shape_of(weights, "downsample_layers.0.0.weight", 4)
    depths = depths_of(weights, r"stages\.(\d+)\.(\d+)\.norm\.weight")
    kwargs: dict[str, Any] = {}
    if architecture is None and ((dim, depths) not in _SIZES or patch != 4):
        stages = range(len(depths))
        dims = tuple(shape_of(weights, f"stages.{stage}.0.norm.weight", 1)[0] for stage in stages)
        kwargs = {"dims": dims, "depths": depths, "patch_size": patch}
    return _create(architecture or _SIZES.get((dim, depths), "convnext_tiny"), kwargs, weights)


def _create(name: str, kwargs: dict[str, Any], weights: StateDict) -> nn.Module:
    kwargs = kwargs | {"num_classes": classes_of(weights)}
    return create_backbone({"name": name, "kwargs": kwargs})
