"""Checkpoints: a folder with ``config.json`` and ``model.safetensors``. Nothing is ever unpickled.

``config.json`` names the backbone (timm name and arguments), the preprocessing, the method, its
fields and its calibration, where the model came from and how its metrics were measured, and holds
digests of itself and of the weights; ``model.safetensors`` holds ``backbone.*`` under timm's names
and ``method.*``. What it says of the backbone is checked against a list of what may be said: it
reaches neither the network nor a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrim.budget import Calibration
from vitrim.config import from_plain, read_json, require, shown
from vitrim.errors import CheckpointError, ConfigError
from vitrim.families.described import describe_backbone, describe_data
from vitrim.methods import method_by_name
from vitrim.runtime import check_preprocessing

FORMAT = "vitrim"
FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_TORN_READS = 5


def plain_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A model's state as a file can hold it, without what ``torch.compile`` adds to the names.

    Raises:
        CheckpointError: an entry is no whole tensor of its own, or not finite.
    """
    weights: dict[str, Tensor] = {}
    places: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        name = key.replace("_orig_mod.", "")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            raise CheckpointError(
                f"{name} is no whole tensor ({type(tensor).__name__}); save the model before it is "
                "quantised, sharded or offloaded"
            )
        place = (tensor.device, tensor.data_ptr(), tensor.shape)
        if tensor.numel() and places.setdefault(place, name) != name:
            raise CheckpointError(
                f"{name} and {places[place]} are one tensor, and would be read back as two; give "
                "one of them a copy (nn.Parameter(weight.clone())) before saving"
            )
        tensor = tensor.detach().contiguous()
        if tensor.is_inference() or tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a part of something larger, or from inference mode
        weights[name] = tensor
    check_finite(weights, "the model")
    return weights


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`CheckpointError` unless all numbers are."""
    known = {name: tensor for name, tensor in weights.items() if not tensor.is_meta}
    bad = [name for name, tensor in known.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        listed = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise CheckpointError(
            f"{source} has weights that are not finite (NaN or infinite): {listed}; the training "
            "that made it went wrong, so use an earlier state"
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, put together; any other as it is."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values; of what holds no values in memory (on ``meta``,
    packed by quantisation) of its name alone. Names are without ``torch.compile``'s part.
    """
    digest, plain = hashlib.sha256(), {name.replace("_orig_mod.", ""): name for name in weights}
    for name in sorted(plain):
        found: Any = weights[plain[name]]
        if not isinstance(found, Tensor) or found.is_meta or found.is_quantized:
            digest.update(f"{name} {type(found)};".encode())
            continue
        tensor = whole(found.detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a ``config.json`` says, its digests left out."""
    said = {key: value for key, value in config.items() if key != "digests"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write(
    folder: str | os.PathLike[str], description: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint; its files appear whole or not at all.

    Args:
        folder: made if absent; an earlier checkpoint in it is replaced.
        description: :func:`described`.
        weights: of backbone and method.
    """
    config = json.loads(json.dumps(description))
    config["digests"] = {"weights": fingerprint(weights), "config": digest_of(config)}
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        {
            folder / WEIGHTS_FILE: safetensors.torch.save(dict(weights), {"format": "pt"}),
            folder / CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        }
    )


