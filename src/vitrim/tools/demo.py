"""The whole job in a few minutes, offline: data, dense model, fine-tuning, measures, report.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitrim.checkpoint import from_pretrained, write_atomic
from vitrim.config import to_plain
from vitrim.model import SparseModel
from vitrim.tools import report, visualize
from vitrim.tools.benchmark import Row, benchmark
from vitrim.tools.evaluate import Accuracy, Evaluation, Paired, evaluate

if TYPE_CHECKING:
    from vitrim.train.recipe import Recipe

RECIPE = "digits-dynamicvit"
MAX_SECONDS = 120.0
"""Of training, where neither the caller nor the recipe says."""
BATCHES = (64, 1)
"""Images per call that are timed; the first is the summary's."""
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Keep ratios of the curves, besides the trained one."""
DENSE = "dense"

ProgressBar = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Given a label and a total, a context that yields what takes the number done so far."""


@contextmanager
def _silent(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@dataclass(frozen=True)
class Outcome:
    """What a demo measured."""

    recipe: Recipe
    ratio: float
    """That the model was trained for."""
    evaluation: Evaluation
    """At the trained ratio."""
    dense: Accuracy
    """Of the dense model as it was before."""
    paired: Paired
    """The trained ratio against that dense model."""
    sweep: dict[float, Evaluation]
    """At each ratio of the curves; the same weights throughout."""
    rows: list[Row]
    train_seconds: float

    def row(self, name: str, batch: int) -> Row:
        """The benchmark of a candidate at a batch size."""
        return next(row for row in self.rows if (row.name, row.batch) == (name, batch))


def run_demo(
    output: Path,
    *,
    seconds: float | None = None,
    recipe: Recipe | None = None,
    test_images: int = 2000,
    rounds: int = 9,
    slice_seconds: float = 0.15,
    progress: ProgressBar = _silent,
) -> list[str]:
    """Run the demo, write its folder, and return the six lines of its summary.

    The folder gets ``report.html``, ``results.json`` and ``checkpoint/``; earlier ones in it are
    replaced.

    Args:
        output: the folder.
        seconds: limit of the training time; None takes the recipe's.
        recipe: another recipe for the embedded data set; None takes the packaged one.
        test_images: pictures of the test split to evaluate on.
        rounds: of the benchmark.
        slice_seconds: length of a benchmark's turn.
        progress: shows how far each part is.

    Raises:
        MissingExtraError: the ``demo`` extra is not installed.
    """
    from vitrim.train.recipe import load_recipe
    from vitrim.train.task import create_dense

    started = time.monotonic()
    recipe = recipe or load_recipe(RECIPE)
    limit = seconds or recipe.run.max_seconds or MAX_SECONDS
    recipe = replace(recipe, run=replace(recipe.run, max_seconds=limit))
    dense = create_dense(recipe.model, recipe.run.seed).eval()
    sparse, train_seconds = _train(recipe, limit, progress)
    batches = _test_batches(sparse, test_images, progress)
    evaluation, sweep = _evaluate(sparse, dense, batches, progress)
    rows = _benchmark(sparse, dense, sorted(sweep), rounds, slice_seconds, progress)
    assert evaluation.dense is not None
    assert evaluation.paired is not None
    outcome = Outcome(
        recipe=recipe,
        ratio=float(sparse.config.keep_ratio),
        evaluation=evaluation,
        dense=evaluation.dense,
        paired=evaluation.paired,
        sweep=sweep,
        rows=rows,
        train_seconds=train_seconds,
    )
    page = report_page(outcome, _strips(sparse, batches))
    output.mkdir(parents=True, exist_ok=True)
    sparse.save_pretrained(output / "checkpoint", metrics={"test": evaluation.to_dict()})
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
        progress("fine-tuning the sparse model", 100) as advance,
    ):

        def on_progress(record: dict[str, Any]) -> None:
            advance(min(100, int(100 * max(record["step"] / total_steps, record["time"] / limit))))

        result = train(recipe, Path(folder) / "run", on_progress=on_progress)
        sparse = from_pretrained(result.folder / "checkpoint")
    return sparse, time.monotonic() - started


def _test_batches(
    sparse: SparseModel, count: int, progress: ProgressBar
) -> list[tuple[Tensor, Tensor]]:
    """The test split, made once and kept."""
    from vitrim.train.data import eval_loader

    loader = eval_loader("digits/test", sparse.data_config, 100, length=count)
    batches, made = [], 0
    with progress("making the test images", count) as advance:
        for images, labels in loader:
            batches.append((images, labels))
            made += len(labels)
            advance(made)
    return batches


