"""What the ``[task]`` table of a recipe may say, by task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vitrim.config import closest, from_plain
from vitrim.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Images with one class each: there is nothing to set."""


CONFIGS: dict[str, type] = {"classification": ClassificationConfig}
"""Config class by name of the task."""


def task_config(name: str, fields: dict[str, Any]) -> Any:
    """The config of the task called ``name``.

    Raises:
        ConfigError: there is no such task, or a field is unknown or not valid.
    """
    if name not in CONFIGS:
        raise ConfigError(
            f"task.name is {name!r}{closest(name, CONFIGS)}; use one of {', '.join(CONFIGS)}"
        )
    return from_plain(CONFIGS[name], fields, "task")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecipe:
    """What a model is trained for. In TOML the task's own fields stand beside ``name``."""

    name: str = "classification"
    """Name of the task."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the task's config."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Any:
        """The task's config object."""
        return task_config(self.name, self.config)
