"""Training to a latency: a budget of milliseconds, as a table predicts them.

Three parts. At the start, what a method fixes by its config is set from the table
(:func:`start_config`). In each step, methods whose counts are learned get a loss term
(:meth:`LatencyBudget.term`): the table, interpolated, at the counts of the batch's images (at their
mean, where inference keeps one count), through which the gradients of the decisions flow. Whenever
a result is validated and saved, the dial is turned on training images until the prediction meets
the budget (:meth:`LatencyBudget.met`), so that its accuracy is measured as it is meant to run.

SPViT (arXiv 2112.13890) trains against a latency table of its device; there is no code of it, and
this form is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vitrim.budgets.milliseconds import as_it_is, batches_of, check_milliseconds, meet
from vitrim.config import require
from vitrim.latency.table import LatencyTable, predict
from vitrim.methods.records import TrainingOutput
from vitrim.model import SparseModel
from vitrim.tasks.labelled import dataset_options
from vitrim.train.data import eval_loader
from vitrim.train.recipe import BudgetRecipe, Recipe


class LatencyBudget:
    """The budget of a recipe.

    Args:
        recipe: of the run; it has a budget.
        sparse: the model that is trained.

    Raises:
        ConfigError: the table is damaged, or of another model; the budget is not under the dense
            model's latency.
    """

    def __init__(self, recipe: Recipe, sparse: SparseModel) -> None:
        self.recipe, self.weight = recipe, recipe.budget.weight
        self.milliseconds, self.table = read_budget(recipe.budget, sparse)

    def term(self, sparse: SparseModel, output: TrainingOutput, images: Tensor) -> Tensor | None:
        """The squared distance of the predicted latency from the budget, relative to it; None where
        the batch's counts do not depend on what is learned.
        """
        counts = output.kept_counts()
        if not any(count_B.requires_grad for count_B in counts):
            return None
        grid = sparse.family.grid((images.shape[-2], images.shape[-1]))
        if sparse.method.counts(sparse.family, grid) is not None:  # inference keeps the mean of all
            counts = [count_B.mean() for count_B in counts]
        predicted = predict(self.table, sparse.method, sparse.family, grid, counts)
        loss: Tensor = (predicted / self.milliseconds - 1).square()
        return loss

    @contextmanager
    def met(self, sparse: SparseModel, data_config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within this context the model's dial is where the prediction meets the budget, or nearest
        to it; yields what was found, for the metrics of the result. Counts that no image changes
        stay as they were trained.
        """
        restore = sparse.snapshot()
        try:
            if sparse.macs() is None:
                batches = self._images(data_config)
                found = meet(sparse, self.table, self.milliseconds, batches, strict=False)
            else:
                found = as_it_is(sparse, self.table, self.milliseconds)
            yield found.plain()
        finally:
            restore()

    def _images(self, data_config: dict[str, Any]) -> list[Tensor]:
        """Training images, prepared as for evaluation."""
        data = self.recipe.data
        options = dataset_options(data, data_config, None) | {"labelled": False}
        loader = eval_loader(
            data.train,
            data_config,
            min(data.batch_size, 64),
            data.workers,
            self.recipe.budget.images,
            split=data.train_split,
            **options,
        )
        return batches_of(loader)


def read_budget(recipe: BudgetRecipe, sparse: SparseModel) -> tuple[float, LatencyTable]:
    """The budget in milliseconds and its table, checked against the model.

    The table may be of another machine than the one that trains.
    """
    milliseconds, path = recipe.milliseconds, recipe.table
    assert milliseconds is not None
    assert path is not None
    table = LatencyTable.load(path)
    table.check(sparse.family, device=None)
    check_milliseconds(milliseconds, table, sparse.family, sparse.family.grid())
    return milliseconds, table


def start_config(sparse: SparseModel, budget: BudgetRecipe) -> Any:
    """The method's config with what it fixes set to the budget: of those that it may start from
    (``Method.starts``) the one that is predicted nearest.

    Args:
        sparse: a model as the recipe has it.
        budget: of the recipe.

    Raises:
        ConfigError: the budget is under the floor of what may be changed, or not under the dense
            model's latency; the table is of another model.
    """
    milliseconds, table = read_budget(budget, sparse)
    method, config, family = sparse.method, sparse.config, sparse.family
    grid = family.grid()
    choices = method.starts(family, grid)
    if len(choices) == 1:
        return choices[0]

    try:
        costs = []
        for method.config in choices:
            counts = method.target_counts(family, grid)
            costs.append(float(predict(table, method, family, grid, counts)))
    finally:
        method.config = config
    floor = min(costs)
    require(
        milliseconds >= floor,
        f"a budget of {milliseconds:g} ms is under the floor: {method.name} as the recipe sets it "
        f"takes {floor:.4g} ms by prediction at its cheapest. Ask for more, drop tokens earlier "
        "(method.stages, method.schedule), or take a smaller model",
    )
    return min(zip(costs, choices, strict=True), key=lambda pair: abs(pair[0] - milliseconds))[1]
