"""The authors' published checkpoints as vitrim models.

A converter per system renames the authors' keys and works out the architecture from the shapes.
Files are opened with ``weights_only=True``: tensors and plain containers, no code.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vitrim.checkpoint import load_strict, read_weights
from vitrim.config import closest, from_plain, to_plain
from vitrim.convert.spatial import is_spatial, load_spatial
from vitrim.convert.stvit import load_stvit_r
from vitrim.convert.weights import (
    StateDict,
    blocks_of,
    classes_of,
    depths_of,
    rehearsed,
    shape_of,
    weights_of,
)
from vitrim.errors import CheckpointError, ConfigError
from vitrim.families.described import create_backbone
from vitrim.methods.asvit import ASViTConfig
from vitrim.methods.dynamicvit import DynamicViTConfig
from vitrim.methods.spvit import SPViTConfig
from vitrim.methods.spvit_pyramid import SPViTPyramidConfig
from vitrim.model import SparseModel

_ZIP = b"PK\x03\x04"


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an authors' ``.pth`` or a safetensors file, without running code from it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return dict(read_weights(path))
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        _check_size(path)
        # The authors store their command line or settings next to the weights: plain containers.
        containers: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
        with torch.serialization.safe_globals(containers), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a remark on pickle's protocol; errors say enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as plain weights ({first_line}). It is damaged, or it holds "
            "Python objects, which vitrim refuses to run"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return {key: content[key] for key in content}


def _check_size(path: Path) -> None:
    """Raise :class:`CheckpointError` for an archive that would unpack to more than the file has:
    torch never compresses what it saves, but reads what is.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"it is compressed, and unpacks to {unpacked:,} bytes")


def load_official(
    state_dict: Mapping[str, Any],
    system: str,
    *,
    architecture: str | None = None,
    **method_options: Any,
) -> SparseModel:
    """A sparse model with an authors' weights.

    Args:
        state_dict: theirs, bare or nested under ``model``, ``state_dict`` or ``model_ema``.
        system: whose code wrote it: ``"dynamicvit"``, ``"asvit"``, ``"spvit"`` or ``"stvit-r"``.
        architecture: timm name of the backbone; worked out from the shapes when None.
        method_options: fields of the method's config that the file does not hold, such as
            ``keep_ratio=0.7`` (DynamicViT's files do not say for which ratio they were trained).

    Raises:
        CheckpointError: keys or shapes do not fit; every missing and unexpected key is named.
        ConfigError: unknown system, architecture or option.
    """
    if system not in SYSTEMS:
        raise ConfigError(
            f"unknown system {system!r}{closest(system, SYSTEMS)}; known: {', '.join(SYSTEMS)}"
        )
    weights, convert = weights_of(state_dict), SYSTEMS[system]
    return rehearsed(lambda: convert(weights, architecture, method_options)).eval()


