"""Schedules: where patch tokens become fewer and how many go on, as plain data for any method.

A schedule is what ``vitrim schedule`` finds for a budget (``budgets/solve.py``); here it is stored,
and turned into the settings of a method: ``load("schedule.json").apply(DynamicViTConfig())``.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from vitrim.checkpoint import write_atomic
from vitrim.config import from_plain, normalise, read_json, require, to_plain
from vitrim.errors import ConfigError
from vitrim.latency.table import LONGEST, MOST_TOKENS
from vitrim.layers.stages import check_stages
from vitrim.methods import METHODS, method_of_config
from vitrim.methods.records import Plan

FORMAT = "vitrim schedule"
_MOST_MACS = 10
"""Times the dense model's; a schedule that drops nothing pays its selectors besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(Plan):
    """A plan, what it was found for, and how."""

    milliseconds: float | None = None
    """Predicted, per batch of the table; None without a table."""
    asked: dict[str, Any] = field(default_factory=dict)
    """The budget: ``milliseconds`` or ``macs``."""
    method: str = ""
    """The method whose selectors are in the predictions."""
    procedure: Literal["", "exact", "progressive"] = ""
    """How it was found."""
    signal: str = ""
    """What ``loss`` was measured by."""
    loss: float | None = None
    """Expected loss of quality by the signal; for comparing schedules of one signal."""
    table: dict[str, Any] = field(default_factory=dict)
    """The stamp of the latency table: device, runtime, batch size, model."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        check_stages(self.stages)
        require(
            len(self.counts) == len(self.stages),
            f"counts has {len(self.counts)} numbers for {len(self.stages)} stages",
        )
        require(
            len(self.actions) in (0, len(self.stages)),
            f"actions has {len(self.actions)} entries for {len(self.stages)} stages",
        )
        falling = all(before >= after for before, after in pairwise((self.patches, *self.counts)))
        require(
            falling and self.counts[-1] >= 1,
            f"counts are {self.counts} of {self.patches} patches; expected 1 or more, none above "
            "the one before it",
        )
        require(
            self.patches <= MOST_TOKENS,
            f"patches is {self.patches}; expected {MOST_TOKENS:,} or fewer",
        )
        for name, most in {"milliseconds": LONGEST, "macs": _MOST_MACS}.items():
            value = getattr(self, name)
            good = value is None or 0 < value <= most
            require(good, f"{name} is {value}; expected more than 0, and {most:,} or less")
        require(
            self.loss is None or math.isfinite(self.loss),
            f"loss is {self.loss}; expected a finite number",
        )

    def apply(self, config: Any) -> Any:
        """``config`` with the schedule's stages and counts in place of its own.

        Raises:
            ConfigError: the method cannot follow the schedule; it says why.
        """
        return self.fitted(config)[0]

    def fitted(self, config: Any) -> tuple[Any, str | None]:
        """What :meth:`apply` returns, and what the user should know of it: None if it is exact."""
        method = method_of_config(config)
        able = [each.config_class.__name__ for each in METHODS.values() if each.follows_schedules]
        require(
            method.follows_schedules,
            f"{method.name} cannot follow a schedule: it does not drop patch tokens of a plain "
            f"vision transformer. {', '.join(able)} can",
        )
        require(
            set(self.actions) <= set(method.actions),
            f"the schedule merges tokens, which {method.name} cannot; find one for it: vitrim "
            f"schedule --method {method.name}",
        )
        return method.follow(config, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        content = {"format": FORMAT} | to_plain(self)
        write_atomic(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def load(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule.

    Raises:
        ConfigError: the file is absent, damaged, no schedule, or holds an impossible one.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is no schedule; vitrim schedule writes one")
    try:
        return from_plain(Schedule, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