def described(
    backbone: nn.Module, data: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``config.json`` of a model, its digests left out.

    Args:
        backbone: made by timm.
        data: what is known of how images are prepared, beside what timm knows.
        known: JSON-ready: ``method``, and what else is known.

    Raises:
        CheckpointError: timm does not know how the backbone was made, or no file can say it.
    """
    from vitrim import __version__

    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"vitrim": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "backbone": _plain(describe_backbone(backbone), "the backbone was made with an argument"),
        "data": describe_data(backbone) | dict(data),
        **known,
    }
    return _plain(config, "origin, metrics or data hold something")


def _plain(table: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(table, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} that no file can hold ({error}); use plain finite values, such as names of "
            "layers instead of classes"
        ) from error
    return plain


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one whole."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files: all are complete on disk before the first one takes its place."""
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = {path: path.with_name(f".{path.name}.{writer}.tmp") for path in contents}
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
    config = read_json(path, CheckpointError)
    try:
        return checked(config)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from error


def checked(config: Any) -> dict[str, Any]:
    """``config``, if it is what a ``config.json`` says.

    Raises:
        CheckpointError: foreign, of another version, damaged, or changed since it was written.
    """
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"not written by vitrim (no format {FORMAT!r} in it)")
    versions = config.get("versions")
    if config.get("format_version") not in (1, FORMAT_VERSION):
        wrote = versions.get("vitrim") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"of format version {config.get('format_version')!r:.100}; this vitrim reads versions "
            f"1 and {FORMAT_VERSION}, so use the vitrim that wrote it ({wrote!r:.100})"
        )
    for key in ("backbone", "method", "data", "versions"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"damaged: {key} is {config.get(key)!r:.100}; a table is due")
    for table, key, kind in (
        ("backbone", "name", str),
        ("backbone", "kwargs", dict),
        ("method", "name", str),
        ("method", "config", dict),
    ):
        value = config[table].get(key)
        if not isinstance(value, kind):
            raise CheckpointError(f"damaged: {table}.{key} is {value!r:.100}")
    if not isinstance(config.get("origin"), str | None):
        raise CheckpointError(f"damaged: origin is {config['origin']!r:.100}; a text is due")
    check_preprocessing(config["data"], CheckpointError, "data")
    if config["format_version"] > 1 and "digests" in config:
        digests = config["digests"]
        if not isinstance(digests, dict) or digests.get("config") != digest_of(config):
            raise CheckpointError(
                "changed or damaged since it was written: it is not what its digest says; give "
                "other settings to from_pretrained instead"
            )
    return config


def method_config(description: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The config of the method, with other values for some ``options``.

    Raises:
        ConfigError: a field is missing, unknown, or not valid.
    """
    fields, method = description["method"]["config"], method_by_name(description["method"]["name"])
    due = [field.name for field in dataclasses.fields(method.config_class) if field.init]
    # Of checkpoints that did not know these, what they did, and what their budgets are of.
    fields = dict.fromkeys({"exact_last_block", "merge_dropped"} & set(due), False) | fields
    missing = [name for name in due if name not in fields]
    require(not missing, f"method.config lacks {', '.join(missing)}")
    return from_plain(method.config_class, fields | options, "method")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: absent, truncated, or another kind of file (a pickle, say).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is no file")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated or a pickle, "
            "which vitrim does not open here. For an authors' .pth file use: vitrim convert"
        ) from error


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`CheckpointError`, naming everything that does not fit, unless ``weights`` are
    finite and have the names, shapes and kinds of type of ``expected``, which may be on ``meta``.
    """
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    for key, due in expected.items():
        if key not in weights:
            continue
        found = weights[key]
        if found.shape != due.shape:
            shapes = tuple(found.shape), tuple(due.shape)
            problems.append(f"{key} has shape {shapes[0]} where {shapes[1]} is due")
        elif found.dtype not in (_FLOATS if due.dtype.is_floating_point else _WHOLES):
            problems.append(f"{key} is of {found.dtype} where {due.dtype} is due")
    if problems:
        raise CheckpointError(
            f"{source} does not fit this architecture ({len(problems)} problems):\n  "
            + "\n  ".join(problems)
        )
    check_finite(weights, source)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLES = (torch.int64, torch.int32)


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load ``weights`` into ``module``, naming everything that does not fit; see
    :func:`check_fit`. Nothing is loaded unless everything fits.
    """
    expected = module.state_dict()
    check_fit(expected, weights, source)
    converted = {key: weights[key].to(due.dtype) for key, due in expected.items()}
    check_finite(converted, source)  # a narrower type may not hold them
    module.load_state_dict(converted)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked ``config.json`` of a checkpoint, and the weights that belong to it.

    Raises:
        CheckpointError: damaged, foreign, of another version, or half replaced.
    """
    path = Path(folder) / WEIGHTS_FILE
    for again in reversed(range(_TORN_READS)):
        description, weights = read_config(folder), read_weights(path)
        expected = description.get("digests", {}).get("weights")
        if description["format_version"] == 1 or fingerprint(weights) == expected:
            break
        if not again:
            raise CheckpointError(
                f"{path} is damaged, or not of the same checkpoint as {CONFIG_FILE}: its digest is "
                "another"
            )
        time.sleep(0.05)  # somebody replaces one after the other
    return description, weights


def read_labels(description: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes in a ``config.json``; None where it has none.

    Raises:
        CheckpointError: they are no texts, or more or fewer than the classes.
    """
    labels = description.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"damaged: labels is {shown(labels)}; a list of texts is due")
    if len(labels) != num_classes:
        raise CheckpointError(f"damaged: there are {len(labels)} labels for {num_classes} classes")
    return tuple(labels)


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
