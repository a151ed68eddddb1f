"""What every task offers to the engine.

A task says what a model is for: which model a recipe means, where its batches come from, what is
lost on them, how good the model is and what is written of it. The engine (``train/engine.py``) does
the rest for all of them: steps, rates, averages, logs, states, devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from vitrim.methods.base import Method


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data a process reads."""

    rank: int = 0
    """Of this process."""
    num_processes: int = 1
    """In all."""
    pin_memory: bool = False
    """Read into memory that is copied to a GPU faster."""


ALONE = Share()


@dataclass(frozen=True, slots=True)
class Score:
    """How good a model was found to be."""

    main: float
    """In percent, the more the better: the result of a run is what has most of it."""
    found: dict[str, float]
    """By the names of the log, ``val_...``."""
    images: int
    """On how many images, of all processes together."""
    more: dict[str, Any] = field(default_factory=dict)
    """What else the record of the result says."""


class TrainBatches(Protocol):
    """This process's batches of any epoch, from any batch on."""

    num_samples: int
    """In an epoch, of all processes together."""
    batches_per_epoch: int
    """Of each process."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Any, ...]]:
        """Batches of ``epoch`` from number ``first`` on: what :meth:`Task.forward` takes. What is
        random about a batch is a function of the run's seed and of its place.
        """


class Task(nn.Module, ABC):
    """What is trained: a model and its losses as one module, so that DDP sees a single forward."""

    name: ClassVar[str]
    model: Any
    """The module that is trained, averaged and saved."""
    latency: Any = None
    """A budget of milliseconds to train for (:class:`vitrim.train.latency.LatencyBudget`)."""
    data_config: dict[str, Any]
    """How images are prepared; set by :meth:`open_data`."""

    @classmethod
    @abstractmethod
    def create(cls, recipe: Any) -> Task:
        """The task of a recipe: its model with the weights to start from, on the CPU.

        Raises:
            ConfigError: the model's name, its arguments or a method's fields are wrong.
            CheckpointError: the weights are damaged or do not fit.
        """

    @property
    def method(self) -> Method | None:
        """What makes the model sparse; it is told epochs and steps."""
        return getattr(self.model, "method", None)

    @abstractmethod
    def open_data(self, recipe: Any, share: Share) -> tuple[TrainBatches, Any]:
        """This process's training batches, and what :meth:`evaluate` reads; None where the recipe
        names no validation data.

        Raises:
            InputError: the data cannot be used.
        """

    @abstractmethod
    def forward(self, *batch: Any) -> dict[str, Tensor]:
        """Loss terms by name, and ``"total"``.

        Args:
            batch: what :class:`TrainBatches` gives, on the model's device, and a seed: what is
                drawn beside torch's own state (which is seeded already) is drawn by it.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, validation: Any, accelerator: Any) -> Score:
        """How good ``model`` is, the trained one or its average: by the inference forward, over all
        processes, each of which has its share of ``validation``.

        Raises:
            TrainingError: an answer is not finite.
            InputError: there is no image.
        """

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise :class:`InputError` unless the weights of ``model``, and its answers to noise, are
        finite.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, recipe: Any, metrics: dict[str, Any]) -> None:
        """Write ``model`` into the run's folder, under names that ``train/state.py`` knows."""


def on_device(value: Any, device: Any) -> Any:
    """A batch, or a part of it, on ``device``: tensors in lists, tuples and dictionaries are moved,
    anything else stays as it is.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    return value
