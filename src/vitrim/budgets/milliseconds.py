"""Sets a sparse model to a budget of milliseconds, as a latency table predicts them.

No training: a schedule's counts become the method's settings (:func:`follow`), and its dial is
turned until the predicted mean latency is what was asked (:func:`meet`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budget import TOLERANCE, Calibration, Curve, Spread
from vitrim.budgets.effects import measure_effects
from vitrim.budgets.schedule import Schedule
from vitrim.budgets.solve import Costs, check_reach, find_schedule
from vitrim.config import require, to_plain
from vitrim.errors import ConfigError, InputError
from vitrim.families import ViT, family_of
from vitrim.latency.table import LatencyTable, predict
from vitrim.methods import method_of_config
from vitrim.model import SparseModel, sparsify
from vitrim.modes import evaluating
from vitrim.tokens.plain import Grid

EFFECT_IMAGES = 64
"""Images on which the effects of dropping are measured, if not said otherwise."""

_TRIES = 40
_COARSE = 0.05
"""Relative difference that is allowed where the cost moves in steps."""


@dataclass(frozen=True)
class Latency:
    """What was asked of a model, and what the table says of it; in milliseconds per batch."""

    asked: float
    predicted: float
    """Mean over the images, at the dial's value."""
    dense: float
    """Of the backbone alone."""
    dial: str
    """The method's; empty where it was not turned."""
    value: float
    """Of the dial; 0 where there is none."""
    images: int
    """How many were looked at; 0 where every image keeps the same number of tokens."""
    table: dict[str, Any]
    """The stamp of the table."""

    @property
    def is_met(self) -> bool:
        """Whether the prediction is within 5 % of what was asked."""
        return abs(self.predicted / self.asked - 1) <= _COARSE

    def plain(self) -> dict[str, Any]:
        """For the metrics of a checkpoint."""
        return to_plain(self) | {"is_met": self.is_met}


def check_table(
    table: LatencyTable, family: Any, *, runtime: str | None = None, elsewhere: bool = False
) -> None:
    """Raise :class:`ConfigError` unless the table is for the backbone, this machine and a runtime.

    Args:
        table: that predicts.
        family: runs the backbone.
        runtime: wanted; None takes the table's.
        elsewhere: the model is for the table's device, which need not be this one.
    """
    on_cuda = table.stamp.get("device") == "cuda" and torch.cuda.is_available()
    device = None if elsewhere else "cuda" if on_cuda else "cpu"
    table.check(family, runtime=runtime, device=device)


def check_milliseconds(milliseconds: float, table: LatencyTable, family: Any, grid: Grid) -> None:
    """Raise :class:`ConfigError` unless a budget is above 0 and under the dense model's latency."""
    require(milliseconds > 0, f"the budget is {milliseconds} ms; expected more than 0")
    dense = float(predict(table, None, family, grid))
    require(
        milliseconds < dense,
        f"a budget of {milliseconds:g} ms asks for nothing: the dense model takes {dense:.4g} ms "
        "by prediction",
    )


def as_it_is(sparse: SparseModel, table: LatencyTable, milliseconds: float) -> Latency:
    """What the table says of a model whose images all keep the same number of tokens."""
    predicted, _ = _measure(sparse, table, ())
    return _latency(sparse, table, milliseconds, predicted)


def _latency(
    sparse: SparseModel,
    table: LatencyTable,
    asked: float,
    predicted: float,
    dial: str = "",
    value: float = 0.0,
    images: int = 0,
) -> Latency:
    dense = float(predict(table, None, sparse.family, sparse.family.grid()))
    return Latency(asked, predicted, dense, dial, value, images, dict(table.stamp))


