"""Schedules: where patch tokens are dropped and how many go on, as plain data for any method.

A schedule is what ``vitrim schedule`` finds for a budget (``budgets/solve.py``); here it is stored,
and turned into the settings of a method: ``load("schedule.json").apply(DynamicViTConfig())``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from vitrim.checkpoint import write_atomic
from vitrim.config import from_plain, normalise, require, to_plain
from vitrim.errors import ConfigError
from vitrim.layers.stages import check_stages
from vitrim.methods import method_of_config
from vitrim.methods.asvit import ASViTConfig
from vitrim.methods.dynamicvit import DynamicViTConfig
from vitrim.methods.sait import SaiTConfig
from vitrim.methods.spvit import SPViTConfig
from vitrim.methods.stvit import STViTConfig

FORMAT = "vitrim schedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Stages of a plain vision transformer, and how many patches go on from each."""

    stages: tuple[int, ...]
    """Blocks before which patches are dropped."""
    counts: tuple[int, ...]
    """Patches that go on from each stage; a mean, where every image decides."""
    patches: int
    """Of the whole image."""
    milliseconds: float | None = None
    """Predicted, per batch of the table; None without a table."""
    macs: float | None = None
    """Predicted, as a share of the dense model's MACs."""
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
        falling = all(before >= after for before, after in pairwise((self.patches, *self.counts)))
        require(
            falling and self.counts[-1] >= 1,
            f"counts are {self.counts} of {self.patches} patches; expected 1 or more, none above "
            "the one before it",
        )
        for name in ("milliseconds", "macs"):
            value = getattr(self, name)
            good = value is None or 0 < value < math.inf
            require(good, f"{name} is {value}; expected more than 0")
        require(self.version == 1, f"version is {self.version}; this vitrim reads version 1")

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """The kept share of the original patches at each stage; rounded down, it is ``counts``."""
        return tuple(_ratio(count, self.patches) for count in self.counts)

    def apply(self, config: Any) -> Any:
        """``config`` with the schedule's stages and counts in place of its own.

        Raises:
            ConfigError: the method cannot follow the schedule; it says why.
        """
        return self.fitted(config)[0]

    def fitted(self, config: Any) -> tuple[Any, str | None]:
        """What :meth:`apply` returns, and what the user should know of it: None if it is exact."""
        method = method_of_config(config).name
        if type(config) not in _FITS:
            raise ConfigError(
                f"{method} cannot follow a schedule: it does not drop patch tokens of a plain "
                f"vision transformer. {', '.join(kind.__name__ for kind in _FITS)} can"
            )
        return _FITS[type(config)](self, config)

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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a schedule: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is no schedule; vitrim schedule writes one")
    needed = ("stages", "counts", "patches")
    missing = [name for name in needed if name not in content]
    require(not missing, f"{path} is damaged: it lacks {', '.join(missing)}")
    try:
        return from_plain(Schedule, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _ratio(count: int, num_patches: int) -> float:
    """The smallest share that rounds down to ``count`` patches in floating point."""
    ratio = count / num_patches
    return ratio if int(num_patches * ratio) == count else math.nextafter(ratio, 2.0)


def _fit_ratios(schedule: Schedule, config: Any) -> tuple[Any, str | None]:
    fitted = replace(config, stages=schedule.stages, keep_ratio=schedule.keep_ratios)
    decides = getattr(config, "threshold", None) is not None
    if isinstance(config, SPViTConfig):
        decides = config.inference != "top_k"
    remark = "training aims at these shares; at inference every image decides" if decides else None
    return fitted, remark


def _fit_thresholds(schedule: Schedule, config: ASViTConfig) -> tuple[ASViTConfig, str | None]:
    changes: dict[str, Any] = {"stages": schedule.stages}
    if isinstance(config.thresholds, tuple) and len(config.thresholds) != len(schedule.stages):
        changes["thresholds"] = None
    if schedule.macs is not None:
        changes["budget"] = min(schedule.macs, 1.0)
    remark = "the thresholds that keep these shares on average are found on images"
    return replace(config, **changes), remark


def _fit_density(schedule: Schedule, config: SaiTConfig) -> tuple[SaiTConfig, str | None]:
    _require_one_stage(schedule, "sait drops tokens once")
    return replace(
        config,
        prune_after=schedule.stages[0],
        selector="density",
        density=schedule.counts[0] / schedule.patches,
    ), None


def _fit_semantic(schedule: Schedule, config: STViTConfig) -> tuple[STViTConfig, str | None]:
    _require_one_stage(schedule, "stvit replaces the patches once")
    stage, count = schedule.stages[0], schedule.counts[0]
    side = math.isqrt(count)
    shapes = [(side, side), (side, side + 1), (side + 1, side + 1)]
    shape = min(shapes, key=lambda shape: abs(math.prod(shape) - count))
    base = max(0, stage - config.generation_layers)
    remark = (
        f"the nearest that stvit can: {shape[0]} x {shape[1]} semantic tokens in place of "
        f"{count} patches, made by blocks {base} to {base + config.generation_layers - 1}"
    )
    return replace(config, base_layers=base, semantic_tokens=shape), remark


def _require_one_stage(schedule: Schedule, why: str) -> None:
    require(
        len(schedule.stages) == 1,
        f"{why}, and the schedule has {len(schedule.stages)} stages; solve it with one "
        "(vitrim schedule --stages 1)",
    )


_FITS: dict[type, Callable[[Schedule, Any], tuple[Any, str | None]]] = {
    DynamicViTConfig: _fit_ratios,
    SPViTConfig: _fit_ratios,
    ASViTConfig: _fit_thresholds,
    SaiTConfig: _fit_density,
    STViTConfig: _fit_semantic,
}
