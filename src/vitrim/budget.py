"""Budgets: a mean cost as a share of the dense model's, and the dial's value that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from vitrim.config import require
from vitrim.errors import ConfigError
from vitrim.methods.records import Dial

TOLERANCE = 0.01
"""A mean cost this near to its budget, relative to it, meets it."""

_FINEST = 1e-7
_FORMULA_TRIES = 64


@dataclass(frozen=True)
class Spread:
    """Mean, population standard deviation, and range of a quantity over the images."""

    mean: float
    std: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        values = values.double()
        numbers = (values.mean(), values.std(correction=0), values.min(), values.max())
        return cls(*(float(number) for number in numbers))


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A budget, the dial's value that meets it, and what the model was found to cost there."""

    budget: float
    """Share of the dense model's MACs that was asked for."""
    dial: str
    """Name of the method's dial."""
    value: float
    """Of the dial."""
    fraction: float
    """Share of the dense model's MACs that was reached, mean over the images."""
    macs: Spread
    """Per image."""
    images: int
    """How many were looked at; 0 where a formula gives the cost."""
    passes: int
    """How often they were looked at for this budget."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        require(bool(self.dial), "dial is empty; expected the name of a method's dial")
        spread = (self.macs.min, self.macs.mean, self.macs.max, self.macs.std)
        numbers = (self.value, self.fraction, *spread)
        require(
            all(math.isfinite(number) for number in numbers),
            f"value, fraction and macs are {numbers}; expected finite numbers",
        )
        slack = 1e-6 * abs(self.macs.mean)
        require(
            0 < spread[0] <= spread[1] + slack <= spread[2] + 2 * slack and spread[3] >= 0,
            f"macs are {self.macs}; expected 0 < min <= mean <= max, and std not below 0",
        )
        require(self.fraction > 0, f"fraction is {self.fraction}; expected more than 0")
        require(
            self.images >= 0 and self.passes >= 0,
            f"images and passes are {self.images} and {self.passes}; expected 0 or more",
        )


def check_budget(macs: float) -> None:
    """Raise :class:`ConfigError` unless ``macs`` is a share of the dense model's MACs."""
    require(
        0 < macs <= 1,
        f"the budget is {macs}; expected a share of the dense model's MACs, more than 0 and at "
        "most 1, such as 0.6",
    )


class Curve:
    """A method's cost over its dial, known only where a search had to look.

    Positions run from 0, the cheapest, to 1, the dearest.

    Args:
        dial: of the method.
        cost: share of the dense MACs at a value of the dial, or another cost.
        unit: of the cost, in words.
    """

    def __init__(
        self, dial: Dial, cost: Callable[[float], float], unit: str = "of the dense MACs"
    ) -> None:
        self.dial, self.unit = dial, unit
        self.known: dict[float, float] = {}
        self._cost = cost

    def at(self, position: float) -> float:
        """The cost at ``position``."""
        if position not in self.known:
            self.known[position] = self._cost(self.dial.at(position))
        return self.known[position]

    def search(
        self,
        budget: float,
        *,
        tolerance: float,
        near_enough: float,
        tries: int,
        guess: float | None = None,
    ) -> float:
        """The position whose cost is nearest to ``budget``.

        The bracket shrinks by interpolation, and by halving wherever that did not halve it.

        Args:
            budget: share of the dense MACs.
            tolerance: relative difference that still meets the budget.
            near_enough: relative difference that ends the search.
            tries: places to look at besides the ends.
            guess: the first of them, if it lies between the ends.

        Raises:
            ConfigError: the budget is out of reach, or between two steps of the cost.
        """
        floor, ceiling = self.at(0.0), self.at(1.0)
        if not floor * (1 - tolerance) <= budget <= ceiling * (1 + tolerance):
            raise ConfigError(
                f"a budget of {budget:g} {self.unit} is out of reach: turning "
                f"{self.dial.name} from {self.dial.cheapest:g} to {self.dial.dearest:g} gives "
                f"{floor:.3f} to {ceiling:.3f}"
            )
        if budget <= floor or budget >= ceiling:
            return 0.0 if budget <= floor else 1.0
        halve = False
        for _ in range(tries):
            if self._miss(self.nearest(budget), budget) <= near_enough:
                break
            low, high = self._bracket(budget)
            if high - low < _FINEST:
                break
            if guess is not None and low < guess < high:
                self.at(guess)
                guess = None
                continue
            share = (budget - self.at(low)) / (self.at(high) - self.at(low))
            share = 0.5 if halve else min(max(share, 0.02), 0.98)
            self.at(low + share * (high - low))
            left, right = self._bracket(budget)
            halve = not halve and right - left > (high - low) / 2
        nearest = self.nearest(budget)
        if self._miss(nearest, budget) > tolerance:
            low, high = self._bracket(budget)
            raise ConfigError(
                f"the cost moves in steps that pass over a budget of {budget:g}; the nearest that "
                f"{self.dial.name} reaches are {self.at(low):.4f} and {self.at(high):.4f} "
                f"{self.unit}. Ask for one of them, or allow a tolerance of more than {tolerance:g}"
            )
        return nearest

    def nearest(self, budget: float) -> float:
        """The known position whose cost is nearest to ``budget``."""
        return min(self.known, key=lambda position: self._miss(position, budget))

    def _miss(self, position: float, budget: float) -> float:
        return abs(self.known[position] / budget - 1)

    def _bracket(self, budget: float) -> tuple[float, float]:
        """Neighbouring known positions, below and above a budget between the ends' costs."""
        high = min(position for position, cost in self.known.items() if cost > budget)
        return max(position for position in self.known if position < high), high


def value_by_formula(
    dial: Dial, cost: Callable[[float], float], budget: float, tolerance: float
) -> float:
    """The dial's value that meets ``budget`` best, where ``cost`` needs no image.

    Raises:
        ConfigError: no value meets it within ``tolerance``.
    """
    curve = Curve(dial, cost)
    position = curve.search(
        budget, tolerance=tolerance, near_enough=tolerance / 100, tries=_FORMULA_TRIES
    )
    return dial.at(position)


def value_by_record(record: Sequence[Calibration], dial: Dial, budget: float) -> float:
    """The dial's value for ``budget`` by what calibration recorded, or between two records.

    Raises:
        ConfigError: there is no record of this dial, or none on both sides of the budget.
    """
    points = sorted((p for p in record if p.dial == dial.name), key=lambda point: point.budget)
    for point in points:
        if math.isclose(point.budget, budget):
            return point.value
    for below, above in pairwise(points):
        if below.budget < budget < above.budget:
            gap = max(above.fraction - below.fraction, _FINEST)
            share = (budget - below.fraction) / gap
            start, end = dial.position(below.value), dial.position(above.value)
            return dial.at(start + min(max(share, 0.0), 1.0) * (end - start))
    recorded = ", ".join(f"{point.budget:g}" for point in points) or "none"
    raise ConfigError(
        f"the cost depends on the images, and no calibration reaches a budget of {budget:g} "
        f"(recorded for {dial.name}: {recorded}); "
        f"call vitrim.calibrate(sparse, loader, macs={budget:g}), "
        "or vitrim eval, which calibrates where it must"
    )