def load_dense(
    state_dict: Mapping[str, Any],
    architecture: str | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A dense backbone with its authors' published weights: LV-ViT (which timm has not) or DeiT.

    Args:
        state_dict: theirs, bare or nested under ``model``, ``state_dict`` or ``model_ema``.
        architecture: timm name, such as ``"lvvit_s"``; worked out from the shapes when None.
        img_size: of the images to come; positions are interpolated, as timm does, if the weights
            are for another one. None takes that of the weights.

    Raises:
        CheckpointError: keys or shapes do not fit; every missing and unexpected key is named.
        ConfigError: unknown architecture.
    """
    weights = weights_of(state_dict)

    def convert() -> nn.Module:
        backbone = _plain_vit(weights, architecture)
        load_strict(backbone, weights, f"the file for {architecture or 'a dense backbone'}")
        return backbone

    backbone: Any = rehearsed(convert)
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        backbone.set_input_size(img_size=size)
    backbone.eval()
    return cast(nn.Module, backbone)


def _check_stages(model: SparseModel, found: int, what: str, advice: str) -> None:
    """Raise :class:`CheckpointError` unless the file has one of ``what`` for each stage."""
    num_stages = len(model.method.stages)
    if found != num_stages:
        raise CheckpointError(
            f"the file has {found} {what}, the config {num_stages} stages; pass {advice}"
        )


def _dynamicvit(
    weights: StateDict, architecture: str | None, options: dict[str, Any]
) -> SparseModel:
    if is_spatial(weights):
        return load_spatial(weights, architecture, options)
    backbone = _plain_vit(weights, architecture)
    config = from_plain(DynamicViTConfig, options)
    found = {int(m[1]) for key in weights if (m := re.match(r"score_predictor\.(\d+)\.", key))}
    if not found:
        raise CheckpointError("this is no DynamicViT state dict: it has no score_predictor.* key")
    model = SparseModel(backbone, config)
    _check_stages(model, len(found), "predictors", f"stages=(...) with {len(found)} blocks")
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith("score_predictor."):
            key = key.replace("score_predictor.", "method.predictors.")
            key = key.replace(".in_conv.", ".embed.").replace(".out_conv.", ".classify.")
        else:
            key = f"backbone.{key}"
        renamed[key] = tensor
    load_strict(model, renamed, "the authors' DynamicViT file")
    model.origin = "converted from the authors' DynamicViT checkpoint"
    return model


def _asvit(weights: StateDict, architecture: str | None, options: dict[str, Any]) -> SparseModel:
    backbone = _plain_vit(weights, architecture)
    pattern = re.compile(r"score_predictor\.(\d+)\.keep_threshold")
    found = [key for key in weights if pattern.fullmatch(key)]
    if not found:
        raise CheckpointError(
            "this is no AS-ViT state dict: it has no score_predictor.*.keep_threshold key"
        )
    model = SparseModel(backbone, from_plain(ASViTConfig, options))
    _check_stages(model, len(found), "thresholds", f"stages=(...) with {len(found)} blocks")
    renamed = {f"backbone.{key}": weights[key] for key in weights if key not in found}
    in_order = sorted(found, key=lambda key: int(key.split(".")[1]))
    renamed["method.thresholds"] = torch.stack([weights[key].reshape(()) for key in in_order])
    load_strict(model, renamed, "the authors' AS-ViT file")
    model.origin = "converted from a checkpoint of the authors' AS-ViT code"
    return model


def _spvit(weights: StateDict, architecture: str | None, options: dict[str, Any]) -> SparseModel:
    if any(key.startswith("transformers.") for key in weights):
        weights, backbone = _pit(weights, architecture)
        pyramid = to_plain(SPViTPyramidConfig.official()) | options
        config: Any = from_plain(SPViTPyramidConfig, pyramid)
    else:
        backbone = _plain_vit(weights, architecture)
        config = from_plain(SPViTConfig, to_plain(SPViTConfig.official()) | options)
    head = re.compile(r"(score_predictor\.\d+\.(?:in|out)_conv)\.(\d+)\.(.*)")
    found = {int(m[1]) for key in weights if (m := re.match(r"score_predictor\.(\d+)\.", key))}
    if not found:
        raise CheckpointError("this is no SPViT state dict: it has no score_predictor.* key")
    model = SparseModel(backbone, config)
    advice = f"stages=(...) and keep_ratio=(...) with {len(found)} entries"
    _check_stages(model, len(found), "selectors", advice)
    renamed = {}
    for key, tensor in weights.items():
        match = head.fullmatch(key)
        if match and match[2] != "0" and config.share_heads:  # their heads are one module
            first = weights.get(f"{match[1]}.0.{match[3]}")
            if first is None or not torch.equal(first, tensor):
                raise CheckpointError(
                    f"{key} differs from head 0, so the heads of this selector are not shared; "
                    "pass share_heads=False"
                )
            continue
        if key.startswith("score_predictor."):
            key = key.replace("score_predictor.", "method.selectors.")
            key = key.replace(".senet.", ".head_attention.")
            key = key.replace(".in_conv.", ".embed.").replace(".out_conv.", ".classify.")
        else:
            key = f"backbone.{key}"
        renamed[key] = tensor
    load_strict(model, renamed, "the authors' SPViT file")
    model.origin = "converted from the authors' SPViT checkpoint"
    return model


def _pit(weights: StateDict, architecture: str | None) -> tuple[StateDict, nn.Module]:
    """The weights with the names of a plain transformer's selectors and of timm's poolings, and the
    PiT whose shapes they have (its patches overlap by half, as all of the authors' do).
    """
    renamed, numbers = StateDict(), dict[str, int]()
    for key, tensor in weights.items():
        # Theirs counts poolings from the first; timm puts each into the stage that it leads to.
        key = re.sub(r"^pools\.(\d+)\.", lambda m: f"transformers.{int(m[1]) + 1}.pool.", key)
        if match := re.fullmatch(r"(transformers\.\d+)\.score_predictor\.0\.(.*)", key):
            number = numbers.setdefault(match[1], len(numbers))
            key = f"score_predictor.{number}.{match[2]}"
        renamed[key] = tensor
    places, patch = shape_of(renamed, "pos_embed", 4)[-1], _patch(renamed, "patch_embed.conv")
    hidden = shape_of(renamed, "transformers.0.blocks.0.mlp.fc1.weight", 2)[0]
    depth = depths_of(renamed, r"transformers\.(\d+)\.blocks\.(\d+)\.")
    norms = [f"transformers.{stage}.blocks.0.norm1.weight" for stage in range(len(depth))]
    dims = [shape_of(renamed, key, 1)[0] for key in norms]
    # Only a selector says how many heads its stage has; their width is the same in all stages.
    squeeze = "score_predictor.0.senet.0.weight"
    seen = int(min(numbers, default="transformers.0").split(".")[1])
    width = dims[seen] // shape_of(renamed, squeeze, 2)[1] if squeeze in renamed else 48
    heads = [dim // width for dim in dims]
    if architecture is None:
        size = {(32, 2): "ti", (48, 2): "xs", (48, 3): "s", (64, 4): "b"}.get(
            (width, heads[0]), "s"
        )
        architecture = f"pit_{size}_224"
    side = (places - 1) * (patch // 2) + patch
    kwargs: dict[str, Any] = {
        "img_size": side,
        "patch_size": patch,
        "stride": patch // 2,
        "base_dims": [width] * len(depth),
        "depth": depth,
        "heads": heads,
        "mlp_ratio": hidden / dims[0],
        "num_classes": classes_of(renamed),
    }
    return renamed, create_backbone({"name": architecture, "kwargs": kwargs})


def _plain_vit(weights: StateDict, architecture: str | None) -> nn.Module:
    """The DeiT or LV-ViT whose shapes ``weights`` has (64 channels per head, as all of theirs)."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in weights]
    if missing:
        raise CheckpointError(
            f"this is no plain vision transformer's state dict: missing {', '.join(missing)}"
        )
    dim, patch = shape_of(weights, "cls_token", 3)[-1], _patch(weights, "patch_embed.proj")
    side = round((shape_of(weights, "pos_embed", 3)[1] - 1) ** 0.5)
    depth = len(blocks_of(weights, r"blocks\.(\d+)\."))
    mlp_ratio = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0] / dim
    kwargs: dict[str, Any] = {}
    if "patch_embed.conv1.weight" in weights:
        patch *= 2  # half of it is in the first stride
        if architecture is None:
            architecture = "lvvit_m" if dim == 512 else "lvvit_s"
            kwargs = {
                "patch_size": patch,
                "stem_width": shape_of(weights, "patch_embed.conv1.weight", 4)[0],
                "embed_dim": dim,
                "depth": depth,
                "num_heads": max(1, dim // 64),
                "mlp_ratio": mlp_ratio,
            }
    elif architecture is None:
        sizes = {192: "tiny", 384: "small", 768: "base"}
        architecture = f"deit_{sizes.get(dim, 'small')}_patch16_224"
        kwargs = {
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": max(1, dim // 64),
            "mlp_ratio": mlp_ratio,
        }
        if dim in sizes:  # only what differs from the named architecture
            defaults = {"patch_size": 16, "depth": 12, "num_heads": dim // 64, "mlp_ratio": 4.0}
            kwargs = {k: v for k, v in kwargs.items() if k in defaults and v != defaults[k]}
    kwargs |= {"img_size": side * patch, "num_classes": classes_of(weights)}
    return create_backbone({"name": architecture, "kwargs": kwargs})


def _patch(weights: StateDict, name: str) -> int:
    """Side of the patches of an embedding, in pixels."""
    return shape_of(weights, f"{name}.weight", 4)[-1]


SYSTEMS: dict[str, Callable[[StateDict, str | None, dict[str, Any]], SparseModel]] = {
    "dynamicvit": _dynamicvit,
    "asvit": _asvit,
    "spvit": _spvit,
    "stvit-r": load_stvit_r,
}