def _measure(
    sparse: SparseModel, table: LatencyTable, batches: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """Predicted mean milliseconds, and the MACs of each image (one where all are alike)."""
    family, method = sparse.family, sparse.method
    grid = family.grid()
    counts = method.counts(family, grid)
    if counts is not None:
        macs = torch.tensor([float(method.macs(family, grid, counts))])
        return float(predict(table, method, family, grid, counts)), macs
    kept, macs_of = list[list[Tensor]](), list[Tensor]()
    device = next(sparse.backbone.parameters()).device
    with evaluating(sparse):
        for images in batches:
            trace = sparse.trace(images.to(device))
            kept.append([stage.counts.double().cpu() for stage in trace.stages])
            macs_of.append(trace.macs.cpu())
    sample = [torch.cat(stage) for stage in zip(*kept, strict=True)]
    return float(predict(table, method, family, grid, sample)), torch.cat(macs_of)


def meet(
    sparse: SparseModel,
    table: LatencyTable,
    milliseconds: float,
    batches: Sequence[Tensor],
    *,
    strict: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Latency:
    """Turn the method's dial so that the predicted mean latency is ``milliseconds``.

    The model is left there, with a record of the MACs that it came to cost
    (``sparse.calibration``). If anything fails, it is left as it was.

    Args:
        sparse: any sparse model whose method has a dial.
        table: of its device, runtime and backbone.
        milliseconds: per batch of the table.
        batches: prepared images; may be empty where every image keeps the same number of tokens.
        strict: False takes the nearest that can be reached, however far.
        progress: told in words what each pass found.

    Raises:
        ConfigError: the budget is under the floor, not under the dense model's latency, or passed
            over by steps of the cost; the method's cost is fixed.
    """
    check_milliseconds(milliseconds, table, sparse.family, sparse.family.grid())
    method, restore = sparse.method, sparse.snapshot()
    dial, measured, fixed = method.dial(), dict[float, Tensor](), sparse.macs() is not None

    def cost(value: float) -> float:
        method.turn(value)
        predicted, measured[value] = _measure(sparse, table, batches)
        if progress is not None and not fixed:
            progress(f"{dial.name} {value:.6g}: {predicted:.4g} ms by prediction")
        return predicted

    curve = Curve(dial, cost, unit="ms")
    try:
        position = _search(curve, milliseconds, method.name, strict)
        value = dial.at(position)
        method.turn(value)
    except BaseException:
        restore()
        raise
    macs, dense = measured[value].double(), sparse.dense_macs()
    fraction = float(macs.mean()) / dense
    images = 0 if fixed else len(macs)
    if 0 < fraction <= 1:
        record = Calibration(
            budget=fraction,
            dial=dial.name,
            value=value,
            fraction=fraction,
            macs=Spread.of(macs),
            images=images,
            passes=0 if fixed else len(measured),
        )
        sparse.calibration = (record,)
    predicted = curve.at(position)
    return _latency(sparse, table, milliseconds, predicted, dial.name, value, images)


def _search(curve: Curve, milliseconds: float, name: str, strict: bool) -> float:
    """The position of the dial that is nearest to the budget."""
    floor, ceiling = curve.at(0.0), curve.at(1.0)
    if floor > milliseconds * (1 + TOLERANCE) and strict:
        raise ConfigError(
            f"a budget of {milliseconds:g} ms is under the floor: {name} takes {floor:.4g} ms by "
            f"prediction when its {curve.dial.name} is at its cheapest, "
            f"{curve.dial.cheapest:g}. Ask for more, drop tokens earlier, or take a smaller model"
        )
    if floor >= milliseconds or ceiling <= milliseconds:
        return 0.0 if floor >= milliseconds else 1.0
    tolerance = _COARSE if strict else float("inf")
    return curve.search(milliseconds, tolerance=tolerance, near_enough=0.002, tries=_TRIES)


def follow(
    model: nn.Module, config: Any, schedule: Schedule | None, batches: Sequence[Tensor]
) -> SparseModel:
    """A dense model made sparse by a schedule (None: by the config alone), with what the method
    finds on images for it.
    """
    if schedule is None:
        return sparsify(model, config)
    sparse = sparsify(model, schedule.apply(config))
    with evaluating(sparse):
        sparse.method.fit(sparse.family, schedule, batches)
    return sparse


def sparsify_to(
    model: nn.Module,
    config: Any,
    table: LatencyTable,
    milliseconds: float,
    batches: Sequence[Tensor],
    *,
    schedule: Schedule | None = None,
    stages: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[SparseModel, Latency, Schedule | None]:
    """Make a dense model sparse without training, for a budget of milliseconds.

    Where a plain vision transformer drops tokens is solved for
    (:func:`vitrim.budgets.solve.find_schedule`), unless the config says it (``stages``,
    ``prune_after``), the method drops none, or there are no images to measure on; then the dial is
    turned.

    Args:
        model: dense, in evaluation mode.
        config: of a method that works without training.
        table: of the model, its device and runtime.
        milliseconds: per batch of the table.
        batches: prepared images, on the model's device; may be empty where every image keeps the
            same number of tokens.
        schedule: to follow, instead of solving for one.
        stages: at most so many; None takes the method's usual number.
        progress: told in words how far it is.

    Returns:
        the sparse model, what was predicted, and the schedule that it follows, if any.
    """
    family = family_of(model)
    grid = family.grid()
    check_milliseconds(milliseconds, table, family, grid)
    method = method_of_config(config)
    able = method.follows_schedules and method.unscheduled is None
    solves = isinstance(family, ViT) and able
    if schedule is None and solves and batches and not method.says_where(config):
        costs = Costs(family, grid, config, table)
        check_reach(costs, milliseconds)
        effects = measure_effects(family, thinned(batches), config=config, progress=progress)
        schedule = find_schedule(costs, effects, milliseconds, stages=stages)
    sparse = follow(model, config, schedule, batches)
    if not is_settled(sparse, schedule):
        return sparse, meet(sparse, table, milliseconds, batches, progress=progress), schedule
    latency = as_it_is(sparse, table, milliseconds)
    require(
        latency.predicted <= milliseconds * (1 + TOLERANCE),
        f"the schedule takes {latency.predicted:.4g} ms by prediction, more than {milliseconds:g}; "
        "find one for this budget with vitrim schedule",
    )
    return sparse, latency, schedule


def is_settled(sparse: SparseModel, schedule: Schedule | None) -> bool:
    """Whether a schedule has set the counts, which the one number of a dial would all set anew."""
    may_be_several = sparse.method.most_stages != 1
    return schedule is not None and sparse.macs() is not None and may_be_several


def thinned(batches: Sequence[Tensor], most: int = EFFECT_IMAGES) -> list[Tensor]:
    """At most about so many of the images, spread evenly over them, in batches as large."""
    images = torch.cat(list(batches))[:: max(1, sum(map(len, batches)) // most)]
    return list(torch.split(images, len(batches[0])))


def batches_of(loader: Any, device: torch.device | str = "cpu") -> list[Tensor]:
    """The images of a loader of prepared batches, on ``device``.

    Raises:
        InputError: there is none.
    """
    batches = [images.to(device) for images, _ in loader if len(images)]
    if not batches:
        raise InputError("there is no readable image to look at")
    return batches