def _evaluate(
    sparse: SparseModel,
    dense: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: ProgressBar,
) -> tuple[Evaluation, dict[float, Evaluation]]:
    """Against the dense model at the trained ratio; and alone at every ratio of the curves."""
    count = sum(len(labels) for _, labels in batches)
    trained = float(sparse.config.keep_ratio)
    with progress("evaluating dense and sparse", count) as advance:
        evaluation = evaluate(sparse, batches, dense=dense, progress=advance)
    sweep = {trained: evaluation}
    with progress("trying other keep ratios", len(RATIOS)) as advance:
        for number, ratio in enumerate(RATIOS, 1):
            if ratio not in sweep:
                sparse.set_keep_ratio(ratio)
                sweep[ratio] = evaluate(sparse, batches, dense=False)
            advance(number)
    sparse.set_keep_ratio(trained)
    return evaluation, sweep


def _benchmark(
    sparse: SparseModel,
    dense: nn.Module,
    ratios: Sequence[float],
    rounds: int,
    slice_seconds: float,
    progress: ProgressBar,
) -> list[Row]:
    candidates: dict[str, nn.Module] = {DENSE: dense}
    for ratio in ratios:
        candidates[str(ratio)] = changed = copy.deepcopy(sparse)
        changed.set_keep_ratio(ratio)
    done = 0
    with progress("measuring speed", len(BATCHES)) as advance:

        def on_part(text: str) -> None:
            nonlocal done
            advance(done)
            done += 1

        return benchmark(
            candidates,
            sparse.data_config["input_size"],
            batches=BATCHES,
            dtypes=("fp32",),
            rounds=rounds,
            min_seconds=slice_seconds,
            max_seconds=20,  # on a machine that is busy with other work
            threads=min(2, os.cpu_count() or 1),
            progress=on_part,
        )


def _strips(
    sparse: SparseModel, batches: Sequence[tuple[Tensor, Tensor]], count: int = 6
) -> list[list[visualize.Panel]]:
    """The first test images, as they come."""
    images, labels = (tensor[:count] for tensor in batches[0])
    trace = sparse.trace(images)
    mean, std = sparse.data_config["mean"], sparse.data_config["std"]
    return [
        visualize.panels(
            visualize.denormalize(image, mean, std),
            trace,
            place,
            class_names=[f"digit {digit}" for digit in range(10)],
            truth=int(labels[place]),
            side=256,
        )
        for place, image in enumerate(images)
    ]


def _results(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": to_plain(outcome.recipe),
        "trained_keep_ratio": outcome.ratio,
        "train_seconds": outcome.train_seconds,
        "evaluation": outcome.evaluation.to_dict(),
        "sweep": [
            {"keep_ratio": ratio, **evaluation.to_dict()}
            for ratio, evaluation in sorted(outcome.sweep.items())
        ],
        "benchmark": [row.to_dict() for row in outcome.rows],
    }


def summary(outcome: Outcome, output: Path, seconds: float) -> list[str]:
    """Six lines that say what was measured."""
    found, pair, batch = outcome.evaluation, outcome.paired, BATCHES[0]
    before, after = outcome.row(DENSE, batch), outcome.row(str(outcome.ratio), batch)
    quartiles = f"{after.speedup.low:.2f} to {after.speedup.high:.2f}"
    return [
        f"data        cluttered digits, {found.images:,} test images; "
        f"fine-tuned for {outcome.train_seconds:.0f} s at keep ratio {outcome.ratio}",
        f"dense       {outcome.dense.top1:.2f}% top-1, {found.dense_macs / 1e6:.1f} MMACs, "
        f"{before.images_per_second:,.0f} images/s",
        f"sparse      {found.sparse.top1:.2f}% top-1, {found.macs.mean / 1e6:.1f} MMACs, "
        f"{after.images_per_second:,.0f} images/s",
        f"difference  {pair.difference:+.2f} points (95%: {pair.low:+.2f} to {pair.high:+.2f}), "
        f"{pair.won} won, {pair.lost} lost, {pair.agreement:.1f}% the same answer",
        f"speed-up    {after.speedup.median:.2f}x (quartiles {quartiles}), batch {batch}, fp32, "
        f"{after.hardware['threads']} threads; efficiency {after.efficiency.median:.2f}",
        f"report      {output / 'report.html'} after {seconds:.0f} s",
    ]


