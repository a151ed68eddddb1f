"""What a demo measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vitrim.model import SparseModel
from vitrim.tools.benchmark import Row
from vitrim.tools.evaluate import Accuracy, Evaluation

if TYPE_CHECKING:
    from vitrim.train.recipe import Recipe

BATCHES = (64, 1)
"""Images per call that are timed; the first is the summary's."""
BUDGETS = (0.55, 0.7, 0.85)
"""Shares of the dense model's MACs; the first is the summary's."""
DENSE = "dense"

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Point:
    """One method at one cost."""

    method: str
    budget: float | None
    """None where the method's cost is fixed."""
    sparse: SparseModel
    evaluation: Evaluation
    """Paired with the dense model as it was before."""

    @property
    def name(self) -> str:
        """Of the candidate in the benchmark."""
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    @property
    def is_main(self) -> bool:
        """Whether the summary speaks of it."""
        return self.budget in (None, BUDGETS[0])


@dataclass(frozen=True)
class Outcome:
    """What a demo measured."""

    recipes: dict[str, Recipe]
    """By method."""
    train_seconds: dict[str, float]
    """The same."""
    points: list[Point]
    dense: Accuracy
    rows: list[Row]
    batches: Batches
    """The test images."""

    def main(self, method: str) -> Point:
        """The method's point that the summary speaks of."""
        return next(point for point in self.points if point.method == method and point.is_main)

    def row(self, name: str, batch: int) -> Row:
        """The benchmark of a candidate at a batch size."""
        return next(row for row in self.rows if (row.name, row.batch) == (name, batch))
