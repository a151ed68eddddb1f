"""The state of a trainer on disk: whole files only, the latest two, of one recipe per folder."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vitrim.checkpoint import write_atomic
from vitrim.config import to_plain
from vitrim.errors import ConfigError, TrainingError
from vitrim.train.logs import LOG_FILE
from vitrim.train.recipe import Recipe, recipe_from_plain

RECIPE_FILE = "recipe.json"
STATE_FOLDER = "state"
KEPT_STATES = 2

# What may change between two parts of a run: nothing in it enters the numbers of a step.
_FREE = {
    "data": ("workers",),
    "run": ("max_seconds", "checkpoint_steps", "eval_every", "log_every", "tensorboard"),
}


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds another recipe's run, unless that run never saved anything.

    Raises:
        TrainingError: it does; the message names what differs.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        if (folder / STATE_FOLDER).exists() or (folder / LOG_FILE).exists():
            raise TrainingError(f"{folder} holds a run without {RECIPE_FILE}; use another folder")
        return
    if not _states(folder):
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); use another folder") from error
    with suppress(ConfigError):  # written before a field was added: it had the default
        there = _plain(recipe_from_plain(there))
    different = _differences(there, _plain(recipe))
    if different:
        raise TrainingError(
            f"{folder} holds another recipe's run (it differs in {', '.join(different)}); use "
            "another folder, or the same recipe to go on"
        )


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


def claim_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Write the recipe into ``folder``; with ``fresh`` an earlier part of the run is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        for path in _states(folder):
            path.unlink()
        (folder / LOG_FILE).unlink(missing_ok=True)
    text = json.dumps(to_plain(recipe), indent=2) + "\n"
    write_atomic(folder / RECIPE_FILE, text.encode())


def save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` as that of ``step``, whole or not at all; drop all but the latest two."""
    path = folder / STATE_FOLDER / f"step_{step:09d}.pt"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in _states(folder)[:-KEPT_STATES]:
        old.unlink()


def load_state(folder: Path) -> dict[str, Any] | None:
    """The latest state that can be read, or None where there is none yet.

    Raises:
        TrainingError: there are states, and all are damaged.
    """
    paths = _states(folder)
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            continue
        return state
    if paths:
        raise TrainingError(f"no trainer state in {folder / STATE_FOLDER} can be read; start anew")
    return None


def _states(folder: Path) -> list[Path]:
    return sorted((folder / STATE_FOLDER).glob("step_*.pt"))
