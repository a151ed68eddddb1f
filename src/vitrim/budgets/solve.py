"""Finds schedules: where patches are dropped, and how many go on, for a budget of milliseconds or
MACs, with the least loss of quality on some images (``budgets/effects.py``).

The cost of a schedule is the method's own, step by step: what its blocks take at their counts, and
its selectors. Every step depends on the counts around it alone, so the cost of a stage is what it
adds to the model without it, whatever else the schedule does before; so is its loss. Two ways:

* *exact*: among all schedules of at most so many stages, before any block but the first, with
  counts from a list and any action of the method at each stage (merging merges or drops, for the
  cost and the loss of either), the one of the least loss within the budget. A dynamic programme
  over (block, count, stages so far) that keeps every pair of cost and loss which no other beats in
  both: no rounding of costs, no heuristic. A test compares it with trying everything.
* *progressive*: SPViT's layer-to-phase procedure (arXiv 2112.13890), ours after the paper's
  description, which was known to us from notes. From the last block to the first a stage is put
  before each block and its count is lowered until the loss there reaches a tolerance; when the
  budget is met, neighbours with similar ratios become one phase, of which the first selector stays.
  Where one sweep does not suffice, the tolerance doubles and another follows.

Counts come from an even grid. Where the device's curve of a block jumps between two measured
counts, the larger ones in between are left out and the last before the jump is added: the right
side of the step.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from vitrim.budgets.effects import Effects
from vitrim.budgets.schedule import Schedule
from vitrim.config import require
from vitrim.latency.table import Curve, LatencyTable, predict
from vitrim.methods import method_of_config
from vitrim.methods.records import Action
from vitrim.tokens.plain import Grid

Procedure = Literal["exact", "progressive"]

_GRID = 36
_JUMP = 2.5
"""A curve jumps where it is this many times as steep as on the whole."""
_SIMILAR = 0.085
"""Neighbours whose kept shares differ by no more become one phase."""
_TOLERANCE = 0.002
"""Of the first sweep of the progressive procedure, as a share of the largest loss."""


@dataclass(frozen=True)
class Costs:
    """What schedules of one method cost on one backbone, in milliseconds or as a share of MACs."""

    family: Any
    grid: Grid
    config: Any
    """Of the method; its stages and counts are replaced."""
    table: LatencyTable | None = None
    """None counts MACs as a share of the dense model's."""

    @property
    def patches(self) -> int:
        """Of the whole image."""
        return math.prod(self.grid)

    @property
    def dense(self) -> float:
        """Of the backbone alone."""
        if self.table is None:
            return 1.0
        return float(predict(self.table, None, self.family, self.grid))

    def of(self, schedule: Schedule) -> float:
        """Of the method, following ``schedule``."""
        method = self._method(schedule)
        return float(self._total(method, schedule.counts))

    def added(
        self, stages: Sequence[int], counts: Sequence[int], action: Action = "drop"
    ) -> Tensor:
        """(before, after): what the last of ``stages`` adds, going from one of ``counts`` to
        another; the earlier stages all leave the count before. Meaningful where that falls.
        """
        before, after = torch.meshgrid(*[torch.tensor(counts).double()] * 2, indexing="ij")
        *earlier, _ = stages
        with_stage: Tensor = self._total(
            self._method(self._falling(stages, action)), [before] * len(earlier) + [after]
        )
        if not earlier:
            return (with_stage - self.dense).expand_as(before)
        without: Tensor = self._total(
            self._method(self._falling(earlier, action)), [before] * len(earlier)
        )
        return with_stage - without

    def macs(self, schedule: Schedule) -> float:
        """MACs of ``schedule``, as a share of the dense model's."""
        return replace(self, table=None).of(schedule)

    def _falling(self, stages: Sequence[int], action: Action) -> Schedule:
        """A schedule that drops something at each stage, so that no method skips any."""
        counts = tuple(max(1, self.patches - 1 - place) for place in range(len(stages)))
        actions = (action,) * len(counts)
        return Schedule(stages=tuple(stages), counts=counts, patches=self.patches, actions=actions)

    def _method(self, schedule: Schedule) -> Any:
        config = schedule.apply(self.config)
        with torch.device("meta"):  # only its form is looked at
            return method_of_config(config)(self.family, config)

    def _total(self, method: Any, counts: Sequence[Any]) -> Any:
        if self.table is None:
            return method.macs(self.family, self.grid, counts) / self.family.dense_macs(self.grid)
        return sum(
            self.table.milliseconds(step.part, step.tokens)
            for step in method.steps(self.family, self.grid, counts)
        )


