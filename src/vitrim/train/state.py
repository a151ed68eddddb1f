"""The state of a trainer on disk: whole files only, the latest two, of one recipe per folder."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from vitrim.checkpoint import write_atomic, write_together
from vitrim.config import read_json, read_text, to_plain
from vitrim.errors import ConfigError, TrainingError
from vitrim.train.folder import writing
from vitrim.train.logs import LOG_FILE
from vitrim.train.recipe import Recipe, recipe_from_plain

RECIPE_FILE = "recipe.json"
STATE_FOLDER = "state"
KEPT_STATES = 2
RESULTS = ("checkpoint", "backbone.safetensors", "backbone.json")
"""What may be the result of a run, by name."""

_PARTS: dict[str, Any] = {
    "step": int,
    "global_batch": int,
    "best": float,
    "metrics": dict,
    "model": dict,
    "optimizer": dict,
    "average": dict | None,
    "scaler": dict | None,
}

# What may change between two parts of a run: nothing in it enters the numbers of a step.
_FREE = {
    "data": ("workers",),
    "run": ("max_seconds", "checkpoint_steps", "eval_every", "log_every", "tensorboard"),
}

# What a run that was killed in the midst of writing leaves behind.
_LEFTOVERS = (
    *(
        f".{name}.*.tmp"
        for name in (RECIPE_FILE, LOG_FILE, "backbone.json", "backbone.safetensors")
    ),
    *(f"{STATE_FOLDER}/.step_*.{kind}.*.tmp" for kind in ("pt", "sha256")),
    *(f"checkpoint/.{name}.*.tmp" for name in ("config.json", "model.safetensors")),
)

logger = logging.getLogger(__name__)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds what is not of this recipe's run, unless that saved nothing.

    Raises:
        TrainingError: it does; the message names what it holds, or what differs.
    """
    path = folder / RECIPE_FILE
    results = [name for name in RESULTS if (folder / name).exists()]
    if not path.exists():
        others = [name for name in (STATE_FOLDER, LOG_FILE) if (folder / name).exists()]
        if others or results:
            found = ", ".join([*others, *results])
            raise TrainingError(f"{folder} holds {found}, but no {RECIPE_FILE}; use another folder")
        return
    there = read_json(path, TrainingError)
    try:
        there = _plain(recipe_from_plain(there))  # a field that was added since has its default
    except ConfigError as error:
        raise TrainingError(
            f"{path} is no recipe that this vitrim reads ({error}); use another folder"
        ) from error
    different = ", ".join(_differences(there, _plain(recipe)))
    if _states(folder) or results:
        if different:
            raise TrainingError(
                f"{folder} holds another recipe's run (it differs in {different}); use another "
                "folder, or the same recipe to go on"
            )
        if not _states(folder):
            logger.warning("%s holds no trainer state; the run starts anew", folder)
    elif different:
        logger.warning("the run in %s saved nothing; this one takes its place", folder)


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(to_plain(recipe)))
    return plain


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    names = []
    for table in sorted(here.keys() | there.keys()):
        one, other = there.get(table), here.get(table)
        if isinstance(one, dict) and isinstance(other, dict):
            keys = sorted((one.keys() | other.keys()) - set(_FREE.get(table, ())))
            names += [f"{table}.{key}" for key in keys if one.get(key) != other.get(key)]
        elif one != other:
            names.append(table)
    return names


def claim_folder(folder: Path, recipe: Recipe, step: int) -> None:
    """Write the recipe into ``folder``, and forget what was saved after ``step``, from which the
    run goes on.

    Raises:
        TrainingError: the folder cannot be written to.
    """
    with writing(folder):
        for pattern in _LEFTOVERS:
            for leftover in filter(Path.is_file, folder.glob(pattern)):
                leftover.unlink()
        for path in _states(folder):
            if not step or path > _state_path(folder, step):
                _remove(path)
        if not step:
            (folder / LOG_FILE).unlink(missing_ok=True)
        text = json.dumps(to_plain(recipe), indent=2) + "\n"
        write_atomic(folder / RECIPE_FILE, text.encode())


def save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` as that of ``step``, whole or not at all; drop all but the latest two.

    Its SHA-256 stands beside it, as ``sha256sum --check`` reads it.

    Raises:
        TrainingError: the folder cannot be written to.
    """
    path, file = _state_path(folder, step), BytesIO()
    torch.save(state, file)
    content = file.getvalue()
    digest = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    with writing(folder):
        path.parent.mkdir(exist_ok=True)
        write_together({_digest_path(path): digest.encode(), path: content})
        for old in _states(folder)[:-KEPT_STATES]:
            _remove(old)


def load_state(folder: Path, before: int | None = None) -> dict[str, Any] | None:
    """The latest state that can be read, or None where there is none yet.

    Args:
        folder: of the run.
        before: a step; only earlier states are looked at.

    Raises:
        TrainingError: there are states, and none is left that can be read.
    """
    paths = _states(folder)
    for path in reversed(paths):
        if before is not None and path >= _state_path(folder, before):
            continue
        try:
            return _read(path)
        except Exception as error:  # a damaged file raises nearly anything
            logger.warning("passed over the damaged state %s: %s", path, error)
    if paths:
        raise TrainingError(
            f"no trainer state in {folder / STATE_FOLDER} can be used; start anew (--no-resume)"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    expected = read_text(_digest_path(path), TrainingError).partition(" ")[0]
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError("its SHA-256 is not that in the file beside it")
    state: dict[str, Any] = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    for name, kind in _PARTS.items():
        if name not in state or not isinstance(state[name], kind):
            raise ValueError(f"its {name!r} is missing or of another type")
    if state["step"] < 1 or path.name != _state_path(path.parent, state["step"]).name:
        raise ValueError(f"it is of step {state['step']}")
    return state


def _states(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, (folder / STATE_FOLDER).glob("step_*.pt")))


def _state_path(folder: Path, step: int) -> Path:
    return folder / STATE_FOLDER / f"step_{step:09d}.pt"


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _remove(path: Path) -> None:
    path.unlink()
    with suppress(OSError):  # it is a folder, perhaps
        _digest_path(path).unlink()


def is_finite(value: Any) -> bool:
    """Whether every tensor in a nested state holds finite numbers only."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, dict) or all(map(is_finite, value.values()))