def report_page(outcome: Outcome, strips: Sequence[Sequence[visualize.Panel]]) -> str:
    """The report, one self-contained HTML document."""
    found, pair, batch = outcome.evaluation, outcome.paired, BATCHES[0]
    own = outcome.row(str(outcome.ratio), batch)
    hardware = own.hardware
    parts = [
        "<h1>A vision transformer that looks only where it matters</h1>",
        f'<p class="soft">DynamicViT on the embedded data set, measured on {hardware["cpu"]}, '
        f"{hardware['threads']} threads, torch {hardware['torch']}, {hardware['date'][:10]}.</p>",
        report.cards(
            [
                (f"{own.speedup.median:.2f}x", f"speed-up at batch {batch}"),
                (f"{pair.difference:+.2f}", "points of top-1 accuracy"),
                (f"{found.sparse.top1:.1f}%", f"top-1; dense {outcome.dense.top1:.1f}%"),
                (f"{100 * found.macs.mean / found.dense_macs:.0f}%", "of the dense model's MACs"),
            ]
        ),
        "<h2>Results</h2>",
        _result_table(outcome),
        f'<p class="soft">The model was fine-tuned for {outcome.train_seconds:.0f} seconds at keep '
        f"ratio {outcome.ratio}; the other ratios use the same weights. Against the dense model on "
        f"the same {found.images:,} test images it wins {pair.won} and loses {pair.lost}: "
        f"{pair.difference:+.2f} points, with a 95% confidence interval from {pair.low:+.2f} to "
        f"{pair.high:+.2f}.</p>",
        "<h2>What accuracy costs</h2>",
        _charts(outcome),
        "<h2>What the model looks at</h2>",
        '<p class="soft">The first images of the test set, as they come. Faded patches are '
        "dropped before the block named, and no later block computes them.</p>",
        *(report.strip(panels) for panels in strips),
        "<h2>How this was measured</h2>",
        f"<p>Accuracy: one pass over {found.images:,} test images, dense and sparse on the same "
        "batches. Time: the candidates take turns in rotating order over "
        f"{own.rounds} rounds; speed-ups are ratios of times in the same round, their median is "
        "shown, with the quartiles in small print. Images per second and efficiency are at batch "
        f"{batch}. Efficiency is the speed-up over the ratio of the MACs: 1 means that all work "
        "saved was time saved. results.json has all numbers.</p>",
    ]
    return report.page("vitrim demo", "\n".join(parts))


def _result_table(outcome: Outcome) -> str:
    head = ["model", "top-1 %", "MMACs", *(f"speed-up\nbatch {batch}" for batch in BATCHES)]
    head += ["images/s\nefficiency"]
    base = outcome.row(DENSE, BATCHES[0])
    speed = f"{base.images_per_second:,.0f}"
    rows = [["dense", f"{outcome.dense.top1:.2f}", f"{base.macs / 1e6:.1f}", "1", "1", speed]]
    for ratio, evaluation in sorted(outcome.sweep.items(), reverse=True):
        timed = [outcome.row(str(ratio), batch) for batch in BATCHES]
        name = f"keep {ratio}" + ("\ntrained" if ratio == outcome.ratio else "")
        rows.append(
            [
                name,
                f"{evaluation.sparse.top1:.2f}",
                f"{timed[0].macs / 1e6:.1f}",
                *(
                    f"{row.speedup.median:.2f}\n{row.speedup.low:.2f} to {row.speedup.high:.2f}"
                    for row in timed
                ),
                f"{timed[0].images_per_second:,.0f}\n{timed[0].efficiency.median:.2f}",
            ]
        )
    return report.table(head, rows)


def _charts(outcome: Outcome) -> str:
    def points(x_of: Callable[[Row], float]) -> list[report.Point]:
        base = x_of(outcome.row(DENSE, BATCHES[0]))
        found = [report.Point(base, outcome.dense.top1, "dense", is_base=True)]
        for ratio, evaluation in outcome.sweep.items():
            x, trained = x_of(outcome.row(str(ratio), BATCHES[0])), ratio == outcome.ratio
            found.append(report.Point(x, evaluation.sparse.top1, f"{ratio}", is_trained=trained))
        return found

    charts = [
        report.chart(points(lambda row: row.macs / 1e6), "MMACs per image", "top-1 %"),
        report.chart(
            points(lambda row: row.images_per_second),
            f"images per second, batch {BATCHES[0]}",
            "top-1 %",
        ),
    ]
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    note = "Numbers at the dots are keep ratios; the large dot is the one trained for."
    return f'<div class="charts">{figures}</div><p class="soft">{note}</p>'
