"""Configs: frozen dataclasses that check themselves, and their plain-data form.

The plain form (JSON, TOML, command line) is read strictly: an unknown key fails and names the
close matches, a value of the wrong kind fails and says what was found.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import reprlib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vitrim.errors import ConfigError, VitrimError

Config = TypeVar("Config")

MOST_BYTES = 16 * 2**20
"""Of the largest text file that is read; ours are a hundred times smaller."""
MOST_DEPTH = 32
"""Of lists and tables inside one another; ours have six."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def require(condition: bool, message: str) -> None:
    """Raise a :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_weights(config: Any, *names: str) -> None:
    """Raise :class:`ConfigError` unless every ``<name>_weight`` of ``config`` is 0 or more."""
    for name in names:
        weight = getattr(config, f"{name}_weight")
        require(weight >= 0, f"{name}_weight is {weight}; expected 0 or more")


def closest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a misspelt name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def shown(value: Any) -> str:
    """``value`` as Python writes it, cut short where a file holds more than fits a message."""
    return _SHORT.repr(value)


def read_text(
    path: Path, error: type[VitrimError] = ConfigError, most_bytes: int = MOST_BYTES
) -> str:
    """The text of the file ``path``, whatever a stranger may have put there.

    Raises:
        error: no file of its own (a folder, a pipe, a device), too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise error(f"{path} is no file")
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise error(f"{path} is larger than {most_bytes >> 10} kB; a small file is due")
        return content.decode("utf-8-sig")  # Windows begins with a mark
    except OSError as found:
        raise error(f"{path} cannot be read: {found.strerror}") from found
    except UnicodeDecodeError as found:
        raise error(f"{path} is damaged: {found}") from found


def read_json(path: Path, error: type[VitrimError] = ConfigError) -> Any:
    """What the JSON file ``path`` holds. Its numbers may be NaN or infinite, as Python reads them.

    Raises:
        error: :func:`read_text` or :func:`check_plain` refuse it, or it is not JSON.
    """
    text = read_text(path, error)
    try:
        content = json.loads(text)
        check_plain(content)
    except (ValueError, RecursionError) as found:  # not JSON, nested without end
        raise error(f"{path} is damaged: {found}") from found
    return content


def check_plain(content: Any) -> None:
    """Raise :class:`ConfigError` unless ``content`` is made of tables, lists, texts, truth values,
    None, floats and whole numbers of 64 bits, nested no deeper than :data:`MOST_DEPTH`.
    """
    level = [content]
    for _ in range(MOST_DEPTH):
        for item in level:
            if not (item is None or isinstance(item, dict | list | str | float | int)):
                raise ConfigError(f"it holds {shown(item)}, which JSON has no word for")
            if isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise ConfigError("it holds a whole number of more than 64 bits")
        tables = (item.values() for item in level if isinstance(item, dict))
        lists = (item for item in level if isinstance(item, list))
        level = [item for items in (*tables, *lists) for item in items]
    require(not level, f"it is nested deeper than {MOST_DEPTH} levels")


def to_plain(config: Any) -> dict[str, Any]:
    """A config as JSON-ready data; tuples become lists."""
    return {
        field.name: _plain_value(getattr(config, field.name))
        for field in dataclasses.fields(config)
    }


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain(value)
    if isinstance(value, tuple):
        return [_plain_value(item) for item in value]
    return value


def normalise(config: Any) -> None:
    """Check and convert every field of a dataclass by its annotation; call it first on creation.

    Lists become tuples and whole numbers floats, so ``keep_ratio=[0.9, 0.8]`` is as good as a
    tuple.

    Raises:
        ConfigError: a value is not of its field's type, or ``version`` is another than 1.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _convert(getattr(config, field.name), hints[field.name], field.name)
        object.__setattr__(config, field.name, value)
    version = getattr(config, "version", 1)
    require(version == 1, f"version is {version}; this vitrim reads version 1")


def from_plain(cls: type[Config], data: Mapping[str, Any], where: str = "") -> Config:
    """Build the dataclass ``cls`` from plain data.

    Args:
        cls: a dataclass with annotated fields; nested dataclasses take nested mappings.
        data: keys are field names.
        where: path of ``data`` in its file, for messages (``"method"`` gives ``method.stages``).

    Raises:
        ConfigError: an unknown or absent key, a value of the wrong type, or one that ``cls``
            refuses.
    """
    hints = get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise ConfigError(
                f"unknown key {shown(path)}{closest(key, known)}; known keys: "
                f"{', '.join(sorted(known))}"
            )
        values[key] = _convert(value, hints[key], path)
    missing = [field.name for field in dataclasses.fields(cls) if _is_due(field, values)]  # type: ignore[arg-type]
    require(not missing, f"{where or 'this'} lacks {', '.join(missing)}")
    return cls(**values)


def _is_due(field: Any, given: Mapping[str, Any]) -> bool:
    absent = dataclasses.MISSING
    required = field.init and field.default is absent and field.default_factory is absent
    return required and field.name not in given


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as type ``hint``: lists become tuples, whole numbers become floats."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), path)
    if origin is Literal:
        choices = get_args(hint)
        listed = ", ".join(map(repr, choices))
        require(value in choices, f"{path} is {shown(value)}; use one of {listed}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{path} is {shown(value)}; a list was expected")
        item = get_args(hint)[0]
        return tuple(_convert(entry, item, f"{path}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        require(isinstance(value, Mapping), f"{path} is {shown(value)}; a table was expected")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), f"{path} is {shown(value)}; a table was expected")
        return from_plain(hint, value, path)  # type: ignore[arg-type]
    if hint in (float, int) and not isinstance(value, bool):
        number = numbers.Real if hint is float else numbers.Integral
        if isinstance(value, number):
            try:
                require(math.isfinite(value), f"{path} is {value}; a finite number was expected")
                return hint(value)
            except OverflowError as error:
                raise ConfigError(f"{path} is too large a number") from error
    if hint is Any:
        return value
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(fits, f"{path} is {shown(value)}; a value of type {hint.__name__} was expected")
    return value


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(value, option, path)
        except ConfigError:
            continue
    expected = ", ".join(map(_in_words, options))
    raise ConfigError(f"{path} is {shown(value)}; expected one of: {expected}")


def _in_words(hint: Any) -> str:
    """What a user may give for one part of a union."""
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if origin is tuple:
        return f"a list of {_in_words(get_args(hint)[0])}"
    words = {float: "a finite number", int: "a whole number", types.NoneType: "None"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))
