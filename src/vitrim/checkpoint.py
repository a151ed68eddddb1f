"""Checkpoints: a folder with ``config.json`` and ``model.safetensors``. Nothing is ever unpickled.

``config.json`` names the backbone (timm name and arguments), the preprocessing, the method, its
fields and its calibration, where the model came from and how its metrics were measured;
``model.safetensors`` holds ``backbone.*`` under timm's names and ``method.*``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import get_model_args, get_pretrained_cfg
from torch import Tensor, nn

from vitrim.budget import Calibration
from vitrim.config import from_plain, require
from vitrim.errors import CheckpointError, ConfigError
from vitrim.methods import method_by_name

FORMAT = "vitrim"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """Timm name and arguments from which ``backbone`` can be made again.

    Raises:
        CheckpointError: timm does not know how the model was made.
    """
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


def describe_data(backbone: nn.Module) -> dict[str, Any]:
    """How images are prepared for ``backbone`` (timm's data config)."""
    config: dict[str, Any] = resolve_model_data_config(backbone)
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is not None:  # timm's answer does not follow create_model(..., img_size=...)
        config["input_size"] = (config["input_size"][0], *size)
    return config


def create_backbone(description: dict[str, Any]) -> nn.Module:
    """The (randomly initialised) backbone of :func:`describe_backbone`."""
    name, kwargs = description["name"], dict(description["kwargs"])
    if not timm.is_model(name):
        raise CheckpointError(f"the backbone {name!r} is unknown to timm")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"timm cannot create {name!r} with {kwargs}: {error}") from error
    return model


def write(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint; its files appear whole or not at all.

    Args:
        folder: made if absent; an earlier checkpoint in it is replaced.
        backbone: made by timm.
        description: JSON-ready: ``method`` and ``data``, and what else is known.
        weights: of backbone and method.

    Raises:
        CheckpointError: timm does not know how the backbone was made, or no file can say it.
    """
    from vitrim import __version__

    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"vitrim": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "backbone": describe_backbone(backbone),
        **description,
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise CheckpointError(
            f"the backbone was made with an argument that no file can hold ({error}); create it "
            "with plain values, such as names of layers instead of classes"
        ) from error
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        {
            folder / WEIGHTS_FILE: safetensors.torch.save(whole, {"format": "pt"}),
            folder / CONFIG_FILE: text.encode(),
        }
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one whole."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files: all are complete on disk before the first one takes its place."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked ``config.json`` of a checkpoint folder."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no vitrim checkpoint: it has no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by vitrim (no format {FORMAT!r} in it)")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {config.get('format_version')}; this vitrim reads "
            f"version {FORMAT_VERSION}, so use the vitrim that wrote it "
            f"({config.get('versions', {}).get('vitrim')})"
        )
    missing = [key for key in ("backbone", "method", "data") if key not in config]
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}")
    if not _is_data_config(config["data"]):
        raise CheckpointError(f"{path} is damaged: its data config is {config['data']!r}")
    return config


def _is_data_config(data: Any) -> bool:
    size = data.get("input_size") if isinstance(data, dict) else None
    return (
        isinstance(size, list)
        and len(size) == 3
        and all(isinstance(side, int) and side > 0 for side in size)
        and all(isinstance(data.get(key), list) for key in ("mean", "std"))
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: absent, truncated, or another kind of file (a pickle, say).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated or a pickle, "
            "which vitrim does not open here. For an authors' .pth file use: vitrim convert"
        ) from error


def load_strict(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load ``weights`` into ``module``, naming every key or shape that does not fit.

    Nothing is loaded unless everything fits.
    """
    expected = module.state_dict()
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)} where {tuple(expected[key].shape)} is due"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit this architecture ({len(problems)} problems):\n  "
            + "\n  ".join(problems)
        )
    module.load_state_dict(weights)


def read(
    folder: str | os.PathLike[str], method_options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module, Any, tuple[Calibration, ...]]:
    """A checkpoint, checked: its description, its weights, and what the description says: the
    backbone (without weights), the method's config with ``method_options``, and the calibration.

    Raises:
        CheckpointError: damaged, foreign, or of another version.
        ConfigError: the method's fields are not valid.
    """
    description = read_config(folder)
    weights = read_weights(Path(folder) / WEIGHTS_FILE)
    try:
        method = method_by_name(description["method"]["name"])
        fields = description["method"]["config"] | method_options
        config: Any = from_plain(method.config_class, fields, "method")
        calibration = read_calibration(description)
        backbone = create_backbone(description["backbone"])
    except ConfigError as error:
        raise ConfigError(f"{folder}/{CONFIG_FILE}: {error}") from error
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}/{CONFIG_FILE} is damaged: {error!r}") from error
    return description, weights, backbone, config, calibration


def read_calibration(description: Mapping[str, Any]) -> tuple[Calibration, ...]:
    """The budgets that were met before the checkpoint with this ``config.json`` was written.

    Raises:
        ConfigError: the record is damaged.
    """
    record = description.get("calibration", [])
    require(isinstance(record, list), f"calibration is {record!r}; a list was expected")
    points = []
    for place, entry in enumerate(record):
        where = f"calibration[{place}]"
        require(isinstance(entry, Mapping), f"{where} is {entry!r}; a table was expected")
        missing = [f.name for f in dataclasses.fields(Calibration) if f.name not in entry]
        require(not missing, f"{where} lacks {', '.join(missing)}")
        points.append(from_plain(Calibration, entry, where))
    return tuple(points)
