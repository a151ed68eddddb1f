"""The authors' published checkpoints as vitrim models.

A converter per system renames the authors' keys and works out the architecture from the shapes.
Files are opened with ``weights_only=True``: tensors and plain containers, no code.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.checkpoint import create_backbone, load_strict, read_weights
from vitrim.config import closest, from_plain, to_plain
from vitrim.errors import CheckpointError, ConfigError
from vitrim.methods.asvit import ASViTConfig
from vitrim.methods.dynamicvit import DynamicViTConfig
from vitrim.methods.spvit import SPViTConfig
from vitrim.model import SparseModel

StateDict = dict[str, Tensor]


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an authors' ``.pth`` or a safetensors file, without running code from it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return dict(read_weights(path))
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        # The authors store their command line next to the weights; it is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a remark on pickle's protocol; errors say enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as plain weights ({first_line}). It is damaged, or it holds "
            "Python objects, which vitrim refuses to run"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return dict(content)


def load_official(
    state_dict: Mapping[str, Any],
    system: str,
    *,
    architecture: str | None = None,
    **method_options: Any,
) -> SparseModel:
    """A sparse model with an authors' weights.

    Args:
        state_dict: their state dict, bare or nested under ``model`` or ``model_ema``.
        system: whose code wrote it: ``"dynamicvit"``, ``"asvit"`` or ``"spvit"``.
        architecture: timm name of the backbone; worked out from the shapes when None.
        method_options: fields of the method's config that the file does not hold, such as
            ``keep_ratio=0.7`` (DynamicViT's files do not say for which ratio they were trained).

    Raises:
        CheckpointError: keys or shapes do not fit; every missing and unexpected key is named.
        ConfigError: unknown system, architecture or option.
    """
    if system not in _CONVERTERS:
        raise ConfigError(
            f"unknown system {system!r}{closest(system, _CONVERTERS)}; "
            f"known: {', '.join(_CONVERTERS)}"
        )
    model = _CONVERTERS[system](_weights_of(state_dict), architecture, method_options)
    return model.eval()


def _weights_of(content: Mapping[str, Any]) -> StateDict:
    for key in ("model", "model_ema"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers or not content:
        raise CheckpointError(
            "this is no state dict: expected tensors by name, or such a dictionary under 'model' "
            f"or 'model_ema'; found {', '.join(map(repr, strangers[:5])) or 'nothing'}"
        )
    return dict(content)


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
    renamed = {}
    for key, tensor in weights.items():
        match = pattern.fullmatch(key)
        renamed[f"method.thresholds.{match[1]}" if match else f"backbone.{key}"] = tensor
    load_strict(model, renamed, "the authors' AS-ViT file")
    model.origin = "converted from a checkpoint of the authors' AS-ViT code"
    return model


def _spvit(weights: StateDict, architecture: str | None, options: dict[str, Any]) -> SparseModel:
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


def _plain_vit(weights: StateDict, architecture: str | None) -> nn.Module:
    """The DeiT whose shapes ``weights`` has (the authors use 64 channels per head throughout)."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in weights]
    if missing:
        raise CheckpointError(
            f"this is no plain vision transformer's state dict: missing {', '.join(missing)}"
        )
    expected_ndim = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    for key, ndim in expected_ndim.items():
        if weights[key].ndim != ndim or not weights[key].numel():
            raise CheckpointError(
                f"{key} has shape {tuple(weights[key].shape)}; expected {ndim} dimensions"
            )
    dim = weights["cls_token"].shape[-1]
    patch = weights["patch_embed.proj.weight"].shape[-1]
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    classes = weights["head.weight"].shape[0] if "head.weight" in weights else 0
    if architecture is None:
        sizes = {192: "tiny", 384: "small", 768: "base"}
        architecture = f"deit_{sizes.get(dim, 'small')}_patch16_224"
        kwargs: dict[str, Any] = {
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": max(1, dim // 64),
            "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        }
        if dim in sizes:  # only what differs from the named architecture
            defaults = {"patch_size": 16, "depth": 12, "num_heads": dim // 64, "mlp_ratio": 4.0}
            kwargs = {k: v for k, v in kwargs.items() if k in defaults and v != defaults[k]}
    else:
        kwargs = {}
    kwargs |= {"img_size": side * patch, "num_classes": classes}
    return create_backbone({"name": architecture, "kwargs": kwargs})


_CONVERTERS: dict[str, Callable[[StateDict, str | None, dict[str, Any]], SparseModel]] = {
    "dynamicvit": _dynamicvit,
    "asvit": _asvit,
    "spvit": _spvit,
}
