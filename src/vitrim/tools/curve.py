"""The accuracy of one model against what it costs, drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrim.checkpoint import write_atomic
from vitrim.errors import InputError, MissingExtraError
from vitrim.tools.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")


def check_plot(path: Path) -> None:
    """Fail before the work, not after it, if no curve can be drawn to ``path``.

    Raises:
        InputError: the name is none of a picture.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no name of a picture; end it in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("drawing the curve", "matplotlib", "viz") from error


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure in the format that the name says; whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."), dpi=150)
    write_atomic(path, picture.getvalue())


def draw_curve(path: Path, title: str, points: Sequence[tuple[str, Evaluation]]) -> None:
    """Draw top-1 accuracy against mean MACs; one point per label and evaluation.

    The bars are 95% intervals of the paired difference from the dense model's accuracy, where
    there is one; the file appears whole or not at all.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point[1].macs.mean)
    found = [evaluation for _, evaluation in points]
    macs = [evaluation.macs.mean / 1e9 for evaluation in found]
    top1 = [evaluation.sparse.top1 for evaluation in found]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(macs, top1, "o-", color="tab:blue", label="sparse")
    for (label, _), x, y in zip(points, macs, top1, strict=True):
        axes.annotate(label, (x, y), (6, -12), textcoords="offset points", fontsize="small")
    dense, paired = found[0].dense, [e.paired for e in found if e.paired is not None]
    if dense is not None and len(paired) == len(found):
        below = [pair.difference - pair.low for pair in paired]
        above = [pair.high - pair.difference for pair in paired]
        axes.errorbar(macs, top1, (below, above), fmt="none", ecolor="tab:blue", alpha=0.5)
        axes.axhline(dense.top1, color="gray", linewidth=0.8, linestyle=":")
        axes.plot(found[0].dense_macs / 1e9, dense.top1, "k*", markersize=11, label="dense")
    axes.set(
        title=title,
        xlabel="GMACs per image, mean",
        ylabel=f"top-1 on {found[0].images:,} images (%)",
    )
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)
