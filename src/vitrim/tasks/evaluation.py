"""Detectors and segmenters beside their dense ones: what all of them are measured by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vitrim.budget import Spread
from vitrim.costs import total_macs
from vitrim.tasks.model import TaskModel
from vitrim.tools.evaluate import StageKept, check_scores

DENSE = "dense"
"""What the dense model is called among those that are measured."""


@dataclass(frozen=True)
class TaskEvaluation:
    """How good a model is, and what its backbone costs."""

    images: int
    scores: Mapping[str, float | None]
    """In percent, by name, the main one first; None where the data cannot say."""
    macs: Spread
    """Per image, of the backbone without its classifier."""
    dense_macs: Spread
    """The same with nothing dropped."""
    stages: tuple[StageKept, ...] = ()
    """How many positions each stage computes fully."""
    differences: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """By a score's name, its difference from the dense model's, in points, and the ends of the 95 %
    interval over images drawn anew; empty where there is no dense model, or no interval was asked
    for."""
    unreadable: tuple[str, ...] = ()
    """Images that could not be read and were left out."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        plain = asdict(self) | {"scores": dict(self.scores), "differences": dict(self.differences)}
        return plain | {"num_unreadable": len(self.unreadable)}


@dataclass
class Costs:
    """What a model's backbone computes, image by image."""

    model: TaskModel
    macs: list[float] = field(default_factory=list)
    dense_macs: list[float] = field(default_factory=list)
    kept: list[tuple[int, ...]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    _known: dict[Any, tuple[float, tuple[int, ...]]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, image: Any) -> None:
        """Note a batch of one image, as the model itself takes it. Kept positions are of the image
        alone; what is computed of the map that it was padded to is counted too.
        """
        pixels, sizes = self.model.prepared(image)
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        family, sparse = self.model.family, self.model.sparse
        grid = family.grid(size)
        dense = sum(step.macs for step in family.dense_steps(grid) if step.part != "head")
        self.dense_macs.append(float(dense))
        if sparse is None:
            self.macs.append(float(dense))
            return
        own = size if sizes is None else tuple(sizes[0])
        if (size, own) not in self._known or sparse.features_macs(size) is None:
            trace = sparse.trace(pixels, sizes)
            check_scores(trace)
            counts = tuple(int(stage.counts[0]) for stage in trace.stages)
            self.places = [(s.block, s.grid[0] * s.grid[1]) for s in trace.stages]
            steps = sparse.method.steps(family.with_maps(grid), grid, counts)
            macs = float(total_macs(step for step in steps if step.part != "head"))
            self._known[size, own] = macs, counts
        macs, counts = self._known[size, own]
        self.macs.append(macs)
        self.kept.append(counts)

    @property
    def stages(self) -> tuple[StageKept, ...]:
        """Positions that are computed fully, over all images; of the latest image's size."""
        if not self.kept:
            return ()
        columns = torch.tensor(self.kept).unbind(1)
        return tuple(
            StageKept(block, positions, Spread.of(column))
            for (block, positions), column in zip(self.places, columns, strict=True)
        )

    def spreads(self) -> dict[str, Any]:
        """The fields of a :class:`TaskEvaluation`."""
        return {
            "macs": Spread.of(torch.tensor(self.macs, dtype=torch.float64)),
            "dense_macs": Spread.of(torch.tensor(self.dense_macs, dtype=torch.float64)),
            "stages": self.stages,
        }


def dense_twin(model: Any) -> Any:
    """The same model, of the same weights, with its backbone run dense."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.backbone = model.timm_model
    return twin


def at_settings(
    model: TaskModel, ratios: Sequence[float], budgets: Sequence[float]
) -> list[TaskModel]:
    """Copies of a sparse model at each keep ratio, or each share of the dense MACs; the model
    itself, where none is given.

    Raises:
        ConfigError: the method has no such setting, or it is out of reach.
    """
    found = []
    for ratio in ratios:
        found.append(copy.deepcopy(model))
        found[-1].backbone.set_keep_ratio(ratio)
    for budget in budgets:
        found.append(copy.deepcopy(model))
        found[-1].backbone.set_budget(budget)
    return found or [model]