def candidate_counts(num_patches: int, prefix: int, table: LatencyTable | None) -> tuple[int, ...]:
    """Counts that schedules choose from, rising: an even grid and the right sides of jumps."""
    least = max(1, round(0.05 * num_patches))
    even = {round(least + (num_patches - least) * i / _GRID) for i in range(_GRID)}
    if table is None:
        return tuple(sorted(even - {num_patches}))
    for start, stop in jumps(table.curve("block")):
        even = {count for count in even if not start < count + prefix < stop}
        even.add(start - prefix)
    return tuple(sorted(count for count in even if least <= count < num_patches))


def jumps(curve: Curve) -> list[tuple[int, int]]:
    """Neighbouring measured counts between which a curve rises out of all proportion, and by more
    than both measurements' spread.
    """
    spans = len(curve.tokens) - 1
    if spans < 2:
        return []
    usual = (curve.median[-1] - curve.median[0]) / (curve.tokens[-1] - curve.tokens[0])
    return [
        (curve.tokens[i], curve.tokens[i + 1])
        for i in range(spans)
        if curve.low[i + 1] > curve.high[i]
        and curve.median[i + 1] - curve.median[i]
        > _JUMP * max(usual, 0.0) * (curve.tokens[i + 1] - curve.tokens[i])
    ]


def find_schedule(
    costs: Costs,
    effects: Effects,
    budget: float,
    *,
    stages: int | None = None,
    procedure: Procedure = "exact",
    counts: Sequence[int] | None = None,
) -> Schedule:
    """The schedule of the least loss whose cost is within ``budget``.

    Args:
        costs: of the method, in the budget's unit.
        effects: loss of quality of single stages, on the same backbone.
        budget: milliseconds per batch of the table, or a share of the dense MACs without one.
        stages: at most so many; None takes the method's usual number.
        procedure: see the module.
        counts: to choose from; None takes :func:`candidate_counts`.

    Raises:
        ConfigError: as :func:`check_reach`; or the procedure is not for the method.
    """
    method = method_of_config(costs.config)
    stages = method.usual_stages if stages is None else stages
    require(stages >= 1, f"stages is {stages}; expected 1 or more")
    require(
        procedure == "exact" or method.actions == ("drop",),
        f"the {procedure} procedure drops tokens at every stage, and {method.name} chooses between "
        f"{' and '.join(method.actions)}; take the exact one",
    )
    if counts is None:
        counts = candidate_counts(costs.patches, costs.family.num_prefix, costs.table)
    check_reach(costs, budget, counts)
    stages = min(stages, method.most_stages or stages)
    solve = exact if procedure == "exact" else progressive
    found = solve(costs, effects, budget, stages, counts)
    require(
        found is not None,
        f"the progressive procedure finds no schedule of {budget:g} or less; take the exact one",
    )
    assert found is not None
    timed = costs.table is not None
    return replace(
        found,
        milliseconds=costs.of(found) if timed else None,
        macs=costs.macs(found),
        asked={"milliseconds" if timed else "macs": budget},
        method=method.name,
        procedure=procedure,
        signal=f"{effects.signal} on {effects.images} images",
        loss=effects.total(found),
        table={} if costs.table is None else dict(costs.table.stamp),
    )


def check_reach(costs: Costs, budget: float, counts: Sequence[int] | None = None) -> None:
    """Raise :class:`ConfigError` unless a schedule is needed for ``budget``, and can meet it."""
    method, unit = method_of_config(costs.config), "of the dense MACs"
    why = method.unscheduled if method.follows_schedules else "it cannot follow one"
    require(why is None, f"no schedule is solved for {method.name}: {why}")
    if costs.table is not None:
        unit = "ms"
    if counts is None:
        counts = candidate_counts(costs.patches, costs.family.num_prefix, costs.table)
    require(
        budget < costs.dense,
        f"a budget of {budget:g} {unit} asks for nothing: the dense model takes "
        f"{costs.dense:.4g} {unit}",
    )
    # Without any loss the cheapest schedule is the best; one stage gets there.
    nothing: dict[int, tuple[float, ...]] = dict.fromkeys(range(1, costs.family.depth), (0.0, 0.0))
    free = Effects("", 0, (1, costs.patches), dict.fromkeys(method.actions, nothing))
    cheapest = exact(costs, free, math.inf, 1, counts)
    floor = math.inf if cheapest is None else costs.of(cheapest)
    require(
        budget >= floor,
        f"a budget of {budget:g} {unit} is under the floor: the cheapest schedule that "
        f"{method.name} can follow here takes {floor:.4g} {unit} by prediction (dense: "
        f"{costs.dense:.4g}). Ask for more, or take a smaller model",
    )


