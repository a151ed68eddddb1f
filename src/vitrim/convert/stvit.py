"""The STViT-R authors' checkpoints, classifiers and detection backbones, as vitrim models.

Theirs is a Swin with a convolutional stem, whose third stage has blocks with queries apart from
keys and values, and no position biases. Ours keeps these blocks in the backbone: the biases that it
has beside them are not used, and set to 0.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from vitrim.checkpoint import load_strict
from vitrim.config import from_plain
from vitrim.convert.spatial import merging_name
from vitrim.convert.weights import StateDict, classes_of, depths_of, shape_of
from vitrim.errors import CheckpointError
from vitrim.families.described import create_backbone
from vitrim.methods.stvit_r import GLOBAL, LOCAL, UNIT, STViTRConfig
from vitrim.model import SparseModel

_SIZES = {(96, 6): "conv_stem_swin_tiny", (96, 18): "conv_stem_swin_small"}
_SIZES |= {(128, 18): "conv_stem_swin_base"}
_RENAMES = [
    (r"layers\.2\.blocks\.(\d+)\.layer_scale_([12])", r"method.blocks.\1.scale\2"),
    (r"layers\.2\.blocks\.(\d+)\.conv_pos\.proj\.0\.", r"method.blocks.\1.position."),
    (r"layers\.2\.semantic_token2", "method.centres_SC"),
    (r"norm(\d)\.", r"method.level_norms.\1."),
    (r"head\.", "backbone.head.fc."),
    (r"", "backbone."),
]
_BLOCK = re.compile(r"layers\.2\.blocks\.(\d+)\.attn\.(.+)")


def load_stvit_r(
    weights: StateDict, architecture: str | None, options: dict[str, Any]
) -> SparseModel:
    """STViT-R with the authors' weights; see ``convert.load_official``."""
    whole = any(key.startswith("backbone.") for key in weights)  # a detector, neck and heads too
    weights = {
        key.removeprefix("backbone."): tensor
        for key, tensor in weights.items()
        if (key.startswith("backbone.") or not whole)
        and not key.endswith((".relative_position_index", ".attn_mask"))
    }
    found = _settings(weights)
    backbone = create_backbone(_description(weights, architecture, found["form"] == "dense"))
    model = SparseModel(backbone, from_plain(STViTRConfig, found | options))
    renamed = _renamed(weights)
    for key, tensor in model.state_dict().items():
        if key.endswith(".relative_position_bias_table") and key not in renamed:
            renamed[key] = torch.zeros_like(tensor)
        elif found["form"] == "dense" and key.startswith("backbone.norm."):
            renamed[key] = tensor  # a detector's file has no final norm
    load_strict(model, renamed, "the authors' STViT-R file")
    model.origin = "converted from the authors' STViT-R checkpoint"
    return model


def _settings(weights: StateDict) -> dict[str, Any]:
    """The method's fields that show in the names of the weights."""
    if "layers.2.blocks.1.attn.q.weight" not in weights:
        raise CheckpointError(
            "this is no STViT-R state dict: it has no layers.2.blocks.1.attn.q.weight key"
        )
    dense = "norm0.weight" in weights
    return {
        "form": "dense" if dense else "classification",
        "level_norms": dense,
        "global_centres": "layers.2.semantic_token2" in weights,
        "position_convolution": any(".conv_pos." in key for key in weights),
        "position_biases": f"layers.2.blocks.{LOCAL}.attn.relative_position_bias_table" in weights,
    }


def _description(weights: StateDict, architecture: str | None, dense: bool) -> dict[str, Any]:
    """Name and arguments of the backbone whose shapes ``weights`` has."""
    depths = depths_of(weights, r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight")
    tables = [f"layers.{s}.blocks.0.attn.relative_position_bias_table" for s in range(len(depths))]
    dim = shape_of(weights, "patch_embed.proj.2.c.weight", 4)[0]
    heads = [shape_of(weights, table, 2)[1] for table in tables]
    kwargs: dict[str, Any] = {"num_classes": classes_of(weights), "drop_path_rate": 0.0}
    if architecture is None:
        architecture = _SIZES.get((dim, depths[2]), "conv_stem_swin_tiny")
        kwargs |= {"embed_dim": dim, "depths": depths, "num_heads": heads}
    if dense:
        kwargs |= {"dynamic_img_size": True, "always_partition": True}  # shifts in every stage
    return {"name": architecture, "kwargs": kwargs}


def _renamed(weights: StateDict) -> StateDict:
    """The weights by the names of the sparse model."""
    renamed = StateDict()
    for key, tensor in weights.items():
        if (match := _BLOCK.fullmatch(key)) and int(match[1]) % UNIT:
            prefix, name = f"layers.2.blocks.{match[1]}.attn.", match[2]
            if name == "relative_position_bias_table" and int(match[1]) % UNIT in (LOCAL, GLOBAL):
                renamed[f"method.blocks.{match[1]}.bias_table"] = tensor
                continue
            if name.startswith("q."):
                kind = name.removeprefix("q.")
                keys_values = weights.get(f"{prefix}kv.{kind}")
                if keys_values is None:
                    raise CheckpointError(f"the file has {key}, but no {prefix}kv.{kind}")
                renamed[f"backbone.{prefix}qkv.{kind}"] = torch.cat([tensor, keys_values])
                continue
            if name.startswith("kv."):
                continue
        renamed[_new_name(key)] = tensor
    if "method.centres_SC" in renamed:
        renamed["method.centres_SC"] = renamed["method.centres_SC"].squeeze(0)
    return renamed


def _new_name(key: str) -> str:
    if name := merging_name(key):
        return name
    return next(re.sub("^" + old, new, key) for old, new in _RENAMES if re.match(old, key))
