"""Recipes as files: which there are, what their text holds, single values changed."""

from __future__ import annotations

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from vitrim.config import closest, read_text, require, shown
from vitrim.errors import ConfigError

MOST_BYTES = 1 << 17
"""Of a recipe's file; ours have 3 kB."""
MOST_DOTS = 64
"""In one line of it: a dotted key takes memory by the square of its parts."""


def packaged() -> dict[str, Any]:
    """The recipes that come with vitrim, by name."""
    folder = resources.files("vitrim") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def read_toml(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What the recipe ``source``, packaged or a file, holds."""
    known, path = packaged(), Path(source)
    file = known.get(os.fspath(source), path)
    if file is path and not path.is_file():
        raise ConfigError(
            f"no recipe {os.fspath(source)!r}{closest(os.fspath(source), known)}; give a TOML "
            f"file or one of: {', '.join(sorted(known))}"
        )
    text = read_text(path, most_bytes=MOST_BYTES) if file is path else file.read_text("utf-8")
    try:
        return _parse(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {os.fspath(source)} is no TOML file: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    """What the TOML ``text`` holds; :class:`ValueError` and RecursionError where it is none."""
    most = max(line.count(".") for line in text.split("\n"))
    require(most <= MOST_DOTS, f"a line has {most} dots; expected {MOST_DOTS} or fewer")
    return tomllib.loads(text)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put ``"table.key=value"`` into ``data``; the value is TOML, as in :func:`load_recipe`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    require(
        bool(equals) and all(keys),
        f"{override!r} is no override; write table.key=value, as in optim.lr=1e-4",
    )
    table = data
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        require(isinstance(table, dict), f"{override!r} goes into {key!r}, which is no table")
    table[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return _parse(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown(text)} is no value: {error}") from error