@dataclass(frozen=True, slots=True)
class _Label:
    """A schedule in the making: cost and loss if nothing more were dropped."""

    cost: float
    loss: float
    stages: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    actions: tuple[Action, ...] = ()


def exact(
    costs: Costs, effects: Effects, budget: float, stages: int, counts: Sequence[int]
) -> Schedule | None:
    """The schedule of the least loss within the budget, of those with equal loss the cheapest;
    None where no schedule is within it.
    """
    counts, method = sorted(counts), method_of_config(costs.config)
    everything, whole = [*counts, costs.patches], len(counts)
    # By action, per place of the count before: the first place after that the stage can reach.
    reach = {
        action: [
            bisect_left(everything, method.fewest(count, costs.family.num_prefix, action))
            for count in everything
        ]
        for action in method.actions
    }
    # By (stages so far, place of the count): labels that none beats in cost and loss.
    known: dict[tuple[int, int], list[_Label]] = {(0, whole): [_Label(costs.dense, 0.0)]}
    best: _Label | None = None
    for number, block in enumerate(effects.blocks):
        reached: dict[tuple[int, int], list[_Label]] = {}
        for so_far, action in product(range(min(stages, number + 1)), method.actions):
            added = costs.added((*range(1, so_far + 1), block), everything, action).tolist()
            lost = [effects.at(block, count, action) for count in everything]
            for before in range(1, whole + 1):
                for label in known.get((so_far, before), ()):
                    for after in reversed(range(reach[action][before], before)):
                        loss = label.loss + lost[after] - lost[before]
                        if best is not None and loss > best.loss:
                            break  # fewer tokens, or more stages, can only lose more
                        reached.setdefault((so_far + 1, after), []).append(
                            _Label(
                                label.cost + added[before][after],
                                loss,
                                (*label.stages, block),
                                (*label.counts, everything[after]),
                                (*label.actions, action),
                            )
                        )
        for state, labels in reached.items():
            known[state] = _unbeaten([*known.get(state, ()), *labels])
            for label in known[state]:
                fits = label.cost <= budget
                if fits and (best is None or (label.loss, label.cost) < (best.loss, best.cost)):
                    best = label
    if best is None:
        return None
    return Schedule(
        stages=best.stages, counts=best.counts, patches=costs.patches, actions=best.actions
    )


def _unbeaten(labels: list[_Label]) -> list[_Label]:
    """The labels than which none is both as cheap and as good."""
    left: list[_Label] = []
    for label in sorted(labels, key=lambda label: (label.cost, label.loss)):
        if not left or label.loss < left[-1].loss:
            left.append(label)
    return left


def progressive(
    costs: Costs, effects: Effects, budget: float, stages: int, counts: Sequence[int]
) -> Schedule | None:
    """SPViT's layer-to-phase procedure, see the module; None where it cannot meet the budget."""
    counts, blocks = sorted(counts), effects.blocks
    everything = [*counts, costs.patches]
    place = dict.fromkeys(blocks, len(counts))  # of each block's count in everything
    largest = max(effects.at(block, counts[0]) for block in blocks)
    tolerance = _TOLERANCE * largest
    while any(place.values()):
        for block in reversed(blocks):
            least = place.get(block + 1, 0)  # later blocks see no more than earlier ones
            while place[block] > least:
                if effects.at(block, everything[place[block] - 1]) > tolerance:
                    break
                place[block] -= 1
                kept = {block: everything[place[block]] for block in blocks}
                schedule = _phases(kept, costs.patches, stages, counts)
                if costs.of(schedule) <= budget:
                    return schedule
        tolerance = 2 * tolerance or math.inf
    return None


def _phases(kept: dict[int, int], num_patches: int, most: int, counts: Sequence[int]) -> Schedule:
    """Neighbours of similar ratios as one stage before the first of them, with their mean count (or
    the next smaller of ``counts``); the likeness is widened until there are ``most`` or fewer.
    """
    similar = _SIMILAR * num_patches
    dropping = {block: count for block, count in kept.items() if count < num_patches}
    while True:
        phases: list[dict[int, int]] = []
        for block, count in dropping.items():
            if phases and next(iter(phases[-1].values())) - count <= similar:
                phases[-1][block] = count
            else:
                phases.append({block: count})
        if len(phases) <= most:
            break
        similar *= 1.25
    means = [sum(phase.values()) / len(phase) for phase in phases]
    left = [counts[max(0, bisect_right(counts, mean) - 1)] for mean in means]
    return Schedule(
        stages=tuple(next(iter(phase)) for phase in phases), counts=tuple(left), patches=num_patches
    )
