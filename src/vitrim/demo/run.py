"""The whole job in a few minutes, offline: data, dense model, every method, measures, report.

Everything that the summary and the report say was measured in the same run on the same machine.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitrim.budgets.calibrate import calibrate
from vitrim.checkpoint import write_atomic
from vitrim.config import to_plain
from vitrim.demo.outcome import BATCHES, BUDGETS, DENSE, Batches, Outcome, Point
from vitrim.demo.page import report_page, summary
from vitrim.errors import ConfigError
from vitrim.methods import METHODS
from vitrim.model import SparseModel, from_pretrained
from vitrim.tools.benchmark import Row, benchmark
from vitrim.tools.evaluate import Setting, evaluate_settings

if TYPE_CHECKING:
    from vitrim.train.recipe import Recipe

_OURS = {name: kind for name, kind in METHODS.items() if kind.__module__.startswith("vitrim.")}
RECIPES = tuple(
    f"digits-{name}" for name, kind in _OURS.items() if kind.drops and "vit" in kind.families
)
MAX_SECONDS = 36.0
"""Of training per method, where neither the caller nor the recipe says."""
_CALIBRATION_IMAGES = 200

ProgressBar = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Given a label and a total, a context that yields what takes the number done so far."""


@contextmanager
def _silent(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def run_demo(
    output: Path,
    *,
    seconds: float | None = None,
    recipes: Sequence[Recipe] | None = None,
    test_images: int = 2000,
    rounds: int = 7,
    slice_seconds: float = 0.12,
    tolerance: float = 0.01,
    threads: int | None = None,
    progress: ProgressBar = _silent,
) -> list[str]:
    """Run the demo, write its folder, and return the six lines of its summary.

    The folder gets ``report.html``, ``results.json`` and ``checkpoints/``, one for each method;
    earlier ones in it are replaced.

    Args:
        output: the folder.
        seconds: limit of the training time of each method; None takes the recipe's.
        recipes: other recipes for the embedded data set; None takes the packaged ones.
        test_images: pictures of the test split to evaluate on.
        rounds: of the benchmark.
        slice_seconds: length of a benchmark's turn.
        tolerance: relative difference of a mean cost from its budget, on the calibration images.
        threads: that speed is measured with; None takes two, where the machine has them.
        progress: shows how far each part is.

    Raises:
        MissingExtraError: the ``demo`` extra is not installed.
        TrainingError: the folder is in use, or cannot be written to.
    """
    from vitrim.train.backbone import create_dense
    from vitrim.train.folder import held, writing
    from vitrim.train.recipe import load_recipe

    with held(output):  # before the work, which takes minutes
        started = time.monotonic()
        found = list(recipes or map(load_recipe, RECIPES))
        dense = create_dense(found[0].model, found[0].run.seed).eval()
        trained, train_seconds = {}, {}
        for recipe in found:
            limit = seconds or recipe.run.max_seconds or MAX_SECONDS
            recipe = replace(recipe, run=replace(recipe.run, max_seconds=limit))
            sparse, took = _train(recipe, limit, progress)
            trained[sparse.method.name], train_seconds[sparse.method.name] = sparse, took
        data_config = next(iter(trained.values())).data_config
        batches = _images(
            "digits/test", data_config, test_images, "making the test images", progress
        )
        points = _measure(trained, dense, data_config, batches, tolerance, progress)
        assert points[0].evaluation.dense is not None
        outcome = Outcome(
            recipes=dict(zip(trained, found, strict=True)),
            train_seconds=train_seconds,
            points=points,
            dense=points[0].evaluation.dense,
            rows=_benchmark(points, dense, batches, rounds, slice_seconds, threads, progress),
            batches=batches,
        )
        page = report_page(outcome)
        with writing(output):
            for name in trained:
                point = outcome.main(name)
                metrics = {"test": point.evaluation.to_dict()}
                point.sparse.save_pretrained(output / "checkpoints" / name, metrics=metrics)
            results = _results(outcome) | {"total_seconds": time.monotonic() - started}
            write_atomic(output / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            write_atomic(output / "report.html", page.encode())
        return summary(outcome, output, time.monotonic() - started)


def _train(recipe: Recipe, limit: float, progress: ProgressBar) -> tuple[SparseModel, float]:
    """The sparse model that the recipe makes, and how long that took."""
    from vitrim.train.engine import train

    started = time.monotonic()
    steps_per_epoch = recipe.data.length // recipe.data.batch_size // recipe.optim.accumulate
    total_steps = max(1, steps_per_epoch * recipe.run.epochs)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(f"fine-tuning with {recipe.method.name}", 100) as advance,
    ):

        def on_progress(record: dict[str, Any]) -> None:
            advance(min(100, int(100 * max(record["step"] / total_steps, record["time"] / limit))))

        result = train(recipe, Path(folder) / "run", on_progress=on_progress)
        sparse = from_pretrained(result.folder / "checkpoint")
    return sparse, time.monotonic() - started


def _images(
    source: str, data_config: dict[str, Any], count: int, label: str, progress: ProgressBar
) -> Batches:
    """Pictures of the embedded set, made once and kept."""
    from vitrim.train.data import eval_loader

    batches, made = [], 0
    with progress(label, count) as advance:
        for images, labels in eval_loader(source, data_config, 100, length=count):
            batches.append((images, labels))
            made += len(labels)
            advance(made)
    return batches


def _measure(
    trained: dict[str, SparseModel],
    dense: nn.Module,
    data_config: dict[str, Any],
    batches: Batches,
    tolerance: float,
    progress: ProgressBar,
) -> list[Point]:
    """Every method at every budget that it can meet, on the same images."""
    seen = _images(  # of the training split, without their labels
        "digits/train", data_config, _CALIBRATION_IMAGES, "making calibration images", progress
    )
    points = []
    with progress("evaluating methods and budgets", len(trained)) as advance:
        for number, (name, sparse) in enumerate(trained.items(), 1):
            found = _at_budgets(sparse, seen, tolerance)
            settings = {str(budget): _setting(sparse, budget, tolerance) for budget in found}
            measured = evaluate_settings(sparse, batches, settings, dense=dense)
            for budget, model in found.items():
                points.append(Point(name, budget, model, measured[str(budget)]))
            advance(number)
    return points


def _at_budgets(
    sparse: SparseModel, seen: Batches, tolerance: float
) -> dict[float | None, SparseModel]:
    """A copy for each budget; the model as it is where its cost is fixed."""
    if not has_dial(sparse):
        return {None: sparse}
    calibrate(sparse, seen, macs=BUDGETS, tolerance=tolerance)
    found: dict[float | None, SparseModel] = {}
    for budget in BUDGETS:
        found[budget] = model = copy.deepcopy(sparse)
        model.set_budget(budget, tolerance=tolerance)
    return found


def _setting(sparse: SparseModel, budget: float | None, tolerance: float) -> Setting:
    return (
        (lambda: None)
        if budget is None
        else partial(sparse.set_budget, budget, tolerance=tolerance)
    )


def has_dial(sparse: SparseModel) -> bool:
    """Whether the model's cost can be changed."""
    try:
        sparse.method.dial()
    except ConfigError:
        return False
    return True


def _benchmark(
    points: Sequence[Point],
    dense: nn.Module,
    batches: Batches,
    rounds: int,
    slice_seconds: float,
    threads: int | None,
    progress: ProgressBar,
) -> list[Row]:
    """Every point against the dense model, on the test images."""
    images = torch.cat([images for images, _ in batches])
    candidates: dict[str, nn.Module] = {DENSE: dense}
    candidates |= {point.name: point.sparse for point in points}
    done = 0
    with progress("measuring speed", len(BATCHES)) as advance:

        def on_part(text: str) -> None:
            nonlocal done
            advance(done)
            done += 1

        return benchmark(
            candidates,
            tuple(images.shape[1:]),
            batches=[batch for batch in BATCHES if batch <= len(images)],
            dtypes=("fp32",),
            rounds=rounds,
            min_seconds=slice_seconds,
            max_seconds=25,  # on a machine that is busy with other work
            threads=threads or min(2, os.cpu_count() or 1),
            images=images,
            progress=on_part,
        )


def _results(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipes": {name: to_plain(recipe) for name, recipe in outcome.recipes.items()},
        "train_seconds": outcome.train_seconds,
        "points": [
            {
                "method": point.method,
                "budget": point.budget,
                "name": point.name,
                "is_main": point.is_main,
                "config": to_plain(point.sparse.config),
                **point.evaluation.to_dict(),
            }
            for point in outcome.points
        ],
        "benchmark": [row.to_dict() for row in outcome.rows],
    }
