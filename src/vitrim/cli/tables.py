"""Results as tables that people want to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from vitrim.budget import Calibration, Spread
from vitrim.capabilities import Support
from vitrim.tasks.evaluation import TaskEvaluation
from vitrim.tools.benchmark import Quartiles, Row
from vitrim.tools.evaluate import DenseEvaluation, Evaluation


def plain_table(title: str, *columns: str) -> Table:
    """An empty table in the house's look: the first column is text, the others are numbers."""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=0,
    )
    for place, column in enumerate(columns):
        first = place == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    return table


def fact_table(facts: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def evaluation_table(
    results: Mapping[str, Evaluation | DenseEvaluation], what: str = "images"
) -> Table:
    """Dense and sparse accuracy and cost; one row per model."""
    first = next(iter(results.values()))
    table = plain_table(
        f"Accuracy on {first.images:,} {what}",
        "model",
        "top-1\n%",
        "top-5\n%",
        "difference,\npoints (95%)",
        "won/\nlost",
        "agree\n%",
        "GMACs",
        "of\ndense",
    )
    if first.dense is not None:
        macs = giga(first.dense_macs)
        accuracy = (f"{first.dense.top1:.2f}", f"{first.dense.top5:.2f}")
        table.add_row("dense", *accuracy, "", "", "", macs, "100%")
    for name, result in results.items():
        if isinstance(result, DenseEvaluation):
            continue
        pair = result.paired
        table.add_row(
            name,
            f"{result.sparse.top1:.2f}",
            f"{result.sparse.top5:.2f}",
            f"{pair.difference:+.2f}\n{pair.low:+.2f}..{pair.high:+.2f}" if pair else "",
            f"{pair.won}/{pair.lost}" if pair else "",
            f"{pair.agreement:.1f}" if pair else "",
            _spread(result.macs, giga),
            f"{100 * result.macs.mean / result.dense_macs:.0f}%",
        )
    return table


def task_table(results: Mapping[str, TaskEvaluation]) -> Table:
    """Scores of detectors or segmenters and cost of their backbones; one row per model."""
    first = next(iter(results.values()))
    names = [name for name, value in first.scores.items() if value is not None]
    compared = {name: None for found in results.values() for name in found.differences}
    table = plain_table(
        f"On {first.images:,} images, in percent; GMACs of the backbone",
        "model",
        *(name.replace(" ", "\n") for name in names),
        *(f"{name}, points\nfrom dense (95%)" for name in compared),
        "GMACs",
        "of\ndense",
    )
    for name, found in results.items():
        scores = (found.scores[score] for score in names)
        gaps = (found.differences.get(name) for name in compared)
        table.add_row(
            name,
            *("" if score is None else f"{score:.1f}" for score in scores),
            *(f"{gap[0]:+.2f}\n{gap[1]:+.2f}..{gap[2]:+.2f}" if gap else "" for gap in gaps),
            _spread(found.macs, giga),
            f"{100 * found.macs.mean / found.dense_macs.mean:.0f}%",
        )
    return table


def stage_table(results: Mapping[str, Evaluation | TaskEvaluation]) -> Table:
    """Patches kept at each stage."""
    first = next(iter(results.values()))
    table = plain_table(
        "Patches kept",
        "model",
        *(f"before block {stage.block},\nof {stage.num_patches}" for stage in first.stages),
    )
    for name, result in results.items():
        kept = [
            _spread(stage.kept, lambda value: f"{value:.1f}".removesuffix(".0"))
            for stage in result.stages
        ]
        table.add_row(name, *kept)
    return table


def calibration_table(found: Sequence[Calibration]) -> Table:
    """Budgets, where the dial stands for them, and what the model was found to cost."""
    images = found[0].images
    table = plain_table(
        f"Calibrated on {images:,} images" if images else "Calibrated by formula",
        "budget",
        found[0].dial,
        "of\ndense",
        "GMACs",
        "passes",
    )
    for point in found:
        table.add_row(
            f"{point.budget:g}",
            f"{point.value:.6g}",
            f"{100 * point.fraction:.1f}%",
            _spread(point.macs, giga),
            str(point.passes),
        )
    return table


def benchmark_table(rows: Sequence[Row]) -> Table:
    """Times, speed-ups and efficiencies with their quartiles."""
    hardware = rows[0].hardware
    table = plain_table(
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['threads']} thread(s), "
        f"torch {hardware['torch']}{', compiled' if rows[0].compiled else ''}, "
        f"{rows[0].rounds} rounds: median, quartiles",
        "model",
        "dtype",
        "batch",
        "ms per\nbatch",
        "clips/s" if len(rows[0].image_shape) == 4 else "images/s",
        "GMACs",
        "speed-up",
        "efficiency",
    )
    for row in rows:
        is_base = row.name == row.base
        milliseconds = row.seconds / 1e-3
        table.add_row(
            row.name,
            row.dtype,
            str(row.batch),
            _quartiles(milliseconds, 3 - len(f"{milliseconds.median:.0f}")),
            f"{row.images_per_second:,.0f}",
            giga(row.macs),
            "" if is_base else _quartiles(row.speedup, 2),
            "" if is_base else _quartiles(row.efficiency, 2),
            end_section=row.name == rows[-1].name,
        )
    return table


def support_table(found: Sequence[Support]) -> Table:
    """Timm's modules: how many of their models are served, and why the others are not."""
    table = plain_table("Models of timm, by module", "module", "served", "of", "why not the others")
    table.columns[3].justify = "left"
    for module in found:
        reasons = [f"{count}: {reason}" for reason, count in module.reasons.items()]
        counts = str(len(module.served)), str(module.total)
        table.add_row(module.module, *counts, "\n".join(reasons))
    return table


def giga(macs: float) -> str:
    """MACs in billions, three digits after the point."""
    return f"{macs / 1e9:.3f}"


def _spread(spread: Spread, show: Any) -> str:
    """The mean, and the rest where the images differ."""
    if spread.min == spread.max:
        return str(show(spread.mean))
    return f"{show(spread.mean)} ±{show(spread.std)}\n{show(spread.min)}..{show(spread.max)}"


def _quartiles(values: Quartiles, digits: int) -> str:
    digits = max(0, digits)
    return f"{values.median:.{digits}f}\n{values.low:.{digits}f}..{values.high:.{digits}f}"
