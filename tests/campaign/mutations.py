"""Ways to spoil a file: by its structure (fields, values, nesting) and by its bytes."""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that a serialiser puts down as it is: what no Python value can be written as."""

    text: str


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**63,
    10**30,
    Raw("1" * 5000),
    0.5,
    -0.5,
    1e-320,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "12",
    "none",
    "\0\x1b[31m\x07\r\n",
    "é漢\U0001f600\u202e",
    "\ud800",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
    [0, 0],
    [1e300, -1e300],
    [math.nan] * 3,
    ["a", 1, None],
    list(range(10_000)),
    {"a": {"b": {}}},
    {"": 0},
    {str(number): number for number in range(1000)},
    Raw("[" * 500 + "]" * 500),
    Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 100_000 + "1" + "}" * 100_000),
]

Place = tuple[Any, ...]


def paths(value: Any, before: Place = ()) -> Iterator[Place]:
    """Places of everything inside ``value``; of a long list its first items."""
    yield before
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:3]
    for key, inner in items:
        yield from paths(inner, (*before, key))


def spoil(value: Any, rng: random.Random, number: int) -> Any:
    """``value`` with one to three changes; the first ``number`` s go through every field."""
    value = copy.deepcopy(value)
    places = list(paths(value))[1:]
    for turn in range(rng.choice((1, 1, 1, 2, 3))):
        place = places[number % len(places)] if turn == 0 else rng.choice(places)
        value = _spoil_at(value, place, rng)
    return value


def _spoil_at(value: Any, place: Place, rng: random.Random) -> Any:
    *before, key = place
    holder = value
    try:
        for step in before:
            holder = holder[step]
        kind = rng.random()
        if kind < 0.2:
            del holder[key]
        elif kind < 0.85:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.9 and isinstance(holder, dict):
            holder[rng.choice(("new", "", "\x1b]", "é" * 40))] = holder[key]
        elif kind < 0.95 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder[key] = [holder[key]]
    except (KeyError, IndexError, TypeError):  # another change took the place away
        pass
    return value


def as_json(value: Any) -> bytes:
    """JSON, with the numbers that Python writes into it."""
    raws: list[str] = []
    text = json.dumps(_marked(value, raws))
    return _filled(text, raws)


def as_toml(value: Any) -> bytes:
    """TOML: a key for every top-level entry, tables inline."""
    if not isinstance(value, dict):
        return as_json(value)
    raws: list[str] = []
    lines = [f"{json.dumps(str(key))} = {_toml(_marked(v, raws))}" for key, v in value.items()]
    return _filled("\n".join(lines) + "\n", raws)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items())
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _marked(value: Any, raws: list[str]) -> Any:
    if isinstance(value, Raw):
        raws.append(value.text)
        return f"@raw{len(raws) - 1}@"
    if isinstance(value, dict):
        return {key: _marked(inner, raws) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, raws) for inner in value]
    return value


def _filled(text: str, raws: list[str]) -> bytes:
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode("utf-8", "surrogatepass")


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """``content`` with bits flipped, cut, swapped, doubled, filled or made up."""
    data = bytearray(content)
    place = rng.randrange(len(data) + 1)
    other = rng.randrange(len(data) + 1)
    length = rng.choice((1, 4, 16, 256))
    changes: list[Callable[[], bytes]] = [
        lambda: _flipped(data, rng, rng.choice((1, 2, 8, 64))),
        lambda: _flipped(data, rng, 1, first=200),  # headers
        lambda: bytes(data[:place]),
        lambda: bytes(data[: rng.randrange(64)]),
        lambda: bytes(data[place:]),
        lambda: bytes(data[:place] + rng.randbytes(length) + data[place:]),
        lambda: bytes(data[:place] + rng.randbytes(length) + data[place + length :]),
        lambda: bytes(
            data[:place] + rng.choice((b"\0", b"\xff")) * length + data[place + length :]
        ),
        lambda: bytes(data[:place] + data[place + length :]),
        lambda: bytes(data[min(place, other) :] + data[: min(place, other)]),
        lambda: bytes(data) * 2,
        lambda: b"\xef\xbb\xbf" + bytes(data),
        lambda: rng.randbytes(rng.choice((0, 1, 8, 1000))),
    ]
    return rng.choice(changes)()


def _flipped(data: bytearray, rng: random.Random, times: int, first: int | None = None) -> bytes:
    for _ in range(times if data else 0):
        data[rng.randrange(min(len(data), first or len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def no_file(path: Path, number: int) -> None:
    """Put something at ``path`` that is no file, or not a readable one."""
    path.unlink()
    kinds: list[Callable[[], None]] = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("/proc/self/mem"),
    ]
    kinds[number % len(kinds)]()


NO_FILES = 7
"""Kinds of :func:`no_file`."""
